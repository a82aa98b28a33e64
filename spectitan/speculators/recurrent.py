"""Recurrent drafters: a small state starts from the base's final hidden state and takes in one token a step.

`mlp` is the MLP speculator of Wertheimer et al. 2024 (https://arxiv.org/abs/2404.19124), as IBM's fms-extras defines it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.config.sections import Objective, key
from spectitan.errors import UserError
from spectitan.models.layers import assign, draw_normal
from spectitan.models.readout import Readout
from spectitan.objectives.fused_linear import Teacher, fused_linear_loss
from spectitan.speculators.base import Pick, Speculator, align_targets, collect_loss, last_row
from spectitan.speculators.folder_config import FolderConfig
from spectitan.types import BaseStates, Draft, Loss, Targets, TokenBatch

NORM_EPS = 1e-6
MAX_HEADS = 64


@dataclass
class MlpConfig:
    """Keys of the MLP speculator; names as in fms-fsdp."""

    n_speculator_heads: int = key(3, "heads: tokens drafted in a round", minimum=1, maximum=MAX_HEADS)
    speculator_width: int = key(-1, "width of the drafter's state; -1: the base's hidden size", minimum=-1)
    tie_weights: bool = key(True, "one embedding, norm and head for all steps, one projection for all steps after the first")
    scale_input: bool = key(True, "normalise the base's hidden state before the first step")


class ShiftedRMSNorm(nn.Module):
    """RMS norm with a weight and a bias: x / rms(x) * weight + bias, no mean subtracted."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.rms_norm(x, self.weight.shape, eps=NORM_EPS), self.weight)


