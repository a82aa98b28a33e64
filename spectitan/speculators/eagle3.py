"""EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840): a decoder of a few layers over hidden states of the base, trained on its own outputs."""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spectitan.config.loss_mixture import needs_teacher
from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.models.config_file import ConfigFile
from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import Linear, Rotation, assign, draw_normal, positions_in_documents, rope_frequencies, whole
from spectitan.models.readout import Readout
from spectitan.objectives.chunked import argmax_tokens, expected_acceptance
from spectitan.objectives.fused_linear import Teacher, fused_linear_loss
from spectitan.objectives.vocab_parallel import rows_of
from spectitan.speculators.base import Pick, Speculator, align_targets, collect_loss, last_index, right_before
from spectitan.speculators.draft_decoder import DraftLayer, decoder_of, settle_draft_config
from spectitan.speculators.draft_vocabulary import check_maps, check_vocabulary_given, maps_of, read_vocabulary, write_maps
from spectitan.speculators.eagle3_config import Eagle3Config, layer_windows, tap_layers, vocabulary_size
from spectitan.speculators.eagle3_folders import read_eagle3, write_eagle3
from spectitan.speculators.ttt_attention import Memory, TTTAttention, cached_bias, choose_backend, document_spans
from spectitan.types import BaseStates, Draft, Loss, Targets, TokenBatch

_ROWS = 64


