"""The packages wandb, trackio and mlflow themselves take in a run's numbers; of one that goes on, in the same run."""

import json
import os
import subprocess
from pathlib import Path

from tests.integration import tiny

ROOT = Path(__file__).parents[2]


def test_a_run_that_goes_on_is_one_run(tmp_path):
    world, run = tiny.make(tmp_path / "world"), tmp_path / "run"
    python = Path(os.environ["SPECTITAN_LOGGERS"]) / "bin" / "python"
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}

    def call(*words) -> str:
        done = subprocess.run([python, *map(str, words)], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    keys = tiny.SHORT | {"metrics__loggers": "tensorboard,wandb,trackio,mlflow", "metrics__project": "proof", "optimizer__name": "muon"}
    for steps in (4, 8):
        call("-m", "spectitan.train", *world.flags(run, **keys | {"training__num_steps": steps, "job__run_name": "{speculator}-{seed}"}))
    expected = [[report["step"], report["loss"][0], report["muon_lr"]] for report in tiny.reports(run)]
    assert [step for step, *_ in expected] == [2, 4, 6, 8]
    found = json.loads(call(Path(__file__).with_name("read_loggers.py"), run, "proof").splitlines()[-1])
    assert found["mlflow"] == found["trackio"] == [expected]
    ids, numbers = found["wandb"].values()
    assert len(ids) == 2 and len(set(ids)) == 1 and len(numbers) == 8 and all(numbers)