class MlpSpeculator(Speculator):
    """`speculator.type = "mlp"`: step i maps state s and token x to gelu(norm_i(proj_i(s) + alpha * emb_i(x))), scored by head_i.

    Weights that steps share are held once: tied, the lists `emb`, `ln` and `head` have one entry and `proj` two, and
    step i takes entry i or the last one.

    Args:
        config: its keys.
        base_config: the base's `hidden_size` and `vocab_size`.
        objective: loss and chunk size.
    """

    def __init__(self, config: MlpConfig, base_config, objective: Objective):
        super().__init__()
        self.steps = config.n_speculator_heads
        self.tied, self.scale_input = config.tie_weights, config.scale_input
        self.hidden_size, self.vocab_size = base_config.hidden_size, base_config.vocab_size
        self.width = self.hidden_size if config.speculator_width == -1 else config.speculator_width
        self.loss, self.chunk_rows = objective.loss, objective.chunk_rows
        if self.width < 1:
            raise UserError("speculator.speculator_width = 0; allowed: 1 or more, or -1 for the base's hidden size")
        if self.tied and self.steps == 1:
            raise UserError("speculator.tie_weights = true; allowed: false with speculator.n_speculator_heads = 1: nothing to tie")
        # In expectation the first state makes up half of the last one's magnitude.
        state_weight = 0.5 ** (0.5 / self.steps)
        self.alpha = math.sqrt((1 - state_weight**2) * self.width / 2) / state_weight

        distinct = 1 if self.tied else self.steps
        self.emb = nn.ModuleList(nn.Embedding(self.vocab_size, self.width) for _ in range(distinct))
        inputs = [self.hidden_size] + [self.width] * ((2 if self.tied else self.steps) - 1)
        self.proj = nn.ModuleList(nn.Linear(size, self.width, bias=False) for size in inputs)
        self.ln = nn.ModuleList(ShiftedRMSNorm(self.width) for _ in range(distinct))
        self.head = nn.ModuleList(nn.Linear(self.width, self.vocab_size, bias=False) for _ in range(distinct))

    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices from N(0, 1 / sqrt(width)), in the order of `named_parameters`; norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                draw_normal(parameter, 1 / math.sqrt(self.width), generator)
            else:
                assign(parameter, torch.full(parameter.shape, float(name.endswith("weight"))))

    def align(self, batch: TokenBatch) -> Targets:
        """The pairs, and as `extra` the distinct state rows [R] and each pair's place among them [N]."""
        targets = align_targets(batch, self.steps)
        return targets._replace(extra=tuple(torch.unique(targets.state, return_inverse=True)))

    def first_state(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] of the base -> the state that step 0 starts from."""
        return F.rms_norm(hidden, hidden.shape[-1:], eps=NORM_EPS) * math.sqrt(0.5) if self.scale_input else hidden

    def advance(self, step: int, state: Tensor, embedded: Tensor) -> Tensor:
        """The state [rows, width] after one more token, whose embedding is [rows, width]."""
        projected = _entry(self.proj, step)(state)
        return F.gelu(_entry(self.ln, step)(torch.add(projected, embedded, alpha=self.alpha)))

    def unroll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """States of all steps on known tokens: [rows, hidden], int64 [steps, rows] -> [steps, rows, width]."""
        # One lookup of a shared embedding, not one a step: its dense gradient is then made once.
        embedded = self.emb[0](tokens) if self.tied else [emb(row) for emb, row in zip(self.emb, tokens)]
        state, outputs = self.first_state(hidden), []
        for step in range(self.steps):
            state = self.advance(step, state, embedded[step])
            outputs.append(state)
        return torch.stack(outputs)

    def forward(self, batch: TokenBatch, states: BaseStates, targets: Targets, denominators: Tensor, readout: Readout) -> Loss:
        rows, place = targets.extra
        text, final = batch.tokens.flatten(), states.final.flatten(0, 1)
        # Step i takes in token t + 1 + i. Past the end of the batch any token does: no pair there is supervised.
        ahead = torch.arange(1, self.steps + 1, device=rows.device)[:, None]
        outputs = self.unroll(final.index_select(0, rows), text[(rows + ahead).clamp_max(len(text) - 1)])
        hidden = outputs.flatten(0, 1).index_select(0, targets.step * len(rows) + place)
        row_weights = self.row_weights(targets, denominators)
        target_tokens = text[targets.teacher + 1]

        def loss_of_heads(readout: Readout, hidden: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
            if self.tied:
                teacher_rows = targets.teacher if targets.host_teacher is None else targets.host_teacher
                return self._loss_of_head(0, hidden, row_weights, target_tokens, teacher_rows, final, readout)
            by_step = torch.argsort(targets.step, stable=True)  # rows of a step stay ascending in the teacher's
            parts = [
                self._loss_of_head(step, hidden[pairs], row_weights[pairs], target_tokens[pairs], targets.teacher[pairs], final, readout)
                for step, pairs in enumerate(by_step.split(targets.counts.tolist()))
            ]
            row_stats = torch.cat([stats for _, stats in parts])
            return torch.stack([total for total, _ in parts]).sum(), torch.empty_like(row_stats).index_copy_(0, by_step, row_stats)

        if self.loss == "ce":
            total, row_stats = loss_of_heads(readout, hidden, row_weights)
        else:  # the base's head is read, so its unit has to be gathered
            total, row_stats = readout.call(loss_of_heads, hidden, row_weights)
        return collect_loss(total, row_stats, targets, len(text))

    def _loss_of_head(self, step, hidden, row_weights, target_tokens, teacher_rows, final, readout) -> tuple[Tensor, Tensor]:
        """The fused loss of one distinct head on its rows."""
        teacher = None if self.loss == "ce" else Teacher(final.detach(), readout.head.weight.detach(), teacher_rows)
        return fused_linear_loss(
            hidden, self.head[step].weight, row_weights, loss=self.loss, targets=target_tokens, teacher=teacher, chunk_rows=self.chunk_rows
        )

    def draft(self, cache: None, tokens: Tensor, states: BaseStates, counts: Tensor, readout: Readout, k: int, pick: Pick) -> Draft:
        """A chain of k <= steps tokens a row; the state is rebuilt from the last verified one, so nothing is cached."""
        assert k <= self.steps, f"{k} draft tokens from {self.steps} heads"
        token, state = last_row(tokens, counts), self.first_state(last_row(states.final, counts))
        chain, probabilities = [], []
        for step in range(k):
            state = self.advance(step, state, _entry(self.emb, step)(token))
            token, probability = pick(_entry(self.head, step)(state), step)
            chain.append(token)
            probabilities.append(probability)
        greedy = probabilities[0] is None
        return Draft(torch.stack(chain, 1)[:, None], None if greedy else torch.stack(probabilities, 1)[:, None])

    def flops(self, targets_per_step: list[int], tokens: int) -> int:
        """Forward and backward: each product three times, twice where its input needs no gradient (the base's hidden states)."""
        # A row with a target at a later step goes through all steps before it.
        rows = [max(targets_per_step[step:]) for step in range(self.steps)]
        projections = 4 * rows[0] * self.hidden_size * self.width + 6 * sum(rows[1:]) * self.width**2
        heads = 6 * sum(targets_per_step) * self.width * self.vocab_size
        teacher = 0 if self.loss == "ce" else 2 * max(targets_per_step) * self.hidden_size * self.vocab_size
        return projections + heads + teacher

    def serving(self, format: str) -> tuple[dict, dict[str, Tensor]]:
        """IBM's `mlp_speculator` layout, which fms-extras defines. It repeats what steps share: not all readers tie it themselves."""
        if format != "mlp_speculator":
            raise UserError(f"export.format = {format!r}: a speculator of type mlp is written as mlp_speculator")
        config = {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            "vocab_size": self.vocab_size,
            "emb_dim": self.hidden_size,
            "inner_dim": self.width,
            "n_predict": self.steps,
            # The tree of readers that draft one: their default of 5, 4, 3, continued.
            "top_k_tokens_per_head": [max(5 - step, 1) for step in range(self.steps)],
            "n_candidates": 5,
            "tie_weights": self.tied,
            "scale_input": self.scale_input,
        }
        state = self.state_dict()
        tensors = {}
        for step in range(self.steps):
            for kind in ("emb", "proj", "ln", "head"):
                entry = min(step, len(getattr(self, kind)) - 1)
                for part in ("weight", "bias") if kind == "ln" else ("weight",):
                    tensors[f"speculator.{kind}.{step}.{part}"] = state[f"{kind}.{entry}.{part}"]
        return config, tensors

    @staticmethod
    def config_from_folder(config: FolderConfig) -> tuple[MlpConfig, int, int]:
        """Its keys, the base's hidden size and vocabulary size, from the config.json of an `mlp_speculator` folder."""
        hidden_size = config.count("emb_dim")
        keys = MlpConfig(
            n_speculator_heads=config.count("n_predict", at_most=MAX_HEADS),
            speculator_width=config.count("inner_dim", at_least=0) or hidden_size,
            tie_weights=config.flag("tie_weights"),
            scale_input=config.flag("scale_input"),
        )
        return keys, hidden_size, config.count("vocab_size")


def _entry(modules: nn.ModuleList, step: int) -> nn.Module:
    """The module of a step; steps past the end share the last one."""
    return modules[min(step, len(modules) - 1)]
