"""Safetensors folders, checked before any tensor is read.

Only safetensors: pickled checkpoints can run code. Every mistake is a UserError of one line that names the file.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectitan.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1}
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def locate_tensors(folder: Path, shapes: dict[str, tuple[int, ...]], ignored: set[str]) -> dict[str, Path]:
    """The file of every tensor of a model, all files checked.

    Args:
        folder: holds model.safetensors, or an index and its shards.
        shapes: name -> shape of what must be there, and nothing else may be but `ignored` and old rotary tables.

    Raises:
        UserError: a damaged file, a pickled checkpoint, a path that leaves the folder, missing or extra tensors, a wrong
            shape or dtype.
    """
    located = list_tensors(folder)
    where = folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)
    check_tensors(where, {name: shape for name, (_, shape) in located.items()}, shapes, ignored)
    return {name: located[name][0] for name in shapes}


def list_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Name -> file and shape of every tensor of a folder, all files checked. Raises as `locate_tensors`."""
    promised = _read_index(folder)
    located = {}
    for file in weight_files(folder):
        for name, shape in read_header(file).items():
            if promised is not None and promised.get(name) != file:
                raise UserError(f"{file}: tensor {name} is not what {INDEX} says of this file")
            located[name] = file, shape
    return located


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors, unopened. Raises as `locate_tensors`."""
    promised = _read_index(folder)
    return sorted({folder / SINGLE} if promised is None else set(promised.values()))


def check_tensors(where: Path, found: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
    """Refuses missing and extra tensors and wrong shapes of what stands in `where`. Raises as `locate_tensors`."""
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors that config.json asks for are missing: {_some(missing)}")
    extra = sorted(name for name in found.keys() - shapes.keys() - ignored if not name.endswith(".rotary_emb.inv_freq"))
    if extra:
        raise UserError(f"{where}: {len(extra)} tensors that config.json does not know: {_some(extra)}")
    for name, shape in shapes.items():
        if found[name] != shape:
            raise UserError(f"{where}: {name} is {list(found[name])}, config.json asks for {list(shape)}")


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[safe_open]:
    """A checked file, memory-mapped: only what is taken from it is read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{file}: not a valid safetensors file: {error}") from None


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Raises OSError if the disk is full."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a file whose header fits the file."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(
                f"{file}: a header of {header_bytes} bytes in a file of {size}: truncated, or no safetensors file; "
                f"allowed: at most {_MAX_HEADER_BYTES}, inside the file"
            )
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            entries = {name: _check_entry(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: the safetensors header is damaged: {error}") from None
    stored = size - 8 - header_bytes
    promised = max((end for _, end in entries.values()), default=0)
    if promised != stored:
        raise UserError(f"{file}: truncated or damaged: {stored} bytes of tensors, the header says {promised}")
    return {name: shape for name, (shape, _) in entries.items()}


def _check_entry(entry: dict) -> tuple[tuple[int, ...], int]:
    """Shape, and the offset at which the tensor ends."""
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"dtype {dtype}, allowed: {', '.join(_ITEM_BYTES)}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"shape {list(shape)}, offsets {[start, end]}")
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"shape {list(shape)} of {dtype} does not fit {end - start} bytes")
    return shape, end


def _read_index(folder: Path) -> dict[str, Path] | None:
    """Tensor name -> file as the index says; None if the weights are one file."""
    file = folder / INDEX
    if (folder / SINGLE).is_file():
        return None
    if not file.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        reason = f"{pickles[0]} is a pickle, which can run code, and is not read; allowed" if pickles else "no weights; expected"
        raise UserError(f"{folder}: {reason}: {SINGLE}, or {INDEX} and its shards")
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        names = {name: str(PurePosixPath(path)) for name, path in weight_map.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f'{file}: {{"weight_map": {{tensor: file}}}} is expected: {type(error).__name__}: {error}') from None
    for path in names.values():
        if PureWindowsPath(path).anchor or path.startswith("/") or ".." in PureWindowsPath(path).parts:
            raise UserError(f"{file}: {path!r} leaves the folder; allowed: files inside it")
        if not path.endswith(".safetensors"):
            raise UserError(f"{file}: {path!r} is no safetensors file; only those are read")
    return {name: folder / path for name, path in names.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
