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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectitan.config.sections import Checkpoint as CheckpointKeys
from spectitan.distributed import utils
from spectitan.errors import UserError
from spectitan.files import is_remote, remove_folder, sync, to_path
from spectitan.training.checkpoint_files import MANIFEST, describe, find_problem, step_folders, step_of, write_json
from spectitan.training.checkpoint_reading import check_tensors, read_in_place, read_state
from spectitan.training.checkpoint_writing import Background, TensorWriter

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
        folders = utils.on_main(lambda: step_folders(self.folder))
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
        check_tensors(path, tensors)
        read_in_place(path, tensors, alone=False)
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


def saves_beside_training(async_mode: str, device: torch.device) -> bool:
    """What `checkpoint.async_mode` means where training computes: writing needs cores, and on a CPU the steps have them."""
    return async_mode == "async" or (async_mode == "auto" and device.type == "cuda")


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


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The live parameters and persistent buffers, each tied one once, under its first name; sharded ones as DTensors."""
    state = module.state_dict()  # FSDP's hook frees gathered parameters first, so that these are the shards
    every, once = ({name for name, _ in module.named_parameters(remove_duplicate=flag)} for flag in (False, True))
    return {name: tensor for name, tensor in state.items() if name not in every - once}
