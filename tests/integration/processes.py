"""Programs in processes of their own, which start at once, and accidents to happen in them."""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

# A server that has imported everything forks each process: no thread of the tests is in them, no import is waited for.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.integration.processes", "spectitan.train", "torch._dynamo", "torch._inductor.config"])


def start(program: str, flags: list[str], output: Path, environment: dict[str, str] | None = None, before=None) -> multiprocessing.Process:
    """Starts a program. Its exit status becomes the process's `exitcode`, what it prints goes to the end of a file.

    Args:
        program: train, evaluate, ...
        before: called in the process first: one of the accidents below, or a partial of one.
    """
    process = _context.Process(target=_main, args=(program, flags, str(output), environment or {}, before))
    process.start()
    return process


def start_ranks(world_size: int, flags: list[str], output: Path, before=None) -> list[multiprocessing.Process]:
    """Starts the trainer in processes of one job, as torchrun would; rank R prints to the end of <output>R."""
    port = free_port()
    return [start("train", flags, Path(f"{output}{rank}"), _place(rank, world_size, port), before) for rank in range(world_size)]


def train_in_ranks(world_size: int, flags: list[str], output: Path, before=None) -> None:
    """The same, and they all end well."""
    codes = join(start_ranks(world_size, flags, output, before))
    assert codes == [0] * world_size, "".join(Path(f"{output}{rank}").read_text() for rank in range(world_size))


def call_in_each(world_size: int, function, *args) -> list[multiprocessing.Process]:
    """Starts processes that each call function(rank, *args)."""
    started = [_context.Process(target=function, args=(rank, *args)) for rank in range(world_size)]
    for process in started:
        process.start()
    return started


def run_group(world_size: int, output: Path, function, *args) -> None:
    """Calls function(rank, *args) in each of the processes of a gloo group; rank R prints to the end of <output>.R. They all end well."""
    codes = join(call_in_each(world_size, _in_group, world_size, free_port(), str(output), function, args))
    assert codes == [0] * world_size, "".join(Path(f"{output}.{rank}").read_text() for rank in range(world_size))


def _in_group(rank: int, world_size: int, port: int, output: str, function, args: tuple) -> None:
    redirect(f"{output}.{rank}")
    os.environ.update(_place(rank, world_size, port))
    dist.init_process_group("gloo")
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def _place(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    """A port to listen on, below those that the kernel hands out: so that nobody is given it before it is listened on."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_killed(program: str, flags: list[str], output: Path, *accident, **keys) -> None:
    """Starts a program that `kill_at`, whose arguments follow, kills."""
    codes = join([start(program, flags, output, before=partial(kill_at, *accident, **keys))])
    assert codes == [-signal.SIGKILL], (accident, output.read_text())


def join(started: list[multiprocessing.Process]) -> list[int | None]:
    """The exit codes; when one process fails, the others, which would wait for it, are ended."""
    while running := [process for process in started if process.exitcode is None]:  # asked once: to wait for none of them has no end
        if any(process.exitcode for process in started):
            for process in started:
                process.kill()
        multiprocessing.connection.wait([process.sentinel for process in running])
    return [process.exitcode for process in started]


def redirect(output: str) -> None:
    """What this process prints goes to the end of a file."""
    sys.stdout = sys.stderr = open(output, "a", buffering=1, encoding="utf-8")


def _main(program: str, flags: list[str], output: str, environment: dict[str, str], before) -> None:
    redirect(output)
    os.environ.update(environment)
    if before:
        before()
    sys.exit(importlib.import_module(f"spectitan.{program}").main(flags))


def wait_for(condition, process, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.005)


# ---- accidents ----


def kill_at(
    module: str, function: str, call: int, after: bool = False, *, rank: int | None = None, number: int = signal.SIGKILL, seconds: float = 0
) -> None:
    """The process will be killed (kill -9) when it calls a function of a module for the nth time, or when that call returns.

    Args:
        rank: only this one; None: every process.
        number: another signal that it gets.
        seconds: for which it sleeps before.
    """
    if rank not in (None, int(os.environ.get("RANK", 0))):
        return
    owner, _, name = function.rpartition(".")
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    original, calls = getattr(holder, name), []

    def accident(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            time.sleep(seconds)
        if len(calls) == call and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if len(calls) == call and after:
            os.kill(os.getpid(), number)
        return result

    setattr(holder, name, accident)


def hold_at(number: int, folder: Path) -> None:
    """The nth optimizer step of each rank R leaves a file heldR in a folder, and goes on when there is a file `go`; toldR comes with a
    signal that asks for the end."""
    from spectitan import train
    from spectitan.signals import StopSignal

    original, stop, calls, rank = train.step_if_finite, StopSignal._stop, [], os.environ.get("RANK", "0")

    def step(*args):
        calls.append(1)
        if len(calls) == number:
            (folder / f"held{rank}").touch()
            while not (folder / "go").exists():
                time.sleep(0.005)
        return original(*args)

    def told(*args):
        (folder / f"told{rank}").touch()
        stop(*args)

    train.step_if_finite, StopSignal._stop = step, told


def save_meanwhile(checkpoint: Path, folder: Path) -> None:
    """After rank 0 has looked for a checkpoint to start from, and before another rank does, there is one more in the folder."""
    from spectitan.run import inputs

    original = inputs.find_checkpoint

    def find_checkpoint(path):
        shutil.copytree(checkpoint, folder / checkpoint.name)
        return original(path)

    if os.environ["RANK"] != "0":
        inputs.find_checkpoint = find_checkpoint


def slow_tokenising(seconds: float = 0.5) -> None:
    """Every document takes so much longer."""
    from spectitan.data import encoding
    from spectitan.data.tokenizer import JsonTokenizer

    original = JsonTokenizer.encode_batch

    def encode_batch(self, texts):
        time.sleep(seconds)
        return original(self, texts)

    JsonTokenizer.encode_batch, encoding.CHUNK_CHARACTERS = encode_batch, 1


def slow_evaluation() -> None:
    """Drafting and verifying never end."""
    from spectitan.decoding import acceptance

    acceptance.decode_all = _long_work


def slow_loading() -> None:
    """Reading the tensors of a checkpoint never ends."""
    from spectitan.training.restricted_metadata import RestrictedReader

    RestrictedReader.read_data = _long_work


def hang_at_step(step: int, rank: int) -> None:
    """The main thread of a rank sleeps in an optimizer step; its other threads go on."""
    from spectitan import train

    original = train.Trainer._train_step

    def train_step(self, *args):
        if self.step + 1 == step and self.world.rank == rank:
            time.sleep(1000)
        return original(self, *args)

    train.Trainer._train_step = train_step


def _long_work(*args) -> None:
    print("long work has begun")
    time.sleep(10_000)
