"""A rank that hangs ends the job within job.timeout: every process, with one line that names rank and step."""

import contextlib
import json
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from spectitan import heartbeat
from spectitan.distributed.watchdog import EXIT_STATUS, Watchdog, _Clocks, _Record
from tests.integration import processes, tiny

TIMEOUT = 15  # no shorter: ten processes of a slow machine may be silent for seconds
RUN = {"training__num_steps": 6, "checkpoint__interval": 2, "metrics__report_interval": 1, "training__micro_batch_size": 1}
RUN |= {"parallelism__sharding_strategy": "fsdp", "job__timeout": TIMEOUT, "eval__interval": 2, "export__format": "none"}


STOPPED = {
    "in a step": (1, "spectitan.train", "step_if_finite", 3, "rank 1 hung at step 3: no answer"),
    "saving, with the store": (0, "spectitan.training.checkpoint", "write_json", 3, "rank 0 hung while saving after step 4: no answer"),
    "evaluating": (1, "spectitan.run.evaluating", "heldout_sums", 1, "rank 1 hung while evaluating after step 2: no answer"),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, tuple[Path, list[int]]]:
    """Folder and exit codes of each job of two ranks. They run at the same time, and most of it is waiting."""
    world = tiny.make(tmp_path_factory.mktemp("tiny"))
    accidents = {
        place: (partial(processes.kill_at, *where, rank=rank, number=signal.SIGSTOP, seconds=0.3), {})
        for place, (rank, *where, _) in STOPPED.items()
    }
    accidents["main thread"] = partial(processes.hang_at_step, 4, rank=1), {}
    keys = {"training__num_steps": 1, "data__tokenizer_threads": 1, "data__cache_dir": world.root / "cache"}
    accidents["tokenising"] = partial(processes.slow_tokenising, 2.0), keys
    started = {}
    for name, (accident, changes) in accidents.items():
        folder = world.root / name.replace(" ", "_")
        folder.mkdir()
        started[name] = folder, processes.start_ranks(2, world.flags(folder / "run", **RUN | changes), folder / "output", accident)
    for _, ranks in started.values():
        for process in ranks:
            process.join()
    return {name: (folder, [process.exitcode for process in ranks]) for name, (folder, ranks) in started.items()}


def output(folder: Path) -> str:
    """What all ranks have said on stderr, less the log."""
    lines = [line for rank in range(2) for line in (folder / f"output{rank}").read_text().splitlines()]
    return "\n".join(line for line in lines if line.startswith("spectitan.") or "Error" in line or "Traceback" in line)


@pytest.mark.parametrize("place", STOPPED)
def test_a_process_that_is_stopped(jobs, place):
    folder, codes = jobs[place]
    rank, *_, words = STOPPED[place]
    assert codes == [-signal.SIGKILL if each == rank else EXIT_STATUS for each in range(2)], output(folder)
    assert output(folder).startswith(f"spectitan.train: {words} within job.timeout = {TIMEOUT} s") and "\n" not in output(folder)


def test_a_main_thread_that_hangs(jobs):
    folder, codes = jobs["main thread"]
    assert codes == [EXIT_STATUS] * 2, output(folder)
    assert output(folder).startswith(f"spectitan.train: rank 1 hung at step 4: no progress within job.timeout = {TIMEOUT} s; if that")
    assert "\n" not in output(folder)


def test_long_tokenising_is_no_hang(jobs):
    """Two seconds a document, in all longer than the limit, while one rank waits for the other."""
    folder, codes = jobs["tokenising"]
    assert codes == [0, 0], output(folder)
    log = (folder / "output0").read_text()
    assert 2.0 * int(re.search(r", (\d+) documents, ", log)[1]) > TIMEOUT


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
    with Watchdog(1.5, "spectitan.train") as watchdog:
        watchdog.phase("preparing")
        for _ in range(20):
            heartbeat.beat()
            time.sleep(0.1)
        with heartbeat.covered():
            time.sleep(2)
        for step in range(1, 30 if place == "step" else 1):
            watchdog.step(step, timed=True)
            with heartbeat.covered() if step == 9 else contextlib.nullcontext():
                time.sleep(2 if step == 9 else 0.07)
        for _ in range(1000):
            if place == "step":
                heartbeat.beat()
            time.sleep(0.1)


def test_one_process(tmp_path):
    places = {"step": "at step 29", "phase": "while preparing"}
    started = [process for place in places for process in processes.call_in_each(1, hang, place, str(tmp_path / place))]
    for process, (place, words) in zip(started, places.items()):
        process.join()
        assert process.exitcode == EXIT_STATUS
        expected = f"spectitan.train: rank 0 hung {words}: no progress within job.timeout = 1.5 s; if that may take longer, set it higher\n"
        assert (tmp_path / place).read_text() == expected


def test_what_a_process_tells_is_json():
    record = _Record(number=3, verdict="x", author=1)
    assert _Record(**json.loads(json.dumps(vars(record)))) == record
