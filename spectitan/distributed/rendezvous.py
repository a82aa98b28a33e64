"""How the processes that torchrun has just started find each other, and not those that it has started before."""

import json
import secrets
import time

import torch.distributed as dist

from spectitan.errors import UserError

_STARTED, _AGREED = "spectitan/started", "spectitan/agreed"
_SECONDS_BETWEEN_LOOKS = 0.01
_PATIENCE_SECONDS = 1800.0  # workers of other machines may start much later


def fresh_store() -> tuple[dist.Store, int, int]:
    """A store that holds nothing yet, the same for all processes of this start; rank and number of processes.

    torchrun keeps one store for all its starts (`--max-restarts`), and addresses that killed processes left there are connected to in
    vain, for as long as the process group's timeout (pytorch/pytorch#135712; TORCHELASTIC_RESTART_COUNT differs between machines).
    So every process makes a name; rank 0's name becomes the prefix of the store once everyone has seen its own name beside it.

    Raises:
        UserError: environment variables that torchrun sets are missing or wrong, or nobody answers where they say.
        TimeoutError: not all processes have started.
    """
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except (ValueError, dist.DistError) as error:
        raise UserError(
            f"the processes of this run do not find each other: {error}; allowed: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun "
            "sets them, or none"
        ) from error
    own = secrets.token_hex(16)
    store.set(f"{_STARTED}/{rank}", own)
    prefix, deadline = "", time.monotonic() + _PATIENCE_SECONDS
    while not prefix or (rank == 0 and not store.check([f"{own}/{each}" for each in range(world_size)])):
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank}: not all of {world_size} processes have started within {_PATIENCE_SECONDS:.0f} s")
        if rank == 0 and store.check(keys := [f"{_STARTED}/{each}" for each in range(world_size)]):
            store.set(_AGREED, json.dumps([own, [name.decode() for name in store.multi_get(keys)]]))
        if store.check([_AGREED]):
            name, of_ranks = json.loads(store.get(_AGREED))
            prefix = name if of_ranks[rank : rank + 1] == [own] else ""
        if prefix:
            store.set(f"{prefix}/{rank}", "")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return dist.PrefixStore(prefix, store), rank, world_size
