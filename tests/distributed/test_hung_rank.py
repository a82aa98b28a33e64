"""A rank that hangs ends the job within job.timeout: every process, with one line that names rank and step."""

import contextlib
import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from spectitan import heartbeat
from spectitan.distributed.watchdog import EXIT_STATUS, Watchdog, _Clocks, _Record
from tests.integration import processes, tiny

TIMEOUT = 5  # no shorter: processes of a loaded machine may be silent for seconds
RUN = {"training__num_steps": 6, "checkpoint__interval": 2, "metrics__report_interval": 1, "training__micro_batch_size": 1}
RUN |= {"parallelism__sharding_strategy": "fsdp", "job__timeout": TIMEOUT, "eval__interval": 2, "export__format": "none"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def endings(started: list) -> list[int]:
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def output(folder: Path) -> str:
    """What all ranks have said on stderr, less the log."""
    lines = [line for rank in range(2) for line in (folder / f"output{rank}").read_text().splitlines()]
    return "\n".join(line for line in lines if line.startswith("spectitan.") or "Error" in line or "Traceback" in line)


STOPPED = {
    "in a step": (1, "spectitan.train", "step_if_finite", 3, "rank 1 hung at step 3: no answer"),
    "saving, with the store": (0, "spectitan.training.checkpoint", "write_json", 3, "rank 0 hung while saving after step 4: no answer"),
    "evaluating": (1, "spectitan.run.evaluating", "heldout_sums", 1, "rank 1 hung while evaluating after step 2: no answer"),
}


@pytest.mark.parametrize("place", STOPPED)
def test_a_process_that_is_stopped(world, tmp_path, place):
    rank, module, function, call, words = STOPPED[place]
    accident = partial(processes.kill_at, module, function, call, rank=rank, number=signal.SIGSTOP, seconds=0.3)
    codes = endings(processes.start_ranks(2, world.flags(tmp_path / "run", **RUN), tmp_path / "output", before=accident))
    assert codes == [-signal.SIGKILL if each == rank else EXIT_STATUS for each in range(2)], output(tmp_path)
    assert output(tmp_path).startswith(f"spectitan.train: {words} within job.timeout = {TIMEOUT} s") and "\n" not in output(tmp_path)


def test_a_main_thread_that_hangs(world, tmp_path):
    accident = partial(processes.hang_at_step, 4, rank=1)
    codes = endings(processes.start_ranks(2, world.flags(tmp_path / "run", **RUN), tmp_path / "output", before=accident))
    assert codes == [EXIT_STATUS] * 2, output(tmp_path)
    assert output(tmp_path).startswith(f"spectitan.train: rank 1 hung at step 4: no progress within job.timeout = {TIMEOUT} s; if that")
    assert "\n" not in output(tmp_path)


def test_long_tokenising_is_no_hang(world, tmp_path):
    """Half a second a document, one rank waiting for the other, longer than the limit."""
    flags = world.flags(tmp_path / "run", **RUN | {"training__num_steps": 1}, data__tokenizer_threads=1, data__cache_dir=tmp_path / "cache")
    start = time.monotonic()
    codes = endings(processes.start_ranks(2, flags, tmp_path / "output", before=processes.slow_tokenising))
    assert codes == [0, 0], output(tmp_path)
    assert time.monotonic() - start > TIMEOUT


# ---- the clocks, and one process ----


def test_the_clock_of_a_step_runs_from_its_start_whatever_beats():
    clocks = _Clocks(1, look=1.0)
    for look in range(6):
        clocks.advance(1.0, step=7, beats=look, records=[_Record()], exchanges=0)
    assert (clocks.step, clocks.quiet) == (5, 0)  # the first look only sees that it has begun
    clocks.advance(1.0, step=8, beats=6, records=[_Record()], exchanges=0)
    assert clocks.step == 0
    clocks.advance(1.0, step=None, beats=6, records=[_Record()], exchanges=0)
    assert (clocks.step, clocks.quiet) == (0, 1)


@pytest.mark.parametrize("own", [True, False])
def test_the_clock_of_a_step_stands_while_a_rank_compiles(own):
    clocks, other = _Clocks(2, look=1.0), _Record()
    for look in range(9):
        now = 3 <= look < 7
        other.compiles = now and not own
        clocks.advance(1.0, step=7, beats=look, records=[_Record(), other], exchanges=0, compiles=now and own)
    assert clocks.step == 4  # of the eight looks after the first


def test_outside_of_steps_the_work_of_any_rank_counts():
    clocks = _Clocks(2, look=1.0)
    for look in range(5):
        clocks.advance(1.0, step=None, beats=3, records=[_Record(number=look), _Record(number=look, beats=look)], exchanges=look)
    assert clocks.quiet == 0
    for look in range(5, 8):
        clocks.advance(1.0, step=None, beats=3, records=[_Record(number=look), _Record(number=look, beats=4)], exchanges=look)
    assert clocks.quiet == 3 and clocks.silence == [0, 0]


def test_silence_is_that_of_the_process_not_of_the_store():
    clocks = _Clocks(2, look=1.0)
    for look in range(1, 9):
        answers = look if look < 4 else 3
        clocks.advance(1.0, step=1, beats=0, records=[_Record(number=answers), _Record(number=1)], exchanges=answers)
    assert clocks.silence == [0, 2] and clocks.store_silence == 5
    clocks.advance(1.0, step=1, beats=0, records=[_Record(number=9), _Record(number=1)], exchanges=9)
    assert clocks.silence == [0, 6] and clocks.store_silence == 0  # no more is added than looks that may be late


def hang(_rank: int, place: str, output: str) -> None:
    """Does what is no hang for longer than the limit, and then hangs."""
    processes.redirect(output)
    with Watchdog(0.5, "spectitan.train") as watchdog:
        watchdog.phase("preparing")
        for _ in range(20):
            heartbeat.beat()
            time.sleep(0.05)
        with heartbeat.covered():
            time.sleep(1)
        for step in range(1, 30 if place == "step" else 1):
            watchdog.step(step, timed=True)
            with heartbeat.covered() if step == 9 else contextlib.nullcontext():
                time.sleep(1 if step == 9 else 0.05)
        for _ in range(1000):
            if place == "step":
                heartbeat.beat()
            time.sleep(0.1)


@pytest.mark.parametrize("place, words", [("step", "at step 29"), ("phase", "while preparing")])
def test_one_process(tmp_path, place, words):
    (process,) = processes.call_in_each(1, hang, place, str(tmp_path / "output"))
    process.join(60)
    assert process.exitcode == EXIT_STATUS
    expected = f"spectitan.train: rank 0 hung {words}: no progress within job.timeout = 0.5 s; if that may take longer, set it higher\n"
    assert (tmp_path / "output").read_text() == expected


def test_what_a_process_tells_is_json():
    record = _Record(number=3, verdict="x", author=1)
    assert _Record(**json.loads(json.dumps(vars(record)))) == record
