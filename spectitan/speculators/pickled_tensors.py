"""pytorch_model.bin, a file of tensors in PyTorch's own format, read without running what it says."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from spectitan.errors import UserError

PICKLE = "pytorch_model.bin"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def write_pickled(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a dictionary of tensors; one that has several names is stored once. The same tensors give the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # which says nothing of the disk
        raise OSError(f"{PICKLE} cannot be written; is the disk full? ({str(error).splitlines()[0]})") from None


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, memory-mapped: only what is taken from them is read.

    Raises:
        UserError: a damaged file, code or objects beside tensors, or tensors that are not plain floating-point ones.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        beside = f"it names {named[1]}" if named else "it holds objects"
        raise UserError(f"{file}: {beside}, and a pickle can run code; allowed: a dictionary of tensors and nothing else") from None
    except Exception as error:  # a damaged archive can fail in any way
        raise UserError(f"{file}: truncated, damaged, or no file of torch.save: {str(error).split('. ')[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()):
        raise UserError(f"{file}: a dictionary from names to tensors is expected, and nothing else")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _FLOATS:
            found = f"{tensor.layout}, {tensor.dtype} on {tensor.device}".replace("torch.", "")
            raise UserError(f"{file}: {name} is {found}; allowed: plain tensors of float64, float32, float16 or bfloat16")
    return dict(tensors)