class Eagle3Speculator(Speculator):
    """`speculator.type = "eagle3"`.

    State row i takes in h = fc(states of the base at i) and the embedding of token i + 1; its output is scored by the base's
    head and is the h of the next step, which takes in token i + 2.

    Args:
        config: its keys.
        base_config: of the base.
        objective: loss and chunk size.

    Attributes:
        decoder: shape of its layers.
        d2t: int64 [draft_vocab_size], token id - draft id; only with a reduced vocabulary.
        t2d: bool [vocab_size], whether a token can be drafted; likewise.
    """

    formats = ("speculators",)
    borrowed = ("embed_tokens.weight", "lm_head.weight")
    metrics = ("loss", "accuracy", "alpha", "full_accuracy", "reached", "outside_vocabulary")

    def __init__(self, config: Eagle3Config, base_config, objective: Objective):
        super().__init__()
        self.config, self.decoder = config, decoder_of(config, base_config)
        self.steps, self.hidden_size, self.vocab_size = config.ttt_steps, self.decoder.hidden_size, base_config.vocab_size
        self.loss, self.chunk_rows = objective.loss, objective.chunk_rows
        self.taps = tap_layers(config.target_layer_ids, base_config.num_layers)
        if config.norm_before_fc and config.fc_norm:
            raise UserError("speculator.norm_before_fc = true and speculator.fc_norm = true; allowed: one of them")
        width, eps = self.hidden_size, self.decoder.norm_eps
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(len(self.taps) * width, eps=eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(width, eps=eps) for _ in self.taps)
        self.fc = Linear(len(self.taps) * width, width, bias=False)
        windows = layer_windows(config)
        self.layers = nn.ModuleList(
            DraftLayer(self.decoder, window, takes_token=index == 0, norm_before_residual=config.norm_before_residual)
            for index, window in enumerate(windows)
        )
        self.norm = nn.RMSNorm(width, eps=eps)
        self.draft_vocab_size = vocabulary_size(config, self.vocab_size)
        self.reduced = self.draft_vocab_size < self.vocab_size
        if config.embed_requires_grad:
            self.embed_tokens = nn.Embedding(self.vocab_size, width)
        if config.train_head:
            self.lm_head = Linear(width, self.draft_vocab_size, bias=False)
        if self.reduced:
            self.register_buffer("d2t", torch.zeros(self.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(self.vocab_size, dtype=torch.bool))
        self._frequencies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def new(cls, config: Eagle3Config, base_config, objective: Objective) -> "Eagle3Speculator":
        settle_draft_config(config)
        maps = read_vocabulary(config, base_config.vocab_size)
        speculator = cls(config, base_config, objective)
        if maps is not None:
            speculator.d2t.copy_(maps[0])
            speculator.t2d.copy_(maps[1])
        return speculator

    def identity(self) -> dict[str, object]:
        """A hash of the draft vocabulary."""
        if not self.reduced:
            return {}
        return {"speculator.d2t": hashlib.sha256(self.d2t.cpu().numpy().tobytes()).hexdigest()}

    def check(self) -> None:
        if self.reduced:
            check_maps(self.d2t.cpu(), self.t2d.cpu(), "draft vocabulary")

    def check_given(self, config: Eagle3Config, given: Collection[str]) -> None:
        check_vocabulary_given(config, given, self.d2t.cpu() if self.reduced else None, self.vocab_size)

    def check_device(self, device: torch.device) -> None:
        choose_backend(self.config.attention, device)

    def write_files(self, folder: Path) -> None:
        if self.reduced:
            write_maps(folder, self.d2t, self.t2d)

    def set_vocabulary(self, token_ids: Tensor) -> None:
        """The tokens that it can draft, int64 [draft_vocab_size], ascending."""
        d2t, t2d = maps_of(token_ids, self.vocab_size)
        self.d2t.copy_(d2t)
        self.t2d.copy_(t2d)

    @property
    def draft_ids(self) -> Tensor:
        """int64 [draft_vocab_size], ascending: the token of each row of the head."""
        return torch.arange(self.draft_vocab_size, device=self.d2t.device) + self.d2t

    def backbone(self) -> list[tuple[nn.Module, str]]:
        return [(layer, name) for layer in self.layers for name in ("project", "finish")] + [(self.norm, "forward")]

    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices from N(0, initializer_range^2) of the base; norms 1. An embedding or head of its own: see `init_from_base`."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                assign(parameter, torch.ones(parameter.shape))
            elif name.endswith(".bias"):
                assign(parameter, torch.zeros(parameter.shape))
            else:
                draw_normal(parameter, self.decoder.initializer_range, generator)

    def init_from_base(self, readout: Readout) -> None:
        if self.config.embed_requires_grad:
            assign(self.embed_tokens.weight, whole(readout.embedding.weight))
        if self.config.train_head:
            head = whole(readout.head.weight)
            assign(self.lm_head.weight, head[self.draft_ids] if self.reduced else head)

    def step_weight(self) -> Tensor:
        return self.config.ttt_step_loss_decay ** torch.arange(self.steps, dtype=torch.float64)

    # ---- training ----

    def align(self, batch: TokenBatch) -> Targets:
        """The pairs, and as `extra`: where each pair's output is among those of all steps [N], the rows that go on after step 0
        [R], and the documents [D, 2], all int64."""
        targets = align_targets(batch, self.steps)
        later, length = targets.step > 0, batch.document_ids.numel()
        rows = _rows_that_go_on(targets.state[later], length)
        output = targets.state.clone()
        output[later] = length + (targets.step[later] - 1) * len(rows) + torch.searchsorted(rows, targets.state[later])
        return replace(targets, extra=(output, rows, document_spans(batch.document_ids)))

    def forward(self, batch: TokenBatch, states: BaseStates, targets: Targets, denominators: Tensor, readout: Readout) -> Loss:
        output, rows, _ = targets.extra
        host, text, final = targets.host or targets, batch.tokens.flatten(), states.final.detach().flatten(0, 1)
        attention = TTTAttention(self.config.attention, batch.document_ids, host.extra[2], rows)
        hidden = self._unroll(batch, states, rows, attention, readout).index_select(0, output)
        tokens = text[targets.teacher + 1]
        inside, ids = torch.ones_like(tokens, dtype=torch.bool), tokens
        if self.reduced:
            inside = self.t2d[tokens]
            ids = torch.where(inside, torch.searchsorted(self.draft_ids, tokens), -1)

        def loss_of_head(readout: Readout, hidden: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
            frozen = self._rows_of_head(readout)  # what the teacher has, over the draft vocabulary
            head = self.lm_head.weight if self.config.train_head else frozen
            teacher = Teacher(final, frozen, host.teacher) if needs_teacher(self.loss) else None
            total, row_stats = fused_linear_loss(
                hidden, head, row_weights, loss=self.loss, targets=ids, teacher=teacher, chunk_rows=self.chunk_rows
            )
            row_stats[:, 1] *= inside
            if self.reduced and not torch.is_grad_enabled():  # validation: against all of the base's vocabulary
                row_stats[:, 2] = expected_acceptance(
                    hidden, head.to(hidden.dtype), final, whole(readout.head.weight), targets.teacher, self.draft_ids
                )
            return total, row_stats

        total, row_stats = readout.call(loss_of_head, hidden, self.row_weights(targets, denominators))
        own = torch.stack([right_before(row_stats[:, 1], targets, len(text)), ~inside], 1)
        return collect_loss(total, torch.cat([row_stats, own.to(row_stats.dtype)], 1), targets, len(text))

    def _unroll(self, batch: TokenBatch, states: BaseStates, rows: Tensor, attention: TTTAttention, readout: Readout) -> Tensor:
        """What the head reads, of all steps one after another: [T + (steps - 1) * R, hidden], of the T = batch * seq rows at step 0
        and of the R that go on after it."""
        text, hidden = batch.tokens.flatten(), self._join(states.taps).view(1, -1, self.hidden_size)
        row, position = torch.arange(len(text), device=text.device), positions_in_documents(batch.document_ids).flatten()
        for_tokens, for_states = self.layers[0].halves()
        of_tokens = self.layers[0].project_tokens(self._embed(text, readout), for_tokens)
        memories, outputs = [Memory() for _ in self.layers], []
        for step in range(self.steps):
            if step == 1:
                row, position, hidden = rows, position[rows], hidden[:, rows]
            if step and self.config.ttt_tokens == "own":
                drafted = self._likeliest(outputs[-1][:, rows] if step == 1 else outputs[-1], readout)
                # Of all rows: ranks among which the embedding is divided look up as many each.
                embedded = self._embed(text.index_copy(0, rows, drafted), readout)[rows]
                taken_in = self.layers[0].project_tokens(embedded, for_tokens)
            else:  # past the end of the batch any token does: no pair there is supervised
                taken_in = of_tokens.index_select(0, (row + 1 + step).clamp_max(len(text) - 1))
            rotation = Rotation.at((position + step)[None], self._frequencies_on(hidden), hidden.dtype)
            for layer, memory in zip(self.layers, memories):
                of_first = (taken_in, for_states) if layer.takes_token else (None, None)
                residual, queries, keys, values = layer.project(hidden, *of_first, rotation)
                memory.add(keys, values)
                hidden = layer.finish(residual, attention(queries, memory, layer.window))
            outputs.append(self.norm(hidden))
            hidden = outputs[-1] if self.config.norm_output else hidden
        return torch.cat(outputs, 1)[0]

    def _join(self, taps: tuple[Tensor, ...]) -> Tensor:
        """States of the base -> [..., hidden], what step 0 starts from."""
        if self.config.fc_norm:
            taps = tuple(norm(tap) for norm, tap in zip(self.fc_norm, taps))
        joined = torch.cat(taps, -1)
        return self.fc(self.input_norm(joined) if self.config.norm_before_fc else joined)

    def _passed_on(self, output: Tensor) -> Tensor:
        """What the next step starts from."""
        return self.norm(output) if self.config.norm_output else output

    def _embed(self, tokens: Tensor, readout: Readout) -> Tensor:
        return self.embed_tokens(tokens) if self.config.embed_requires_grad else readout.embed(tokens).detach()

    def _rows_of_head(self, readout: Readout) -> Tensor:
        """[draft_vocab_size, hidden]: the base's head, of the tokens that can be drafted. Inside `readout.call`."""
        weight = readout.head.weight
        return rows_of(weight, self.draft_ids) if self.reduced else weight.detach()

    def _head(self, readout: Readout) -> Tensor:
        """[draft_vocab_size, hidden], without gradient: what drafts are scored by. Inside `readout.call`."""
        return whole(self.lm_head.weight if self.config.train_head else self._rows_of_head(readout))

    @torch.no_grad()
    def _likeliest(self, output: Tensor, readout: Readout) -> Tensor:
        """int64 [R]: the token that each output [1, R, hidden] would draft."""

        def choose(readout: Readout, hidden: Tensor) -> Tensor:
            return argmax_tokens(hidden, self._head(readout).to(hidden.dtype))

        ids = readout.call(choose, output[0])
        return self.draft_ids[ids] if self.reduced else ids

    def _frequencies_on(self, x: Tensor) -> Tensor:
        where = x.device, torch.float64 if x.dtype == torch.float64 else torch.float32
        if where not in self._frequencies:
            decoder = self.decoder
            frequencies = rope_frequencies(decoder.head_dim, decoder.rope_theta, decoder.rope_scaling, where[1])
            self._frequencies[where] = frequencies.to(x.device)
        return self._frequencies[where]

    # ---- drafting ----

    def new_cache(self, batch: int, length: int) -> KVCache:
        return KVCache(len(self.layers), batch, length, self.norm.weight.device)

    def draft(self, cache: KVCache, tokens: Tensor, states: BaseStates, counts: Tensor, readout: Readout, k: int, pick: Pick) -> Draft:
        """A chain. The verified tokens stay in the cache; drafted ones lie behind them, and the next round overwrites them."""
        hidden = self._cached(self._join(states.taps), tokens, cache, cache.next_slots(tokens.shape[1]), readout)
        hidden = hidden[last_index(counts)]
        cache.commit(counts)
        ahead = cache.next_slots(k - 1) if k > 1 else None
        drafted, probabilities = [], []
        for step in range(k):
            token, probability = pick(self._logits(hidden, readout), step)
            drafted.append(token)
            probabilities.append(probability)
            if step + 1 < k:
                hidden = self._cached(self._passed_on(hidden)[:, None], token[:, None], cache, ahead.one(step), readout)[:, 0]
        greedy = probabilities[0] is None
        return Draft(torch.stack(drafted, 1)[:, None], None if greedy else torch.stack(probabilities, 1)[:, None])

    def _cached(self, hidden: Tensor, tokens: Tensor, cache: KVCache, slots: Slots, readout: Readout) -> Tensor:
        """Outputs [batch, m, hidden] for states [batch, m, hidden] and tokens [batch, m]; a slot is a position."""
        rotation = Rotation.at(slots.index, self._frequencies_on(hidden), hidden.dtype)
        embedded = self._embed(tokens, readout)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, embedded, rotation, cached_bias(slots, layer.window, hidden.dtype), cache, index, slots)
        return hidden

    def _logits(self, output: Tensor, readout: Readout) -> Tensor:
        """[batch, hidden] -> [batch, vocab]; -inf for tokens that it cannot draft."""

        def score(readout: Readout, hidden: Tensor) -> Tensor:
            return hidden @ self._head(readout).T

        logits = readout.call(score, self.norm(output))
        if not self.reduced:
            return logits
        return logits.new_full((len(logits), self.vocab_size), -torch.inf).index_copy_(1, self.draft_ids, logits)

    # ---- folders ----

    def serving(self, format: str) -> tuple[dict, dict[str, Tensor]]:
        """Names of tensors are those of speculators; an embedding and a head that are the base's own: see `base_tensors`."""
        return write_eagle3(self.config, self.decoder, self.taps, self.draft_vocab_size), self.state_dict()

    def base_tensors(self, readout: Readout) -> dict[str, Tensor]:
        tensors = {}
        if not self.config.embed_requires_grad:
            tensors["embed_tokens.weight"] = readout.embedding.weight.detach()
        if not self.config.train_head:
            tensors["lm_head.weight"] = self._rows_of_head(readout)
        return tensors

    @staticmethod
    def config_from_folder(file: ConfigFile, format: str) -> tuple[Eagle3Config, int, int]:
        return read_eagle3(file)

    # ---- what it costs ----

    def flops(self, targets_per_step: list[int], tokens: int) -> int:
        """Forward and backward, attention's scores left out. Each product three times, twice where its input or its weight needs
        no gradient (the base's states; the frozen head)."""
        later = max(targets_per_step[1:], default=0)
        rows = tokens + (self.steps - 1) * later
        projections = self.layers[0].self_attn
        outputs = sum(part.out_features for part in (projections.q_proj, projections.k_proj, projections.v_proj))
        layers = 6 * rows * sum(layer.matrix_elements() for layer in self.layers)
        pairs, head, drafts = sum(targets_per_step), self.hidden_size * self.draft_vocab_size, 0
        if self.config.ttt_tokens == "own":
            drafts = 2 * (rows - tokens) * head
        else:  # the text's tokens are the same at all steps
            layers -= 6 * (rows - tokens) * self.hidden_size * outputs
        join = (6 if self.config.norm_before_fc or self.config.fc_norm else 4) * tokens * self.fc.weight.numel()
        teacher = 2 * max(targets_per_step) * head if needs_teacher(self.loss) else 0
        return layers + join + drafts + (6 if self.config.train_head else 4) * pairs * head + teacher


def _rows_that_go_on(needed: Tensor, length: int) -> Tensor:
    """int64 [R], ascending: the rows with targets after step 0, and a few more of 0 .. length - 1, so that R is a multiple of
    _ROWS: products of ever new sizes cost a CPU the making of a kernel each, and its memory. R is not 0: ranks that share the
    base's weights gather them together."""
    goes_on = torch.zeros(length, dtype=torch.bool)
    goes_on[needed] = True
    count = int(goes_on.sum())
    spare = (~goes_on).nonzero()[:, 0]
    goes_on[spare[: -count % _ROWS if count else min(_ROWS, length)]] = True
    return goes_on.nonzero()[:, 0]
