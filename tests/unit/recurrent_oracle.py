"""The recurrent drafters written down from their definitions, one row at a time, with no function of spectitan."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

GATES = ("forget", "input", "output", "cell")


def widths(value: int | str, width: int) -> list[int]:
    return [width] if value == -1 else [int(part) for part in str(value).split(".")]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-6).sqrt()


class Chain:
    """Modules of one name, one after the other; alone, a module has no number in its parameters' names.

    Args:
        part: takes a gate's own share of each tensor.
    """

    def __init__(self, weights: dict[str, Tensor], prefix: str, part: Callable[[Tensor], Tensor] = lambda tensor: tensor):
        self.weights, self.prefix, self.part, self.place = weights, prefix, part, 0

    def next(self, name: str = "weight") -> Tensor:
        alone = f"{self.prefix}.{name}"
        return self.part(self.weights[alone if alone in self.weights else f"{self.prefix}.{self.place}.{name}"])

    def norm(self, x: Tensor) -> Tensor:
        x = rms(x) * self.next("weight") + self.next("bias")
        self.place += 1
        return x

    def linear(self, x: Tensor) -> Tensor:
        x = self.next() @ x
        self.place += 1
        return x

    def lookup(self, token: int, part: Callable[[Tensor], Tensor]) -> Tensor:
        alone = f"{self.prefix}.weight"
        x = part(self.weights[alone if alone in self.weights else f"{self.prefix}.0.weight"][token])
        self.place += 1
        return x

    def levels(self, x: Tensor, count: int) -> Tensor:
        """norm, GELU, linear for each level after the first."""
        for _ in range(count - 1):
            x = gelu(self.norm(x))
            self.place += 1  # the GELU
            x = self.linear(x)
        return x


def transcribed_logits(keys, weights: dict[str, Tensor], hidden: Tensor, tokens: list[int]) -> list[Tensor]:
    """Logits of all heads for one base state [hidden] and the tokens after it.

    Args:
        keys: an MlpConfig or LstmConfig.
        weights: the speculator's parameters.
    """
    emb_dim, proj_dim, inner_dim = (widths(dim, keys.speculator_width) for dim in (keys.emb_dim, keys.proj_dim, keys.inner_dim))
    total_width = emb_dim[-1]
    state_weight = 0.5 ** (0.5 / keys.n_speculator_heads)
    alpha = math.sqrt((1 - state_weight**2) * total_width / 2) / state_weight
    state, cell, logits = rms(hidden) / math.sqrt(2) if keys.scale_input else hidden, 0.0, []
    lstm = hasattr(keys, "tie_lstm_embs")

    def bridge_and_levels(chain: Chain, x: Tensor) -> Tensor:
        return chain.levels(x if inner_dim[0] == total_width else chain.linear(x), len(inner_dim))

    for i, token in enumerate(tokens):
        shared, proj = (0, min(i, 1)) if keys.tie_weights else (i, i)
        if lstm:
            gates = {}
            for number, gate in enumerate(GATES):

                def own(tensor: Tensor, number=number) -> Tensor:
                    return tensor.chunk(4)[number]

                both = (lambda tensor: tensor) if keys.tie_lstm_embs else own
                embedding, projection = Chain(weights, f"emb.{shared}", both), Chain(weights, f"proj.{proj}", own)
                embedded = embedding.levels(embedding.lookup(token, both), len(emb_dim))
                gates[gate] = projection.levels(projection.linear(state), len(proj_dim)) + alpha * embedded
            candidate = gelu(Chain(weights, "cell_ln").norm(gates["cell"]))
            cell = cell * gates["forget"].sigmoid() + gates["input"].sigmoid() * candidate
            state = gelu(Chain(weights, "state_ln").norm(cell)) * gates["output"].sigmoid()
            state = bridge_and_levels(Chain(weights, "inner"), state)
        else:
            embedding, projection, inner = (Chain(weights, name) for name in (f"emb.{shared}", f"proj.{proj}", f"ln.{shared}"))
            embedded = embedding.levels(embedding.lookup(token, lambda row: row), len(emb_dim))
            x = projection.levels(projection.linear(state), len(proj_dim)) + alpha * embedded
            state = gelu(inner.norm(bridge_and_levels(inner, x)))
        logits.append(weights[f"head.{shared}.weight"] @ state)
    return logits
