"""Several processes of which one is killed, or all are told to stop: what they end with is what an undisturbed run ends with."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.distributed.restarted_worker import KILLED
from tests.integration import processes, tiny

STEPS = 13
RUN = {"training__num_steps": STEPS, "checkpoint__interval": 4, "checkpoint__keep_latest_k": 0, "metrics__report_interval": 1}
RUN |= {"training__micro_batch_size": 1, "parallelism__sharding_strategy": "fsdp", "eval__at_end": "false", "export__format": "none"}
RUN |= {"speculator__type": "eagle3", "optimizer__name": "muon"}


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The folder of a run of two processes that nothing disturbed."""
    processes.train_in_ranks(2, world.flags(world.root / "whole", **RUN), world.root / "whole_output")
    return world.root / "whole"


def assert_as_undisturbed(run: Path, whole: Path) -> None:
    tiny.assert_same_training(run, whole, STEPS)
    assert tiny.learned(run) == tiny.learned(whole)


def test_torchrun_starts_anew_what_was_killed_and_ends_what_is_told_to(world, whole, tmp_path):
    """One rank is killed in a step, then another in a save; at the third start torchrun itself is told to stop."""
    run, flags = tmp_path / "run", world.flags(tmp_path / "run", **RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={len(KILLED)}"]
    command += ["-m", "tests.distributed.restarted_worker", str(tmp_path), *flags]
    with open(tmp_path / "output", "w") as output:
        job = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=output, stderr=output)
    last = len(KILLED)

    def wait_for(file: str) -> None:
        while not all((tmp_path / f"{file}{rank}").exists() for rank in range(2)):
            assert job.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.02)

    wait_for("held")
    before = set((run / "checkpoints").glob("step-*"))
    job.send_signal(signal.SIGTERM)
    told = time.monotonic()
    wait_for("told")
    (tmp_path / "go").touch()
    job.wait()
    statuses = {path.name: path.read_text() for path in tmp_path.glob("*.status")}
    assert statuses == {f"{last}.{rank}.status": "0" for rank in range(2)}, (tmp_path / "output").read_text()
    assert time.monotonic() - told < 25
    assert len(set((run / "checkpoints").glob("step-*")) - before) == 1
    processes.train_in_ranks(2, flags, tmp_path / "output")
    assert_as_undisturbed(run, whole)


@pytest.mark.parametrize("told", [[0, 1], [1]])
def test_workers_that_are_told_to_stop_save_once_and_end_well(world, whole, tmp_path, told):
    run, flags = tmp_path / "run", world.flags(tmp_path / "run", **RUN | {"checkpoint__interval": 100})
    started = processes.start_ranks(2, flags, tmp_path / "output", before=partial(processes.hold_at, 2, tmp_path))
    for rank in range(2):
        processes.wait_for((tmp_path / f"held{rank}").exists, started[rank])
    for rank in told:
        os.kill(started[rank].pid, signal.SIGTERM)
    (tmp_path / "go").touch()
    start = time.monotonic()
    assert processes.join(started) == [0, 0]
    assert time.monotonic() - start < 25
    assert (tmp_path / "output0").read_text().splitlines()[-1] == "spectitan.train: stopped by SIGTERM"
    assert "Traceback" not in (tmp_path / "output1").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    processes.train_in_ranks(2, world.flags(run, **RUN), tmp_path / "output")
    assert_as_undisturbed(run, whole)


def test_a_stop_while_one_rank_evaluates(world, tmp_path):
    """The others wait for it, deep in a collective."""
    flags = world.flags(tmp_path / "run", **RUN | {"training__num_steps": 2, "eval__at_end": "true"})
    started = processes.start_ranks(2, flags, tmp_path / "output", before=processes.slow_evaluation)
    output = tmp_path / "output0"
    processes.wait_for(lambda: output.exists() and "long work has begun" in output.read_text(), started[0])
    for process in started:
        os.kill(process.pid, signal.SIGTERM)
    assert processes.join(started) == [0, 0]
    assert output.read_text().endswith("spectitan.train: stopped by SIGTERM\n")
    assert "Traceback" not in (tmp_path / "output1").read_text()
    assert not (tmp_path / "run" / "report.json").exists()
