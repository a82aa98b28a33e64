"""What recurrent drafters share: a small state starts from the base's final hidden state and takes in one token a step.

A family (mlp, lstm) is one file: its keys, its modules, and how a state advances.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectitan.config.loss_mixture import needs_teacher
from spectitan.config.sections import Objective, key
from spectitan.errors import UserError
from spectitan.models.layers import Linear, assign, draw_normal
from spectitan.models.readout import Readout
from spectitan.objectives.fused_linear import Teacher, fused_linear_loss
from spectitan.speculators.base import Pick, Speculator, align_targets, collect_loss, last_index, right_before
from spectitan.types import BaseStates, Draft, Loss, Targets, TokenBatch, to_device

NORM_EPS = 1e-6
MAX_HEADS = 64
WIDTH_KEYS = ("emb_dim", "proj_dim", "inner_dim")
WIDTHS = re.compile(r"[1-9][0-9]{0,5}(\.[1-9][0-9]{0,5}){0,7}")  # "1024", "1024.2048"


@dataclass
class RecurrentConfig:
    """Keys of all recurrent drafters; names as in fms-fsdp and ArcticTraining."""

    n_speculator_heads: int = key(3, "heads: tokens drafted in a round", minimum=1, maximum=MAX_HEADS)
    speculator_width: int = key(
        -1, "width of the drafter: emb_dim, proj_dim and inner_dim in one; -1: the base's hidden size", minimum=-1, maximum=999_999
    )
    tie_weights: bool = key(True, "one embedding, norm and head for all steps, one projection for all steps after the first")
    scale_input: bool = key(True, "normalise the base's hidden state before the first step")
    emb_dim: int | str = key(-1, 'width of a token\'s embedding, or of its levels: "1024.2048"; -1: speculator_width', minimum=-1)
    proj_dim: int | str = key(-1, "width, or widths of the levels, of the projected state; -1: speculator_width", minimum=-1)
    inner_dim: int | str = key(-1, "width, or widths of the levels, of the state made from their sum; -1: speculator_width", minimum=-1)


class State(NamedTuple):
    """Where a drafter is after some tokens."""

    hidden: Tensor  # [rows, inner_dim], before the first token [rows, hidden]; a head scores it
    cell: Tensor | None = None  # [rows, width], an LSTM's; None before the first token


class ShiftedRMSNorm(nn.Module):
    """RMS norm with a weight and a bias: x / rms(x) * weight + bias, no mean subtracted; of each of `groups` parts of x by itself."""

    def __init__(self, width: int, groups: int = 1):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(groups * width)), nn.Parameter(torch.zeros(groups * width))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._norm(x, self.weight, self.bias)
        # Autograd would keep what is in between, some of it in float32: more than all else that a row leaves behind.
        return checkpoint(self._norm, x, self.weight, self.bias, use_reentrant=False, preserve_rng_state=False)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.groups == 1:
            normed = F.rms_norm(x, weight.shape, eps=NORM_EPS)
        else:
            parts = x.unflatten(-1, (self.groups, -1))
            normed = F.rms_norm(parts, parts.shape[-1:], eps=NORM_EPS).flatten(-2)
        return torch.addcmul(bias, normed, weight)


class GroupedLinear(nn.Linear):
    """`groups` linear maps without bias, one for each part of the input: [..., groups * width_in] -> [..., groups * width_out]."""

    def __init__(self, width_in: int, width_out: int, groups: int):
        super().__init__(width_in, groups * width_out, bias=False)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(x.shape[:-1].numel(), self.groups, self.in_features).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.groups, -1))
        return torch.bmm(parts, weight.mT).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)


def levels(widths: list[int], groups: int = 1) -> list[nn.Module]:
    """From the first width to the last: norm, GELU and a linear map for each level after the first."""
    modules = []
    for width_in, width_out in itertools.pairwise(widths):
        linear = Linear(width_in, width_out, bias=False) if groups == 1 else GroupedLinear(width_in, width_out, groups)
        modules += [ShiftedRMSNorm(width_in, groups), nn.GELU(), linear]
    return modules


def chain(*modules: nn.Module) -> nn.Module:
    """One after the other. A single one is itself: without levels, parameters have the names that other systems give them."""
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def each_step(modules: nn.ModuleList, steps: int) -> tuple[nn.Module, ...]:
    """The module of each step; those past the end share the last one. A tuple: at each use, nn.ModuleList costs as much as an addition."""
    return tuple(modules[min(step, len(modules) - 1)] for step in range(steps))


class RecurrentSpeculator(Speculator):
    """Step i adds token i's embedding to the projected state, makes the next state of the sum, and head i scores it.

    A subclass makes its modules, lists whose last entry serves all later steps, and says how a state advances.

    Args:
        config: its keys.
        base_config: the base's `hidden_size` and `vocab_size`.
        objective: loss and chunk size.

    Attributes:
        width: of the sum: the last of emb_dim and of proj_dim.
        emb_scale: what a token's embedding is multiplied with before it is added.
    """

    drafts_trees = True
    metrics = ("loss", "accuracy", "alpha", "full_accuracy", "reached")
    emb: nn.ModuleList
    proj: nn.ModuleList
    head: nn.ModuleList

    def __init__(self, config: RecurrentConfig, base_config, objective: Objective):
        super().__init__()
        self.steps = config.n_speculator_heads
        self.tied, self.scale_input = config.tie_weights, config.scale_input
        self.hidden_size, self.vocab_size = base_config.hidden_size, base_config.vocab_size
        self.loss, self.chunk_rows = objective.loss, objective.chunk_rows
        self.needs_base_head = needs_teacher(objective.loss)
        width = self.hidden_size if config.speculator_width == -1 else config.speculator_width
        if width < 1:
            raise UserError("speculator.speculator_width = 0; allowed: 1 or more, or -1 for the base's hidden size")
        self.emb_dim, self.proj_dim, self.inner_dim = (_level_widths(name, getattr(config, name), width) for name in WIDTH_KEYS)
        self.width = self.emb_dim[-1]
        if self.proj_dim[-1] != self.width:
            raise UserError(
                f"speculator.emb_dim ends in {self.width} and speculator.proj_dim in {self.proj_dim[-1]}; allowed: the same: they are added"
            )
        # In expectation the first state makes up half of the last one's magnitude.
        state_weight = 0.5 ** (0.5 / self.steps)
        self.emb_scale = math.sqrt((1 - state_weight**2) * self.width / 2) / state_weight

    def inner_levels(self) -> list[nn.Module]:
        """From the width of the sum through those of inner_dim."""
        first = [] if self.inner_dim[0] == self.width else [Linear(self.width, self.inner_dim[0], bias=False)]
        return first + levels(self.inner_dim)

    def advance(self, step: int, state: State, embedded: Tensor) -> State:
        """The state after one more token, whose embedding is [rows, ...] of `emb`."""
        raise NotImplementedError

    def modules_of_step(self, step: int) -> list[nn.Module]:
        """All that a row goes through at a step, but for the head."""
        raise NotImplementedError

    def backbone(self) -> list[tuple[nn.Module, str]]:
        return [(self, "unroll")]

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
        return replace(targets, extra=tuple(torch.unique(targets.state, return_inverse=True)))

    def first_state(self, hidden: Tensor) -> State:
        """[rows, hidden] of the base -> the state that step 0 starts from."""
        return State(F.rms_norm(hidden, hidden.shape[-1:], eps=NORM_EPS) * math.sqrt(0.5) if self.scale_input else hidden)

    def unroll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """States of all steps on known tokens: [rows, hidden], int64 [steps, rows] -> [steps, rows, inner_dim]."""
        # One lookup of a shared embedding, not one a step: its dense gradient is then made once.
        embedded = self.embs[0](tokens) if self.tied else [emb(row) for emb, row in zip(self.embs, tokens)]
        state, outputs = self.first_state(hidden), []
        for step in range(self.steps):
            state = self.advance(step, state, embedded[step])
            outputs.append(state.hidden)
        return torch.stack(outputs)

    def forward(self, batch: TokenBatch, states: BaseStates, targets: Targets, denominators: Tensor, readout: Readout) -> Loss:
        rows, place = targets.extra
        text, final = batch.tokens.flatten(), states.final.flatten(0, 1)
        # Step i takes in token t + 1 + i. Past the end of the batch any token does: no pair there is supervised.
        ahead = torch.arange(1, self.steps + 1, device=rows.device)[:, None]
        hidden = self.unroll(final.index_select(0, rows), text[(rows + ahead).clamp_max(len(text) - 1)]).flatten(0, 1)
        hidden = hidden.index_select(0, targets.step * len(rows) + place)
        row_weights = self.row_weights(targets, denominators)
        target_tokens = text[targets.teacher + 1]

        def loss_of_heads(readout: Readout, hidden: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
            host, counts = targets.host or targets, targets.counts.tolist()
            if self.tied:
                return self._loss_of_head(0, hidden, row_weights, target_tokens, host.teacher, final, readout)
            host_order = torch.argsort(host.step, stable=True)  # rows of a step stay ascending in the teacher's
            by_step = to_device(host_order, hidden.device)
            parts = [
                self._loss_of_head(step, hidden[pairs], row_weights[pairs], target_tokens[pairs], host.teacher[host_pairs], final, readout)
                for step, (pairs, host_pairs) in enumerate(zip(by_step.split(counts), host_order.split(counts)))
            ]
            row_stats = torch.cat([stats for _, stats in parts])
            return torch.stack([total for total, _ in parts]).sum(), torch.empty_like(row_stats).index_copy_(0, by_step, row_stats)

        if not self.needs_base_head:
            total, row_stats = loss_of_heads(readout, hidden, row_weights)
        else:  # the base's head is read, so its unit has to be gathered
            total, row_stats = readout.call(loss_of_heads, hidden, row_weights)
        reached = right_before(row_stats[:, 1], targets, len(text))
        return collect_loss(total, torch.cat([row_stats, reached[:, None]], 1), targets, len(text))

    def _loss_of_head(self, step, hidden, row_weights, target_tokens, teacher_rows, final, readout) -> tuple[Tensor, Tensor]:
        """The fused loss of one distinct head on its rows."""
        teacher = Teacher(final.detach(), readout.head.weight.detach(), teacher_rows) if self.needs_base_head else None
        return fused_linear_loss(
            hidden, self.heads[step].weight, row_weights, loss=self.loss, targets=target_tokens, teacher=teacher, chunk_rows=self.chunk_rows
        )

    def draft(self, cache: None, tokens: Tensor, states: BaseStates, counts: Tensor, readout: Readout, k: int, pick: Pick) -> Draft:
        """A chain of k <= steps tokens a row; the state is rebuilt from the last verified one, so nothing is cached."""
        assert k <= self.steps, f"{k} draft tokens from {self.steps} heads"
        last = last_index(counts)
        token, state = tokens[last], self.first_state(states.final[last])
        drafted, probabilities = [], []
        for step in range(k):
            state = self.advance(step, state, self.embs[step](token))
            token, probability = pick(self.heads[step](state.hidden), step)
            drafted.append(token)
            probabilities.append(probability)
        greedy = probabilities[0] is None
        return Draft(torch.stack(drafted, 1)[:, None], None if greedy else torch.stack(probabilities, 1)[:, None])

    def draft_tree(
        self,
        cache: None,
        tokens: Tensor,
        states: BaseStates,
        counts: Tensor,
        readout: Readout,
        top_k_tokens_per_head: Sequence[int],
        n_candidates: int,
    ) -> Draft:
        """Of all chains that the heads' likeliest tokens make, the n_candidates with the largest probability (fms-extras)."""
        batch, last = len(tokens), last_index(counts)
        token, state = tokens[last], self.first_state(states.final[last])
        chains, scores = token.new_empty(batch, 1, 0), states.final.new_zeros(batch, 1)  # scores: log-probabilities of the chains
        for step, k in enumerate(top_k_tokens_per_head):
            state = self.advance(step, state, self.embs[step](token))
            logits = self.heads[step](state.hidden)
            best, children = logits.topk(k)
            scores = (scores.view(-1, 1) + best - logits.logsumexp(-1, keepdim=True)).view(batch, -1)
            chains = torch.cat([chains.repeat_interleave(k, 1), children.view(batch, -1, 1)], 2)
            token, state = children.flatten(), State(*(part if part is None else part.repeat_interleave(k, 0) for part in state))
        likeliest = scores.topk(n_candidates).indices
        return Draft(chains.take_along_dim(likeliest[..., None], 1), None)

    def flops(self, targets_per_step: list[int], tokens: int) -> int:
        """Forward and backward: each product three times, twice where its input needs no gradient (the base's hidden states)."""
        # A row with a target at a later step goes through all steps before it.
        rows = [max(targets_per_step[step:]) for step in range(self.steps)]
        unrolled = 6 * sum(count * _matrix_elements(self.modules_of_step(step)) for step, count in enumerate(rows))
        first_inputs = 2 * rows[0] * next(self.projs[0].parameters()).numel()
        heads = 6 * sum(targets_per_step) * self.heads[0].weight.numel()
        teacher = 2 * max(targets_per_step) * self.hidden_size * self.vocab_size if self.needs_base_head else 0
        return unrolled - first_inputs + heads + teacher


def _level_widths(name: str, value: int | str, width: int) -> list[int]:
    """[1024, 2048] of "1024.2048", [width] of -1."""
    if value == -1:
        return [width]
    if not WIDTHS.fullmatch(str(value)):
        shown = f'"{value}"' if isinstance(value, str) else value
        raise UserError(
            f"speculator.{name} = {shown}; allowed: a width from 1 to 999999, "
            'several such as "1024.2048" (up to 8), or -1 for speculator_width'
        )
    return [int(level) for level in str(value).split(".")]


def _matrix_elements(modules: list[nn.Module]) -> int:
    """Multiply-adds of a row that goes through them. An embedding is looked up, not multiplied."""
    return sum(module.weight.numel() for part in modules for module in part.modules() if isinstance(module, nn.Linear))
