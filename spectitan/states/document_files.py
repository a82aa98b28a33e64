"""Hidden states that other systems have written: a file a document, as they are.

    hs      hs_<i>.safetensors of vLLM's speculators: hidden_states [s, layers + 1, d], token_ids [s]; i is the row of its dataset
    1       speculators before: *.pt, {input_ids, loss_mask, hidden_states: list of [s, d]}
    0       and before that: *.pt, {input_ids, loss_mask, hidden_state [s, layers * d], target [s, d]}

Layers ascend. The last state of hs and 1 is the base's before its final norm; `target` of 0 is after it. Files do not say of which
base and layers they are: their shapes are checked, and whether what stands for the final state has been normed.
"""

import hashlib
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spectitan.data.documents.pt import load_pt
from spectitan.data.packing import PackedDataset
from spectitan.errors import UserError
from spectitan.models.layers import whole
from spectitan.models.safetensors_files import open_tensors, read_header
from spectitan.states.cache import FINAL
from spectitan.states.precision import Stored, first_bad

logger = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NORMED_WITHIN = 0.05  # root mean square of normed states, the norm's weight divided out, is 1: bfloat16 leaves it within 0.001
_TOKENS_LOOKED_AT = 16


class Part(NamedTuple):
    """What a sample takes of a document."""

    file: Path
    start: int  # token of the document
    length: int


class _Format(NamedTuple):
    pattern: str
    normed: bool  # the final state
    ids: Callable[[Path], tuple[Tensor, int | None]]  # token ids, and states of a token where a file's header says it
    states: Callable[[Path], "_States"]


class _States(NamedTuple):
    """The states of a file, mapped."""

    slots: int  # states of a token
    hidden_size: int
    read: Callable[[int, slice], Tensor]  # (slot, tokens) -> [tokens, hidden]


class DocumentFiles:
    """Reads a folder of such files, and its sub-folders. See Store.

    A document's file is the one with its token ids, wherever it stands in the dataset; of a document that is cut, or shares a sample
    with others, its own states are taken.

    Args:
        folder: has files of the format.
        format: hs, 1 or 0.
        final: pre_norm or post_norm; auto: as the format has it.
        taps: layer ids that are read; none: the files' other layers may be any.
        num_layers, hidden_size: of the base.

    Attributes:
        remedy: see Store.
        rows_of: the dataset whose rows the numbers in hs_<i> count, where it is known: a run's only one.

    Raises:
        UserError: no file of the format; a file of other shapes, damaged, or without token ids.
    """

    remedy = "the files that were made of data.path"

    def __init__(self, folder: Path, format: str, final: str, taps: tuple[int, ...], num_layers: int, hidden_size: int):
        self.folder, self._format, self.hidden_size, self._num_layers = folder, FORMATS[format], hidden_size, num_layers
        self.normed = self._format.normed if final == "auto" else final == "post_norm"
        files = sorted(folder.rglob(self._format.pattern))
        if not files:
            raise UserError(f"states.hidden_states_path = {str(folder)!r}: no {self._format.pattern} in it (states.format = {format})")
        with ThreadPoolExecutor(4) as pool:
            hashes, slots = zip(*pool.map(self._hash_of, files))
        self._files = dict(zip(hashes, files))
        self._by_row = {int(match[1]): file for file in files if format == "hs" and (match := re.search(r"hs_(\d+)\.", file.name))}
        first = self._format.states(files[0])
        self.dtype = first.read(0, slice(0, 1)).dtype
        self.columns = self._columns(files[0], first, taps)
        self._check(files[0], first)
        for file, count in zip(files, slots):
            if count is not None:
                self._check_slots(file, count)
        self.rows_of: PackedDataset | None = None

    def __len__(self) -> int:
        """Documents."""
        return len(self._files)

    def _columns(self, file: Path, states: _States, taps: tuple[int, ...]) -> tuple[int, ...]:
        last = FINAL if self.normed else self._num_layers
        columns = (*(tap for tap in taps if tap != last), last)
        if not taps:  # whatever they are
            columns = (*range(-1 - states.slots, -2), last)
        if states.slots != len(columns):
            reads = f"the speculator reads layers {list(taps)} and the final state, {len(columns)}"
            raise UserError(f"{file}: {states.slots} states a token; {reads}; allowed: as many, by speculator.target_layer_ids")
        return columns

    def _check_slots(self, file: Path, slots: int) -> None:
        if slots != len(self.columns):
            raise UserError(f"{file}: {slots} states a token; other files have {len(self.columns)}; allowed: as many in all files")

    def _check(self, file: Path, states: _States) -> None:
        self._check_slots(file, states.slots)
        dtype = states.read(0, slice(0, 1)).dtype
        if states.hidden_size != self.hidden_size:
            raise UserError(f"{file}: hidden size {states.hidden_size}; the base's is {self.hidden_size}")
        if dtype not in _FLOATS or dtype != self.dtype:
            raise UserError(
                f"{file}: states of {dtype}; allowed: float32, bfloat16 or float16, one of them in all files".replace("torch.", "")
            )

    def check_norm(self, norm: nn.Module) -> None:
        """Refuses final states that are said to be before the base's final norm and are after it, or the other way round.

        All ranks call it together.
        """
        file = next(iter(self._files.values()))
        states = self._format.states(file)
        final = states.read(states.slots - 1, slice(0, _TOKENS_LOOKED_AT)).float()
        weight = whole(norm.weight).float().cpu()
        if getattr(norm, "bias", None) is not None:
            final = final - whole(norm.bias).float().cpu()
        large = weight.abs() > 0.01 * weight.abs().max()
        size = (final[:, large] / weight[large]).square().mean(-1).sqrt()
        looks_normed = bool(((size - 1).abs() < _NORMED_WITHIN).all())
        if looks_normed != self.normed:
            said, is_ = ("pre_norm", "after") if looks_normed else ("post_norm", "before")
            other = "post_norm" if looks_normed else "pre_norm"
            raise UserError(
                f"{file}: its final states are {is_} the base's final norm, and are read as {said}; allowed: states.final = {other}"
            )

    # ---- a store ----

    @property
    def texts(self) -> list[dict]:
        return []

    def refresh(self) -> None:
        """Nothing is added."""

    def find(self, dataset: PackedDataset, sample: int) -> list[Part] | None:
        parts = []
        for document in dataset.documents(sample):
            file = self._files.get(_hash(document.ids))
            if file is None:
                if dataset is self.rows_of:
                    self._check_row(document)
                return None
            parts.append(Part(file, document.start, document.length))
        return parts

    def _check_row(self, document) -> None:
        """Where each row of the dataset is a document, the file of a row has its token ids."""
        file = self._by_row.get(document.row) if document.row is not None else None
        if file is not None:
            raise UserError(f"{file}: other token_ids than row {document.row} of the dataset has; allowed: {self.remedy}")

    def read(self, place: list[Part], tokens: np.ndarray, documents: np.ndarray, taken: list[int], row: int, into: Stored) -> None:
        at = 0
        for part in place:
            states = self._format.states(part.file)
            self._check(part.file, states)
            target = into.numbers[:, row, at : at + part.length]
            for index, slot in enumerate(taken):
                target[index].copy_(states.read(slot, slice(part.start, part.start + part.length)))
            bad = first_bad(Stored(target, None))
            if bad is not None:
                raise UserError(f"{part.file}: row {part.start + bad[1]} of state {taken[bad[0]]} is not finite; allowed: remove the file")
            at += part.length

    def _hash_of(self, file: Path) -> tuple[bytes, int | None]:
        ids, slots = self._format.ids(file)
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1 or not len(ids):
            raise UserError(f"{file}: token ids are {list(ids.shape)} of {ids.dtype}; allowed: a list of integers".replace("torch.", ""))
        return _hash(ids.numpy()), slots


