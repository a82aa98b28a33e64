"""Writes the tensors of a checkpoint in the format of torch.distributed.checkpoint: all ranks plan together, each writes its part."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from spectitan import heartbeat
from spectitan.distributed import utils
from spectitan.files import is_remote
from spectitan.training.checkpoint_files import describe
from spectitan.training.restricted_metadata import remote_file_system


class TensorWriter:
    """This rank's part of the tensors of one checkpoint. All ranks make it together.

    Args:
        folder: is there.
        tensors: DTensors are written in parts, each rank its own; plain tensors are the same on every rank, one of them writes.

    Raises:
        OSError: on every rank.
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor]):
        self.folder = folder
        self._planner, self._storage = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False), _Storage(folder)
        self._planner.set_up_planner(tensors, is_coordinator=utils.rank() == 0)
        self._storage.set_up_storage_writer(utils.rank() == 0)
        plans = utils.together(lambda: self._storage.prepare_local_plan(self._planner.create_local_plan()))
        plans, self._metadata = self._planner.create_global_plan(plans)
        self._plan = self._planner.finish_plan(self._storage.prepare_global_plan(plans)[utils.rank()])

    def copy(self, buffers: dict[MetadataIndex, Tensor]) -> None:
        """Copies this rank's part: training may go on and change the tensors. On a GPU the host does not wait.

        Args:
            buffers: memory of an earlier copy, pinned for a GPU, or nothing yet; holds this one until the next.
        """
        copied = None
        for item in self._plan.items:
            tensor = self._planner.lookup_object(item.index).detach()
            if item.index not in buffers:
                buffers[item.index] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            buffers[item.index].copy_(tensor, non_blocking=True)
            if tensor.is_cuda and copied is None:
                copied = torch.cuda.Event()
        if copied is not None:
            copied.record()
        self._planner.copies, self._planner.copied = buffers, copied

    def write(self) -> tuple[list[WriteResult], dict[str, dict]]:
        """Alone, in any thread. Returns when all is on the disk: what lies where, and the manifest's entries of the files."""
        results = self._storage.write_data(self._plan, self._planner).value()
        return results, {path.name: describe(path) for path in sorted(self.folder.glob(f"__{utils.rank()}_*"))}

    def finish(self, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written: what lies where, of every rank."""
        self._storage.finish(self._metadata, results)


class _Planner(dcp.DefaultSavePlanner):
    """Gives out copies of tensors where there are any."""

    copies: dict[MetadataIndex, Tensor] | None = None
    copied: torch.cuda.Event | None = None

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return super().lookup_object(index) if self.copies is None else self.copies[index]

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        heartbeat.beat()
        if self.copied is not None:
            self.copied.synchronize()
        return super().resolve_data(write_item)


class _Storage(dcp.FileSystemWriter):
    def __init__(self, folder: Path):
        super().__init__(str(folder), sync_files=not is_remote(folder))
        if is_remote(folder):
            self.fs = remote_file_system()
        self.path = self.fs.init_path(str(folder))

    def storage_meta(self) -> None:
        """Leaves the temporary folder's path out of the metadata: nobody reads it, and a path object is code to a reader."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save follows the system's error with one about its own half-written stream
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class Background(threading.Thread):
    """Work in a thread that does not keep the process from ending."""

    def __init__(self, work: Callable):
        super().__init__(daemon=True, name="checkpoint")
        self._work, self._result, self._error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:
            self._error = error

    def result(self):
        """Waits for the work; what it returned or raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result
