"""Which tensors of a checkpoint in Hugging Face layout hold which parameters of ours."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectitan.models.decoder import Decoder


class Piece(NamedTuple):
    """A parameter, or one index of its first dimension, as rows of a stored tensor."""

    stored: str  # name of the tensor
    rows: slice  # of it
    index: int | None  # of the parameter; None: all of it


class HFLayout:
    """Of a model on any device, sharded or not; made from shapes alone.

    Attributes:
        pieces: parameter -> where it is; several pieces are its indices in order.
        shapes: stored tensor -> its shape, in the order of the parameters.
    """

    def __init__(self, model: Decoder):
        self.pieces: dict[str, list[Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in model.named_parameters():
            stored, shape = model.hf_names(name), tuple(parameter.shape)
            if len(stored) == 1:
                self.pieces[name] = [self._append(stored[0], shape, None)]
            else:
                assert len(stored) == shape[0]
                self.pieces[name] = [self._append(each, shape[1:], index) for index, each in enumerate(stored)]

    def _append(self, stored: str, shape: tuple[int, ...], index: int | None) -> Piece:
        start = self.shapes[stored][0] if stored in self.shapes else 0
        self.shapes[stored] = (start + shape[0], *shape[1:])
        return Piece(stored, slice(start, start + shape[0]), index)

    def parts(self, name: str, local: Tensor, place: tuple[slice, ...]) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        """What a rank reads to fill its part of a parameter: name and place of stored numbers, and the memory they go to.

        Args:
            local, place: as `own_part` gives them.
        """
        if not local.numel():
            return
        first, *others = place
        for stored, rows, index in self.pieces[name]:
            if index is None:
                yield stored, (slice(rows.start + first.start, rows.start + first.stop), *others), local
            elif first.start <= index < first.stop:
                yield stored, tuple(others), local[index - first.start]

    def stored_tensors(self, model: Decoder) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor, made of the parameters, which are gathered one at a time. Every rank calls it."""
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            full = parameter.detach()
            full = full.full_tensor() if isinstance(full, DTensor) else full
            for stored, _, index in self.pieces[name]:
                parts.setdefault(stored, []).append(full if index is None else full[index])
                if sum(map(len, parts[stored])) == self.shapes[stored][0]:
                    whole = parts.pop(stored)
                    yield stored, whole[0] if len(whole) == 1 else torch.cat(whole)
