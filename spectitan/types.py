"""The records that cross package boundaries. NamedTuples, but for Targets: FSDP2 hooks and torch.compile see the tensors inside."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for a copy, as it would have to from pageable memory."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


class TokenBatch(NamedTuple):
    """One micro-batch of one rank, made on the CPU. The tokens alone may be on the device, where the base has sampled them."""

    tokens: Tensor  # int64 [batch, seq]
    loss_mask: Tensor  # bool [batch, seq]; True: this token may be a target
    document_ids: Tensor  # int64 [batch, seq]; unique in the batch, -1 is padding, at the end; positions restart with each document
    index: Tensor  # int64 [batch]; place in the global order of samples: the key of all randomness, and the audit
    sample_ids: Tensor  # int64 [batch]; (dataset << 40) + sample, the same in every epoch: the key of cached hidden states
    state_mask: Tensor | None = None  # bool [batch, seq]; False: no drafter starts from this row; None: from every row

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(*(tensor if tensor is None else to_device(tensor, device) for tensor in self))


class BaseStates(NamedTuple):
    """Hidden states of the base."""

    final: Tensor  # [batch, seq, hidden], after the final norm
    taps: tuple[Tensor, ...] = ()  # each [batch, seq, hidden], by ascending layer id; id k enters layer k, id num_layers is pre-norm

    def detach(self) -> "BaseStates":
        return BaseStates(self.final.detach(), tuple(tap.detach() for tap in self.taps))


@dataclass(frozen=True, eq=False)
class Targets:
    """The N supervised (state row, step) pairs of a batch, sorted by teacher row. Rows count over batch * seq.

    No tuple: on a GPU, FSDP2 moves every tensor that it finds in the tuples given to a forward, and these belong on the host in part.
    """

    teacher: Tensor  # int64 [N]; the base's logits here predict the target; target token = tokens.flatten()[teacher + 1]
    state: Tensor  # int64 [N]; the row whose hidden state the drafter starts from
    step: Tensor  # int64 [N]; 0 .. steps - 1
    counts: Tensor  # int64 [steps]; pairs of each step
    extra: tuple[Tensor, ...] = ()  # a family's own
    host: "Targets | None" = None  # these before `to` moved them: an objective plans by them without waiting for the device

    def to(self, device: torch.device) -> "Targets":
        """Moves the rows; the counts stay on the host, where they are summed over ranks."""
        teacher, state, step, *extra = (to_device(tensor, device) for tensor in (self.teacher, self.state, self.step, *self.extra))
        return Targets(teacher, state, step, self.counts, tuple(extra), host=self)


class Loss(NamedTuple):
    """What a training forward returns. Ranks and micro-batches add up: `total` is normalised by global counts."""

    total: Tensor  # float32 (float64 when computing in float64) []
    sums: Tensor  # float32 or float64 [steps, columns]: loss, correct, alpha, right at all steps so far, then a family's own
    counts: Tensor  # int64 [steps]


def add_conditional(means: dict[str, list[float]]) -> dict[str, list[float]]:
    """Means of Loss.sums by name and step, and where a family counts `reached`: cond_accuracy, right among those right so far."""
    if "reached" not in means:
        return means
    pairs = zip(means["full_accuracy"], means["reached"])
    return means | {"cond_accuracy": [right / reached if reached else 0.0 for right, reached in pairs]}


class Draft(NamedTuple):
    """Tokens proposed for verification, on the base's vocabulary."""

    tokens: Tensor  # int64 [batch, candidates, k]; one candidate is a chain
    probabilities: Tensor | None  # float32 [batch, candidates, k, vocab] they were drawn from; None when greedy


class StateSource(Protocol):
    """Where the base's hidden states come from."""

    def begin(self, batch: TokenBatch) -> TokenBatch:
        """Settles what will be trained on, before anything is counted; may start input or output."""

    def states(self, batch: TokenBatch) -> BaseStates:
        """The states of a batch that `begin` returned; without gradient exactly if the base is frozen."""
