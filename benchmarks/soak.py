"""Kills ranks of running jobs at random moments, again and again: what is left at the end must be what an undisturbed run leaves.

    python benchmarks/soak.py                                # 20 kills over four layouts, from the root of a checkout
    python benchmarks/soak.py --kills 2 --layouts fsdp_2     # a quick look

Each layout is one job under `torchrun --max-restarts`, on a tiny base, that saves every few steps and evaluates now and then. One
rank of it, any, gets kill -9: often while all start, mostly while they train. At the end weights and optimizer state are compared with
those of the same job that nobody disturbed, bit for bit, and its reports: samples exactly, losses to 1e-5. Linux.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from training import describe_machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.integration import tiny  # noqa: E402

LAYOUTS = {
    "fsdp_2": (2, {"sharding_strategy": "fsdp"}),
    "hsdp_2x2": (4, {"sharding_strategy": "hsdp", "dp_replicate": 2}),
    "tp_2": (2, {"sharding_strategy": "tp", "tp_size": 2}),
    "fsdp_3": (3, {"sharding_strategy": "fsdp"}),
}
RUN = {
    "training.global_batch_size": 12, "training.micro_batch_size": 1, "base.freeze": "false", "training.detach_states": "false",
    "objective.loss": "kl_div", "checkpoint.interval": 7, "metrics.report_interval": 3, "eval.interval": 40,
    "eval.at_end": "false", "export.format": "none", "speculator.speculator_width": 20,
}  # fmt: skip
CONFIG = replace(tiny.CONFIG, num_heads=4, num_kv_heads=2)


def start(layout: str, world: tiny.Tiny, run: Path, steps: int, restarts: int) -> subprocess.Popen:
    processes, keys = LAYOUTS[layout]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    keys = RUN | {f"parallelism.{name}": value for name, value in keys.items()} | {"training.num_steps": steps}
    flags = [f"--job.config_file={world.config}", f"--job.dump_folder={run}", *(f"--{key}={value}" for key, value in keys.items())]
    with open(f"{run}.log", "w") as log:
        command += [f"--max-restarts={restarts}", "-m", "spectitan.train", *flags]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def workers(job: subprocess.Popen) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    except OSError:
        return []


def reported(run: Path) -> int:
    return tiny.reports(run)[-1]["step"] if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size else 0


def is_under_way(run: Path, since: float) -> bool:
    """A start after that moment has read its checkpoint: its reports are cut back to that, and config.toml is written."""
    return (run / "config.toml").exists() and (run / "config.toml").stat().st_mtime > since


def saved(run: Path) -> int:
    return max((int(path.name[-8:]) for path in run.glob("checkpoints/step-*")), default=0)


def wait_for(condition, job: subprocess.Popen) -> bool:
    """False if the job has ended before."""
    while not condition():
        if job.poll() is not None:
            return False
        time.sleep(0.02)
    return True


def disturb(job: subprocess.Popen, run: Path, processes: int, kills: int, dice: random.Random) -> list[dict]:
    """Kills ranks one after the other; what was going on each time."""
    done, before = [], set()
    while len(done) < kills and wait_for(lambda: len(set(workers(job)) - before) == processes, job):
        began = time.time()
        now = workers(job)
        if dice.random() < 0.25:  # while all start
            time.sleep(dice.uniform(0, 8))
        else:
            target = saved(run) + dice.randint(1, 24)
            wait_for(lambda: is_under_way(run, began) and reported(run) >= target, job)
            time.sleep(dice.uniform(0, 0.5))
        rank = dice.randrange(processes)
        saving = next((path.name.removeprefix(".saving-") for path in run.glob("checkpoints/.saving-*")), "")
        if job.poll() is None and set(workers(job)) == set(now):
            os.kill(now[rank], signal.SIGKILL)
            done.append({"rank": rank, "reported_step": reported(run), "saving": saving})
            print(f"  killed rank {rank}, last report of step {reported(run)}, {saving or 'no'} save under way", flush=True)
        before = set(now)
    return done


def compare_reports(ours: list[dict], theirs: list[dict]) -> None:
    """The sums of a report that a checkpoint cuts in two are summed over ranks in between: their last bits may differ."""
    assert [report["step"] for report in ours] == [report["step"] for report in theirs]
    for our, their in zip(ours, theirs):
        for key in ("sample_hash", "supervised_tokens", "tokens_by_dataset", "lr"):
            assert our[key] == their[key], (our["step"], key)
        for key in ("loss", "base_loss", "accuracy", "grad_norm"):
            torch.testing.assert_close(torch.tensor(our[key]), torch.tensor(their[key]), rtol=1e-5, atol=0)


def soak(layout: str, world: tiny.Tiny, steps: int, kills: int, dice: random.Random) -> dict:
    undisturbed, disturbed = world.root / f"{layout}_undisturbed", world.root / f"{layout}_disturbed"
    if start(layout, world, undisturbed, steps, 0).wait() != 0:
        raise SystemExit(Path(f"{undisturbed}.log").read_text())
    began = time.monotonic()
    job = start(layout, world, disturbed, steps, kills)
    done = disturb(job, disturbed, LAYOUTS[layout][0], kills, dice)
    status, seconds = job.wait(), time.monotonic() - began
    result = {"kills": done, "exit_status": status, "seconds": round(seconds, 1)}
    if status == 0:
        tiny.assert_same_training(disturbed, undisturbed, steps)
        compare_reports(tiny.reports(disturbed), tiny.reports(undisturbed))
        return result | {"equal": True}
    print(Path(f"{disturbed}.log").read_text()[-5000:])
    return result | {"equal": False}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each layout")
    parser.add_argument("--steps", type=int, default=90, help="of each job")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "soak.json"))
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    report = {"machine": describe_machine(), "seed": arguments.seed, "steps": arguments.steps, "run": RUN, "layouts": {}}
    with tempfile.TemporaryDirectory() as folder:
        world = tiny.make(Path(folder) / "world", CONFIG)
        for layout in arguments.layouts:
            print(layout, flush=True)
            report["layouts"][layout] = result = soak(layout, world, arguments.steps, arguments.kills, dice)
            print(
                f"  {len(result['kills'])} kills, exit status {result['exit_status']}, equal: {'yes' if result['equal'] else 'NO'}",
                flush=True,
            )
    results = report["layouts"].values()
    report["kills"], report["equal"] = sum(len(result["kills"]) for result in results), all(result["equal"] for result in results)
    Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['kills']} kills, {'all runs equal' if report['equal'] else 'NOT EQUAL'}")
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
