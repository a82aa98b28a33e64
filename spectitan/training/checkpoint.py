"""Checkpoints: tensors by torch.distributed.checkpoint, all else as JSON, each folder whole or not there.

    checkpoints/step-00001000/   __0_0.distcp ...   tensors, one file a rank
                                 .metadata          which tensor lies where
                                 state.json         the rest: step, position in the data, configuration
                                 manifest.json      size and BLAKE2b hash of each of these files

A checkpoint is written under a temporary name and renamed when every rank's files are on the disk. Where the folder is a URL, on a
file system that may not know renaming, manifest.json makes a checkpoint: it is written last, and removed first. Tensors may be
DTensors: a checkpoint of any number of ranks is read on any other number.
"""

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from spectitan import heartbeat
from spectitan.config.sections import Checkpoint as CheckpointKeys
from spectitan.distributed import utils
from spectitan.errors import UserError
from spectitan.files import is_remote, remove_folder, sync, to_path
from spectitan.training.checkpoint_files import MANIFEST, describe, find_problem, read_json, step_folders, step_of, write_json
from spectitan.training.checkpoint_writing import Background, TensorWriter
from spectitan.training.restricted_metadata import RestrictedReader

logger = logging.getLogger(__name__)

_SAVING, _REPLACED = ".saving-", ".replaced-"  # prefixes of folders in transit


class _Pending(NamedTuple):
    """A checkpoint that has been begun."""

    final: Path
    state: dict
    writer: TensorWriter
    background: Background | None  # what writes this rank's part; None: nothing yet


