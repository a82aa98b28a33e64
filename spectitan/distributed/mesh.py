"""The processes of a run: who takes part, on which device, and the named mesh that parameters are sharded over."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spectitan.errors import UserError

# One rank may tokenise or download for long while the others wait for it.
_TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism; their product is the number of processes."""

    world_size: int
    shard: int

    def __post_init__(self):
        if self.shard < 1 or self.shard != self.world_size:
            raise UserError(f"parallelism: shard ({self.shard}) must equal the number of processes ({self.world_size})")

    @classmethod
    def from_strategy(cls, sharding_strategy: str, world_size: int) -> "ParallelDims":
        """The degrees that `parallelism.sharding_strategy` ("none" or "fsdp") means for this many processes."""
        if sharding_strategy == "none" and world_size != 1:
            raise UserError(f"parallelism.sharding_strategy = none takes one process, {world_size} were started: start one, or set fsdp")
        return cls(world_size=world_size, shard=world_size)

    def build_mesh(self, device_type: str) -> DeviceMesh:
        return init_device_mesh(device_type, (self.shard,), mesh_dim_names=("shard",))


@dataclass(frozen=True)
class Distributed:
    """This process's place in the run. `close()` ends the process group if `init_distributed` made it."""

    mesh: DeviceMesh
    device: torch.device
    rank: int
    world_size: int
    owns_group: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(device: str = "") -> torch.device:
    """This process's device.

    Args:
        device: "cpu" or "cuda"; empty: environment variable SPECTITAN_DEVICE, else the GPU of this process if there is one.
    """
    device = device or os.environ.get("SPECTITAN_DEVICE", "")
    if device not in ("", "cpu", "cuda"):
        raise UserError(f"SPECTITAN_DEVICE = {device!r}: allowed are cpu and cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("SPECTITAN_DEVICE = cuda, but PyTorch finds no GPU here")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are visible; start fewer processes")
    return torch.device("cuda", local_rank)


def init_distributed(sharding_strategy: str, device: str = "") -> Distributed:
    """Joins the run: the group of torchrun, the caller's own group (embedded use), or a new group of this process alone.

    Every layout has a process group, so that sharding, checkpoints and reductions have one implementation. CPU tensors
    always travel by gloo: counts are summed on the host without touching the GPU.

    Args:
        sharding_strategy: "none" (one process) or "fsdp".
        device: as `choose_device`.

    Raises:
        UserError: "none" with several processes; fewer GPUs than processes.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    owns_group = not dist.is_initialized()
    if owns_group:
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        ParallelDims.from_strategy(sharding_strategy, int(os.environ["WORLD_SIZE"]) if launched else 1)  # refuse before anyone waits
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=_TIMEOUT, **alone)
    dims = ParallelDims.from_strategy(sharding_strategy, dist.get_world_size())
    return Distributed(dims.build_mesh(chosen.type), chosen, dist.get_rank(), dist.get_world_size(), owns_group)