def _hash(ids: np.ndarray) -> bytes:
    return hashlib.sha256(ids.astype(np.int64)).digest()


# ---- hs_<i>.safetensors ----


def _hs_ids(file: Path) -> tuple[Tensor, int]:
    shapes = read_header(file)
    if shapes.keys() != {"hidden_states", "token_ids"} or len(shapes["hidden_states"]) != 3:
        raise UserError(f"{file}: tensors {shapes}; allowed: hidden_states [s, layers + 1, d] and token_ids [s]")
    if shapes["token_ids"] != shapes["hidden_states"][:1]:
        raise UserError(f"{file}: {shapes['hidden_states'][0]} states and {list(shapes['token_ids'])} token_ids; allowed: as many")
    with open_tensors(file) as tensors:
        return tensors.get_tensor("token_ids"), shapes["hidden_states"][1]


def _hs_states(file: Path) -> _States:
    with open_tensors(file) as tensors:
        states = tensors.get_slice("hidden_states")
    _, slots, hidden_size = states.get_shape()
    return _States(slots, hidden_size, lambda slot, tokens: states[tokens, slot])


# ---- *.pt ----


def _pt_ids(file: Path, content: dict) -> Tensor:
    if not isinstance(content.get("input_ids"), Tensor):
        raise UserError(f"{file}: no tensor input_ids; its keys: {', '.join(map(str, content))}")
    return content["input_ids"].flatten()


def _pt_1(file: Path) -> _States:
    content = load_pt(file)
    return _of_list(file, content, content.get("hidden_states"), "hidden_states: a list of [s, d], states.format = 1")


def _pt_0(file: Path) -> _States:
    content, expected = load_pt(file), "hidden_state [s, layers * d] and target [s, d], states.format = 0"
    states, target = (content.get(name) for name in ("hidden_state", "target"))
    if not isinstance(states, Tensor) or not isinstance(target, Tensor) or states.shape[-1] % target.shape[-1]:
        raise UserError(f"{file}: its keys: {', '.join(map(str, content))}; allowed: {expected}")
    return _of_list(file, content, [*states.split(target.shape[-1], -1), target], expected)


def _of_list(file: Path, content: dict, states: list, expected: str) -> _States:
    """States [s, d], or [1, s, d], of each slot."""
    ids = _pt_ids(file, content)
    if not isinstance(states, list) or not states or not all(isinstance(state, Tensor) for state in states):
        raise UserError(f"{file}: allowed: {expected}")
    states = [state.squeeze(0) if state.dim() == 3 else state for state in states]
    if len({(state.shape, state.dtype) for state in states}) > 1 or states[0].dim() != 2 or len(states[0]) != len(ids):
        raise UserError(f"{file}: {len(ids)} input_ids, states {[list(state.shape) for state in states]}; allowed: {expected}, s as many")
    return _States(len(states), states[0].shape[1], lambda slot, tokens: states[slot][tokens])


FORMATS = {
    "hs": _Format("hs_*.safetensors", False, _hs_ids, _hs_states),
    "1": _Format("*.pt", False, lambda file: (_pt_ids(file, load_pt(file)), None), _pt_1),
    "0": _Format("*.pt", True, lambda file: (_pt_ids(file, load_pt(file)), None), _pt_0),
}


def find_format(folder: Path) -> str:
    """The format of a folder's files: cache (ours), hs, 1 or 0."""
    if (folder / "meta.json").exists():
        return "cache"
    if next(folder.rglob(FORMATS["hs"].pattern), None):
        return "hs"
    file = next(folder.rglob(FORMATS["1"].pattern), None)
    if file is None:
        return "cache"
    return "0" if "hidden_state" in load_pt(file) else "1"
