"""Finds and reads checkpoints, of this run or another."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from spectitan import heartbeat
from spectitan.errors import UserError
from spectitan.files import to_path
from spectitan.training.checkpoint_files import MANIFEST, find_problem, read_json, step_folders
from spectitan.training.restricted_metadata import RestrictedReader

logger = logging.getLogger(__name__)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """A valid checkpoint from what a user names: one checkpoint, a folder of them, or a run's dump_folder (the newest).

    Of this process alone: no other rank takes part.

    Raises:
        UserError: nothing there, or nothing valid.
    """
    path = to_path(path).expanduser()
    if (path / MANIFEST).is_file():
        problem = find_problem(path)
        if problem is not None:
            raise UserError(f"{path}: broken checkpoint: {problem}")
        return path
    for folder in (path, path / "checkpoints"):
        broken = 0
        for candidate in reversed(step_folders(folder)):
            problem = find_problem(candidate)
            if problem is None:
                return candidate
            logger.warning("checkpoint %s is broken (%s), trying the one before", candidate, problem)
            broken += 1
        if broken:
            raise UserError(f"{folder}: all {broken} checkpoints are broken")
    raise UserError(f"{path}: no checkpoint here: give a step-NNNNNNNN folder, a folder of them, or a dump_folder")


def read_state(path: str | os.PathLike) -> dict:
    """A checkpoint's JSON state, without its tensors."""
    return read_json(to_path(path) / "state.json")


def read_tensors(path: str | os.PathLike, prefix: str = "") -> dict[str, Tensor]:
    """Full tensors on the CPU, of all names that begin with `prefix`, without it. Needs no process group.

    Args:
        path: a step folder that `find_checkpoint` or `Checkpointer.newest_valid` has verified.
    """
    path = to_path(path)
    entries = RestrictedReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items() if name.startswith(prefix)}
    if tensors:
        read_in_place(path, tensors, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        heartbeat.beat()
        return super().resolve_tensor(read_item)


def read_in_place(path: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    """Reads a verified checkpoint into tensors, DTensors each rank its part.

    Args:
        alone: no other rank takes part.
    """
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _no_warning_about_one_process():
            dcp.load(tensors, storage_reader=RestrictedReader(path), planner=planner, no_dist=alone or not dist.is_initialized())
    except CheckpointException as failure:
        raise UserError(f"{path}: tensors cannot be read: {_cause(failure)}") from failure


def _cause(failure: CheckpointException) -> Exception:
    """The first rank's error. A stop signal, which torch.distributed.checkpoint catches like an error, is raised again."""
    error = next(error for error, _ in failure.failures.values())
    if not isinstance(error, Exception):
        raise error from None
    return error


@contextlib.contextmanager
def _no_warning_about_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises UserError unless a checkpoint holds all of these tensors, in these shapes, and no others."""
    entries = RestrictedReader(path).read_metadata().state_dict_metadata

    def names(given: Iterable[str]) -> str:
        given = sorted(given)
        return ", ".join(given[:3]) + (f" and {len(given) - 3} more" if len(given) > 3 else "")

    if missing := tensors.keys() - entries.keys():
        raise UserError(f"{path}: lacks tensors of this model: {names(missing)}")
    if unknown := entries.keys() - tensors.keys():
        raise UserError(f"{path}: has tensors that this model lacks: {names(unknown)}")
    for name, tensor in tensors.items():
        saved, dtype = entries[name].size, entries[name].properties.dtype
        if saved != tensor.shape:
            raise UserError(f"{path}: {name} has shape {list(saved)}, this model's is {list(tensor.shape)}")
        if dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise UserError(f"{path}: {name} is {dtype}, this model's is {tensor.dtype}")
