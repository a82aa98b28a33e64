"""The processes of a run: who takes part, on which device, and the named mesh that parameters are sharded over."""

import datetime
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spectitan.distributed.rendezvous import fresh_store
from spectitan.errors import UserError

# One rank may tokenise or download for long while the others wait for it; who waits for one that hangs is ended by the watchdog.
_TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism of the base; their product is the number of processes.

    Ranks are numbered with tp fastest and replicate slowest, so that the ranks that talk most are neighbours.
    """

    world_size: int
    replicate: int = 1  # copies of the sharded parameters
    shard: int = 1  # ranks that FSDP divides each copy over
    tp: int = 1  # ranks that tensor parallelism divides each layer over

    def __post_init__(self):
        if min(self.degrees) < 1 or math.prod(self.degrees) != self.world_size:
            raise UserError(
                f"parallelism: replicate x shard x tp = {self.replicate} x {self.shard} x {self.tp} must equal the number of processes "
                f"({self.world_size})"
            )

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.replicate, self.shard, self.tp

    @classmethod
    def from_strategy(
        cls, sharding_strategy: str, world_size: int, *, tp_size: int = 1, dp_replicate: int = -1, machines: int = 1
    ) -> "ParallelDims":
        """The degrees that the keys of [parallelism] mean for this many processes.

        Args:
            dp_replicate: of hsdp; -1: one copy a machine.

        Raises:
            UserError: the degrees do not make up the processes.
        """
        if sharding_strategy == "none" and world_size != 1:
            raise UserError(f"parallelism.sharding_strategy = none takes one process, {world_size} were started: start one, or set fsdp")
        groups, rest = divmod(world_size, tp_size)
        replicate = {"hsdp": machines if dp_replicate == -1 else dp_replicate, "tp": groups}.get(sharding_strategy, 1)
        if rest or groups % replicate or not groups:
            given = {"tp_size": tp_size} | ({"dp_replicate": replicate} if sharding_strategy == "hsdp" else {})
            product = " x ".join(f"parallelism.{name} = {value}" for name, value in given.items())
            raise UserError(
                f"parallelism.sharding_strategy = {sharding_strategy}: {world_size} processes were started; allowed: multiples of {product}"
            )
        return cls(world_size, replicate, groups // replicate, tp_size)

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """Dimensions "replicate", "shard" and "tp"; of size 1 only "shard" is there."""
        sizes = dict(zip(("replicate", "shard", "tp"), self.degrees))
        return _mesh(device_type, {name: size for name, size in sizes.items() if size > 1 or name == "shard"})

    def build_speculator_mesh(self, device_type: str, shard_speculator: bool = True) -> DeviceMesh:
        """The speculator is data parallel over all ranks, tensor parallel over none: of the base's copies, each rank group holds one.

        Args:
            shard_speculator: False: each rank holds all of it.
        """
        replicate = self.replicate if shard_speculator else self.world_size
        sizes = {"replicate": replicate, "shard": self.world_size // replicate}
        return _mesh(device_type, {name: size for name, size in sizes.items() if size > 1 or name == "shard"})


def _mesh(device_type: str, sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


@dataclass(frozen=True)
class Distributed:
    """This process's place in the run. `close()` ends the process group if `init_distributed` made it.

    Attributes:
        mesh: of the base's data parallelism, "shard" or ("replicate", "shard"); what FSDP takes.
        tp_mesh: of the ranks that split the base's layers; None where they are whole.
        speculator_mesh: as `mesh`, over all ranks.
    """

    mesh: DeviceMesh
    tp_mesh: DeviceMesh | None
    speculator_mesh: DeviceMesh
    device: torch.device
    rank: int
    world_size: int
    owns_group: bool

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


def init_distributed(
    sharding_strategy: str, device: str = "", *, tp_size: int = 1, dp_replicate: int = -1, shard_speculator: bool = True
) -> Distributed:
    """Joins the run: the group of torchrun, the caller's own group (embedded use), or a new group of this process alone.

    Every layout has a process group, so that sharding, checkpoints and reductions have one implementation. CPU tensors
    always travel by gloo: counts are summed on the host without touching the GPU.

    Args:
        sharding_strategy, tp_size, dp_replicate, shard_speculator: keys of [parallelism].
        device: as `choose_device`.

    Raises:
        UserError: "none" with several processes, degrees that do not make up the processes; fewer GPUs than processes.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    owns_group = not dist.is_initialized()
    if owns_group:
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        _degrees(sharding_strategy, int(os.environ["WORLD_SIZE"]) if launched else 1, tp_size, dp_replicate)  # refuse before anyone waits
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store, rank, world_size = fresh_store() if launched else (dist.HashStore(), 0, 1)
        dist.init_process_group(backend, timeout=_TIMEOUT, store=store, rank=rank, world_size=world_size)
    dims = _degrees(sharding_strategy, dist.get_world_size(), tp_size, dp_replicate)
    mesh = dims.build_mesh(chosen.type)
    data_dims = tuple(name for name in mesh.mesh_dim_names if name != "tp")
    data_mesh = mesh[data_dims] if dims.tp > 1 else mesh
    tp_mesh = mesh["tp"] if dims.tp > 1 else None
    whole = dims.tp == 1 and (shard_speculator or dims.world_size == 1)
    speculator_mesh = mesh if whole else dims.build_speculator_mesh(chosen.type, shard_speculator)
    return Distributed(data_mesh, tp_mesh, speculator_mesh, chosen, dist.get_rank(), dist.get_world_size(), owns_group)


def _degrees(sharding_strategy: str, world_size: int, tp_size: int, dp_replicate: int) -> ParallelDims:
    machines = max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    return ParallelDims.from_strategy(sharding_strategy, world_size, tp_size=tp_size, dp_replicate=dp_replicate, machines=machines)