class Checkpointer:
    """The checkpoints of one run. All ranks call every method together; one training process at a time uses a folder.

    Args:
        folder: holds the step folders, or a URL; made by the first save. What an interrupted save left is removed here.
        keep_latest_k: checkpoints kept; 0 keeps all.

    Attributes:
        protected: one more that is kept, or None.
    """

    def __init__(self, folder: str | os.PathLike, keep_latest_k: int = 0):
        self.folder, self.keep_latest_k = to_path(folder), keep_latest_k
        self._verified: set[Path] = set()
        self._pending: _Pending | None = None
        self._buffers: dict = {}
        self.protected: Path | None = None
        utils.on_main(self._clean_up)

    def _clean_up(self) -> None:
        if is_remote(self.folder):
            for path in step_folders(self.folder):
                if not (path / MANIFEST).exists():
                    remove_folder(path)
            return
        for path in self.folder.glob(_REPLACED + "*"):
            original = path.with_name(path.name.removeprefix(_REPLACED))
            shutil.rmtree(path) if original.exists() else path.rename(original)
        for path in self.folder.glob(_SAVING + "*"):
            shutil.rmtree(path)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
        """Writes a checkpoint and then removes the ones that `keep_latest_k` does not keep.

        Args:
            step: optimizer steps done.
            tensors: DTensors are written in parts, each rank its own; plain tensors are the same on every rank.
            state: JSON values; `step` is added.

        Raises:
            OSError: one line, on every rank, for instance when the disk is full; earlier checkpoints are as they were.
        """
        self._begin(step, tensors, state, in_background=False)
        return self.finish()

    def begin(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """As `save`, but the files are written beside what follows, from a copy of the tensors in host memory: as many bytes as
        this rank writes, kept until the next time. `finish` must follow, when `written` is true on all ranks or before."""
        self._begin(step, tensors, state, in_background=True)

    def _begin(self, step: int, tensors: dict[str, Tensor], state: dict, in_background: bool) -> None:
        assert self._pending is None, "one checkpoint at a time"
        final = self.folder / f"step-{step:08d}"
        temporary = final if is_remote(final) else self.folder / (_SAVING + final.name)
        with self._failing(final, temporary):
            utils.on_main(lambda: self._make_room(temporary, tensors))
            writer = TensorWriter(temporary, tensors)
        if in_background:
            writer.copy(self._buffers)
        self._pending = _Pending(final, {"step": step, **state}, writer, Background(writer.write) if in_background else None)

    @property
    def under_way(self) -> bool:
        """A checkpoint has been begun and not finished. The same on all ranks."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """This rank's part of it is on the disk, or has failed."""
        return self._pending is None or not self._pending.background.is_alive()

    def finish(self) -> Path | None:
        """Waits for the checkpoint under way, gives it its name, and returns it; None if there is none. Raises as `save`."""
        if self._pending is None:
            return None
        (final, state, writer, background), self._pending = self._pending, None
        with self._failing(final, writer.folder):
            outcomes = utils.together(background.result if background else writer.write)
            utils.on_main(lambda: self._complete(final, state, writer, *zip(*outcomes)))
        return final

    @contextlib.contextmanager
    def _failing(self, final: Path, temporary: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if utils.rank() == 0:
                remove_folder(temporary)
            raise OSError(f"{final}: checkpoint not saved, earlier ones are unchanged: {error}") from error

    def _make_room(self, temporary: Path, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_remote(temporary):
            (temporary / MANIFEST).unlink(missing_ok=True)
            remove_folder(temporary)
            temporary.mkdir(parents=True, exist_ok=True)
            return
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"no space left on device: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _complete(self, final: Path, state: dict, writer: TensorWriter, results: Sequence[list], hashes: Sequence[dict]) -> None:
        temporary = writer.folder
        writer.finish(list(results))
        write_json(temporary / "state.json", state)
        files = {name: entry for of_rank in hashes for name, entry in of_rank.items()}
        files |= {name: describe(temporary / name) for name in (".metadata", "state.json")}
        write_json(temporary / MANIFEST, {"format": 1, "files": files})
        if not is_remote(temporary):
            self._rename(temporary, final)
        self._prune(final)

    def _rename(self, temporary: Path, final: Path) -> None:
        sync(temporary)
        replaced = self.folder / (_REPLACED + final.name)
        if final.exists():  # a broken one, or one of the steps that a resumed run repeats
            final.rename(replaced)
        temporary.rename(final)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Keeps `keep_latest_k` checkpoints up to `newest`; broken ones do not count. Those of later steps are left alone."""
        if self.keep_latest_k == 0:
            return
        steps = [path for path in step_folders(self.folder) if step_of(path) <= step_of(newest)]
        kept = [path for path in steps if find_problem(path, hashes=False) is None][-self.keep_latest_k :]
        if len(kept) == self.keep_latest_k:
            for path in steps[: steps.index(kept[0])]:
                if path != self.protected:
                    remove_folder(path)

    def newest_valid(self) -> Path | None:
        """The newest checkpoint whose sizes and hashes are right, with a warning for every newer one; None if there is none.

        Raises:
            UserError: there are checkpoints, and all are broken: to start from step 0 then must be the user's decision.
        """
        folders = utils.broadcast(step_folders(self.folder))
        for path in reversed(folders):
            problem = self._find_problem(path)
            if problem is None:
                return path
            logger.warning("checkpoint %s is broken (%s), trying the one before", path, problem)
        if folders:
            raise UserError(f"{self.folder}: all {len(folders)} checkpoints are broken: mend one, or set checkpoint.resume = never")
        return None

    def load(self, path: str | os.PathLike, tensors: dict[str, Tensor]) -> dict:
        """Reads a checkpoint into tensors, in place, and returns its state.

        Args:
            path: a step folder, of this run or another.
            tensors: all that the checkpoint holds, as `save` got them; floating-point dtypes may differ.

        Raises:
            UserError: the checkpoint is broken; a tensor is missing, unknown, or of another shape.
        """
        path = to_path(path)
        problem = self._find_problem(path)
        if problem is not None:
            raise UserError(f"{path}: broken checkpoint: {problem}")
        _compare(path, RestrictedReader(path).read_metadata().state_dict_metadata, tensors)
        _read_in_place(path, tensors, alone=False)
        return read_state(path)

    def _find_problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; each rank reads its share of the files, once in a checkpointer's life."""
        if path in self._verified:
            return None
        problems = utils.gather(find_problem(path, utils.rank(), utils.world_size()))
        problem = next(filter(None, problems), None)
        if problem is None:
            self._verified.add(path)
        return problem


def checkpoints_folder(config: CheckpointKeys, dump_folder: str | os.PathLike) -> Path:
    """Where a run's checkpoints lie.

    Raises:
        UserError: as files.to_path.
    """
    return to_path(config.folder) if config.folder else Path(dump_folder) / "checkpoints"


def check_is_new(folder: Path) -> None:
    """Raises UserError if checkpoint.folder has checkpoints, which a run that starts anew would be mixed up with."""
    if utils.on_main(lambda: step_folders(folder)):
        raise UserError(
            f"checkpoint.folder = {str(folder)!r} holds checkpoints: checkpoint.resume = never cannot move them; use another folder"
        )


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
        _read_in_place(path, tensors, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The live parameters and persistent buffers, each tied one once, under its first name; sharded ones as DTensors."""
    state = module.state_dict()  # FSDP's hook frees gathered parameters first, so that these are the shards
    every, once = ({name for name, _ in module.named_parameters(remove_duplicate=flag)} for flag in (False, True))
    return {name: tensor for name, tensor in state.items() if name not in every - once}


def move_aside(path: str | os.PathLike) -> Path | None:
    """Renames a file or folder to the first free `<name>.<number>`, and returns that; None if there is nothing to move."""
    path = Path(path)

    def rename() -> Path | None:
        if not path.exists():
            return None
        number = 1
        while (target := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(target)
        return target

    return utils.on_main(rename)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        heartbeat.beat()
        return super().resolve_tensor(read_item)


def _read_in_place(path: Path, tensors: dict[str, Tensor], alone: bool) -> None:
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


def _compare(path: Path, entries: dict, tensors: dict[str, Tensor]) -> None:
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
