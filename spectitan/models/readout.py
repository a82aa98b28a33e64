"""The two ends of a base model: what drafters, objectives and decoding use of it."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from spectitan.models.layers import Linear

Result = TypeVar("Result")


class Readout(nn.Module):
    """Embedding, final norm and output head. One FSDP unit, so that embedding and head can be tied.

    FSDP gathers its parameters around `call`, the one method to register with `register_fsdp_forward_method`. A function
    given to `call` uses `embedding`, `norm` and `head` directly, never `call` again. FSDP also needs the base's forward to
    come before the first use from outside.

    Args:
        vocab_size, hidden_size: shape.
        norm_eps: epsilon of the final norm.
        tied: head and embedding are one parameter.
        norm: class of the final norm, nn.RMSNorm or nn.LayerNorm.

    Attributes:
        plain_head: logits are the product with head.weight and nothing else, as fused losses take for granted.
    """

    plain_head = True

    def __init__(self, vocab_size: int, hidden_size: int, norm_eps: float, tied: bool, norm: type[nn.Module] = nn.RMSNorm):
        super().__init__()
        self.tied = tied
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.norm = norm(hidden_size, eps=norm_eps)
        self.head = Linear(hidden_size, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable, recurse: bool = True) -> "Readout":
        """Module.to_empty and others make each parameter anew; tied ones must stay one."""
        super()._apply(fn, recurse)
        if self.tied:
            self.head.weight = self.embedding.weight
        return self

    def drop_head(self) -> None:
        """For a run that asks for no logits: a head of its own is as large as the embedding. To be called before weights are read."""
        if not self.tied:
            self.head = None

    def call(self, fn: Callable[..., Result], *args) -> Result:
        """fn(self, *args), with the full parameters at hand. Tensors that need a gradient must be among args."""
        return fn(self, *args)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., hidden]."""
        return self.call(_embed, tokens)

    def final(self, hidden: Tensor) -> Tensor:
        """The final norm: [..., hidden] before it -> [..., hidden] after it."""
        return self.call(_final, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] after the final norm -> [..., vocab]."""
        return self.call(_logits, hidden)


def _embed(readout: Readout, tokens: Tensor) -> Tensor:
    return readout.embedding(tokens)


def _final(readout: Readout, hidden: Tensor) -> Tensor:
    return readout.norm(hidden)


def _logits(readout: Readout, hidden: Tensor) -> Tensor:
    return readout.head(hidden)
