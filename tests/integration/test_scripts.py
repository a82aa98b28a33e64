"""The quick starts of other systems: a whole one on a tiny base, and its stages one by one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration import tiny
from tests.integration.processes import free_port

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: str, variables: dict, *flags: str) -> str:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    finished = subprocess.run(
        ["bash", SCRIPTS / script, *flags], capture_output=True, text=True, cwd=SCRIPTS.parent, env=environment, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_with_all_stages_off_nothing_is_done(script, tmp_path):
    assert run(script, {"DATA_GEN": 0, "TRAIN": 0, "EXPORT": 0, "OUT": tmp_path / "run"}) == ""
    assert not list(tmp_path.iterdir())


def test_arctic_from_data_to_serve_command(tmp_path):
    world = tiny.make(tmp_path / "tiny")
    out, data = tmp_path / "run", tmp_path / "run_data"
    variables = {"CONFIG": world.config, "OUT": out, "SOURCE": world.root / "data", "SOURCE_LENGTH": 31}
    generation = {"TRAIN": 0, "EXPORT": 0, "PROCESSES": 2, "SAMPLES": 9, "PER_SAMPLE": 2, "GEN_BATCH": 4}
    keys = ["--speculator.type", "lstm", "--stage2.prompt_length", "11", "--stage2.seq_length", "20", "--export.format", "arctic"]
    run("arctic_quickstart.sh", variables | generation, *keys)
    assert not out.exists()
    rows = [json.loads(line) for name in ("0.jsonl", "1.jsonl") for line in (data / name).read_text().splitlines()]
    assert len(rows) == 2 * 9 * 2 and {(len(row["input"]), len(row["output"])) for row in rows} == {(11, 20)}

    printed = run("arctic_quickstart.sh", variables | {"DATA_GEN": 0}, *keys)
    assert f"vllm serve {world.root}/base --speculative-config" in printed and (out / "report.json").is_file()
    supervised = [report["supervised_tokens"] for report in tiny.reports(out)]
    assert sum(supervised) == 7 * 4 * 20  # steps, samples, and what was sampled; nothing of the prompts
    exported = (out / "export" / "config.json").read_bytes(), (out / "export" / "model.safetensors").read_bytes()
    assert json.loads(exported[0])["architectures"] == ["ArcticLSTMSpeculatorPreTrainedModel"]
    again = tmp_path / "again"
    printed = run("arctic_quickstart.sh", variables | {"DATA_GEN": 0, "TRAIN": 0}, *keys, "--export.path", str(again))
    assert f"vllm serve {world.root}/base --speculative-config" in printed
    assert exported == ((again / "config.json").read_bytes(), (again / "model.safetensors").read_bytes())


# In place of SLURM: a step runs here, the only host is this one, and a job that goes back into the queue leaves a file.
SRUN = 'while [[ $1 == --* ]]; do shift; done\nexec "$@"'
SCONTROL = '[ "$1" = show ] && echo 127.0.0.1 || touch "$REQUEUED"'
TORCHRUN = 'exec "$PYTHON" -m torch.distributed.run "$@"'


def test_a_slurm_job_saves_when_its_time_is_up_goes_back_into_the_queue_and_then_to_its_end(tmp_path):
    world, commands = tiny.make(tmp_path / "tiny"), tmp_path / "bin"
    commands.mkdir()
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1]", "SLURM_JOB_NUM_NODES": "1", "NPROC": "1", "PORT": str(free_port())}
    environment = (
        os.environ | job | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable, "REQUEUED": str(tmp_path / "queue")}
    )
    endless, run = 10**6, tmp_path / "run"
    keys = [f"--job.dump_folder={run}", "--eval.at_end=false", "--export.format=none", "--metrics.report_interval=1"]
    command = ["bash", SCRIPTS / "train.slurm", world.config, *keys, f"--checkpoint.interval={endless}"]
    with open(tmp_path / "output", "w") as output:
        job = subprocess.Popen(
            [*command, f"--training.num_steps={endless}"], env=environment, cwd=SCRIPTS.parent, stdout=output, stderr=output
        )
        while not (run / "metrics.jsonl").is_file() or not tiny.reports(run):
            assert job.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait() != 0 and (tmp_path / "queue").exists(), (tmp_path / "output").read_text()
    (saved,) = (run / "checkpoints").iterdir()
    (tmp_path / "queue").unlink()
    more = f"--training.num_steps={int(saved.name[-8:]) + 2}"
    done = subprocess.run([*command, more], env=environment, cwd=SCRIPTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"resumed from {saved}" in done.stderr and not (tmp_path / "queue").exists(), done.stderr
