"""Samples of speculators' older data generation: *.pt, a dictionary with input_ids and loss_mask, and hidden states beside them."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spectitan.data.documents.rows import Kind, Row
from spectitan.errors import UserError


def rows(path: Path, kinds: list[Kind]) -> Iterator[Row]:
    """The one row of a file. Its hidden states are not read."""
    content = load_pt(path)
    columns = {name: value.flatten().numpy() for name, value in content.items() if isinstance(value, Tensor) and _is_integer(value)}
    yield Row(1, path.stat().st_size, lambda: columns)


def load_pt(path: Path) -> dict:
    """A dictionary of tensors, memory-mapped.

    Raises:
        UserError: a damaged file, or one that holds code or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: it holds objects, and a pickle can run code; allowed: tensors and lists of them") from None
    except Exception as error:  # a damaged archive can fail in any way
        raise UserError(f"{path}: truncated, damaged, or no file of torch.save: {str(error).split('. ')[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__}; allowed: a dictionary of tensors")
    return content


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or not (tensor.is_floating_point() or tensor.is_complex())
