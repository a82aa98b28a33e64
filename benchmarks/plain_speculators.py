"""Speculators as most trainers have them, written down as their formula is: what benchmarks compare a training step with."""

import math

import torch
import torch.nn.functional as F
from small_run import Setup  # a neighbour: this folder is where Python looks first
from torch import Tensor, nn


class PlainSpeculator(nn.Module):
    """A tied speculator, written down as its formula is: logits of every step on every row. A subclass says how a state advances."""

    gates = 1

    def __init__(self, setup: Setup):
        super().__init__()
        self.steps = setup.heads
        state_weight = 0.5 ** (0.5 / self.steps)
        self.alpha = math.sqrt((1 - state_weight**2) * setup.width / 2) / state_weight
        self.embedding = nn.Embedding(setup.vocab_size, setup.width)
        self.first, self.later = (
            nn.ModuleList(nn.Linear(size, setup.width, bias=False) for _ in range(self.gates)) for size in (setup.hidden_size, setup.width)
        )
        self.norm_weight, self.norm_bias = (
            nn.ParameterList(fill(setup.width) for _ in range(min(self.gates, 2))) for fill in (torch.ones, torch.zeros)
        )
        self.head = nn.Linear(setup.width, setup.vocab_size, bias=False)

    def rms(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def norm(self, x: Tensor, which: int) -> Tensor:
        return self.rms(x) * self.norm_weight[which] + self.norm_bias[which]

    def advance(self, sums: list[Tensor], cell: Tensor | float) -> tuple[Tensor, Tensor | float]:
        return F.gelu(self.norm(sums[0], 0)), cell

    def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
        """[batch, rows, hidden], int64 [batch, rows + steps - 1] -> [steps, batch, rows, vocab]."""
        rows, logits, cell = state.shape[1], [], 0.0
        state = self.rms(state) / math.sqrt(2)
        for step in range(self.steps):
            embedded = self.alpha * self.embedding(tokens[:, step : step + rows])
            state, cell = self.advance([gate(state) + embedded for gate in (self.later if step else self.first)], cell)
            logits.append(self.head(state))
        return torch.stack(logits)


class PlainLstm(PlainSpeculator):
    gates = 4

    def advance(self, sums: list[Tensor], cell: Tensor | float) -> tuple[Tensor, Tensor | float]:
        forget, input, output = (gate.sigmoid() for gate in sums[:3])
        cell = cell * forget + F.gelu(self.norm(sums[3], 0)) * input
        return F.gelu(self.norm(cell, 1)) * output, cell


PLAIN = {"mlp": PlainSpeculator, "lstm": PlainLstm}
