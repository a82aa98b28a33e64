"""Runs that are killed, stopped, continued, started anew: what they end with is what an uninterrupted run ends with."""

import json
import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from spectitan import train
from spectitan.training.checkpoint import Checkpointer
from spectitan.training.checkpoint_reading import read_state
from spectitan.training.checkpoint_writing import TensorWriter
from tests.integration import processes, tiny
from tests.integration.processes import wait_for

STEPS = 13
RUN = {"training__num_steps": STEPS, "checkpoint__interval": 4, "checkpoint__keep_latest_k": 0, "metrics__report_interval": 3}
RUN |= {"eval__at_end": "false", "export__format": "none"}


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The folder of a run that nothing interrupted."""
    assert train.main(world.flags(world.root / "whole", **RUN)) == 0
    return world.root / "whole"


def assert_as_uninterrupted(run: Path, whole: Path) -> None:
    tiny.assert_same_training(run, whole, STEPS)
    assert tiny.learned(run) == tiny.learned(whole)


@pytest.fixture
def logged(caplog):
    caplog.set_level("INFO", logger="spectitan")
    return caplog


# ---- killed ----


CHECKPOINT = "spectitan.training.checkpoint"
ACCIDENTS = [
    ("spectitan.train", "step_if_finite", 3),  # before there is any checkpoint
    (CHECKPOINT, "TensorWriter.copy", 1),
    (CHECKPOINT, "TensorWriter.write", 1),
    (CHECKPOINT, "TensorWriter.write", 1, True),
    (CHECKPOINT, "write_json", 1),  # of state.json
    (CHECKPOINT, "write_json", 2),  # of manifest.json
    (CHECKPOINT, "sync", 1),  # before it gets its name
    (CHECKPOINT, "sync", 2),  # after
    ("spectitan.training.metrics", "MetricsLogger.report", 1, True),  # reports that the checkpoint does not know
    ("spectitan.train", "step_if_finite", 2, True),
    (CHECKPOINT, "Checkpointer._prune", 1),
]


def test_kill_9_anywhere_in_a_step_or_a_checkpoint(world, whole, tmp_path):
    flags = world.flags(tmp_path / "run", **RUN)
    for accident in ACCIDENTS:
        processes.run_killed("train", flags, tmp_path / "output", *accident)
    assert train.main(flags) == 0
    assert_as_uninterrupted(tmp_path / "run", whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_kill_9_at_a_random_time(world, whole, tmp_path):
    flags = world.flags(tmp_path / "run", **RUN)
    seed = time.time_ns()
    delay = random.Random(seed)
    for _ in range(4):
        process = processes.start("train", flags, tmp_path / "output")
        process.join(delay.uniform(0, 1.2))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), (seed, (tmp_path / "output").read_text())
    assert train.main(flags) == 0, seed
    assert_as_uninterrupted(tmp_path / "run", whole)


# ---- written beside training ----


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(world, whole, tmp_path, monkeypatch):
    """The first one is held up until the second is asked for."""
    asked, during = threading.Event(), []
    write, finish, train_step = TensorWriter.write, Checkpointer.finish, train.Trainer._train_step

    def held_up(self):
        assert asked.wait(600)
        return write(self)

    def finishing(self):
        asked.set()
        return finish(self)

    def noting_step(self, *args):
        if not asked.is_set() and self.checkpointer.under_way:
            during.append(self.step + 1)
        return train_step(self, *args)

    monkeypatch.setattr(TensorWriter, "write", held_up)
    monkeypatch.setattr(Checkpointer, "finish", finishing)
    monkeypatch.setattr(train.Trainer, "_train_step", noting_step)
    assert train.main(world.flags(tmp_path / "run", **RUN)) == 0
    assert during == [5, 6, 7, 8]
    for step in (4, 8, 12, STEPS):
        tiny.assert_same_training(tmp_path / "run", whole, step)


# ---- stopped ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_the_step_in_hand(world, whole, tmp_path, number):
    flags, run = world.flags(tmp_path / "run", **RUN | {"checkpoint__interval": 100}), tmp_path / "run"
    process = processes.start("train", flags, tmp_path / "output", before=partial(processes.hold_at, 7, tmp_path))
    wait_for((tmp_path / "held0").exists, process)
    os.kill(process.pid, number)
    (tmp_path / "go").touch()
    code = processes.join([process])
    output = (tmp_path / "output").read_text()
    assert code == [128 + number], output
    assert output.splitlines()[-1] == f"spectitan.train: stopped by {number.name}" and "Traceback" not in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000007"]
    assert train.main(flags) == 0
    assert_as_uninterrupted(run, whole)


def test_usr1_saves_at_once_and_training_goes_on(world, whole, tmp_path):
    flags, run = world.flags(tmp_path / "run", **RUN | {"checkpoint__interval": 100}), tmp_path / "run"
    process = processes.start("train", flags, tmp_path / "output", before=partial(processes.hold_at, 5, tmp_path))
    wait_for((tmp_path / "held0").exists, process)
    os.kill(process.pid, signal.SIGUSR1)
    (tmp_path / "go").touch()
    assert processes.join([process]) == [0]
    steps = sorted(int(path.name[-8:]) for path in (run / "checkpoints").iterdir())
    assert steps == [6, STEPS]  # ranks agree on it when the next step begins
    assert_as_uninterrupted(run, whole)


def test_a_stop_while_tokenising(world, tmp_path):
    flags = world.flags(tmp_path / "run", **RUN, data__tokenizer_threads=1, data__cache_dir=tmp_path / "cache")
    output = tmp_path / "output"
    process = processes.start("train", flags, output, before=processes.slow_tokenising)
    wait_for(lambda: output.exists() and "tokenising" in output.read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    assert processes.join([process]) == [128 + signal.SIGTERM] and "done in" not in output.read_text()
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache").glob("*.tmp"))


def test_trainers_on_one_empty_cache(world, tmp_path):
    """One tokenises and is killed; of two that wait for it one goes on, the other waits again; all there is in the end is a clean cache."""
    short = RUN | {"training__num_steps": 2}

    def begin(name: str, **keys):
        flags = world.flags(tmp_path / name, **short, data__tokenizer_threads=1, data__cache_dir=tmp_path / "cache")
        return processes.start("train", flags, tmp_path / f"{name}.log", **keys)

    def waits(name: str) -> bool:
        log = tmp_path / f"{name}.log"
        return log.exists() and "waiting for another process that does it" in log.read_text()

    first = begin("first", before=processes.slow_tokenising)
    wait_for(lambda: list((tmp_path / "cache").glob("*.tmp")), first)
    others = {name: begin(name) for name in ("second", "third")}
    for name, process in others.items():
        wait_for(lambda name=name: waits(name), process)
    first.kill()
    for process in others.values():
        process.join()
        assert process.exitcode == 0
    assert train.main(world.flags(tmp_path / "clean", **short, data__cache_dir=tmp_path / "clean_cache")) == 0
    cache, clean = (
        {name: content for name, (_, content) in tiny.contents(tmp_path / folder).items() if not name.startswith("sources-")}
        for folder in ("cache", "clean_cache")
    )
    assert cache == clean and cache
    for name in others:
        tiny.assert_same_training(tmp_path / name, tmp_path / "clean", 2)


def stop_long_work(process, output: Path) -> None:
    wait_for(lambda: output.exists() and "long work has begun" in output.read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == 128 + signal.SIGTERM and output.read_text().endswith("stopped by SIGTERM\n"), output.read_text()


def test_a_stop_while_loading(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = tiny.contents(tmp_path / "run")
    process = processes.start("train", world.flags(tmp_path / "run", **RUN), tmp_path / "output", before=processes.slow_loading)
    stop_long_work(process, tmp_path / "output")
    assert tiny.contents(tmp_path / "run") == before


def test_a_stop_while_evaluating_leaves_a_run_that_is_evaluated_later(world, whole, tmp_path, logged):
    shutil.copytree(whole, tmp_path / "run")
    flags = world.flags(tmp_path / "run", **RUN | {"eval__at_end": "true", "export__format": "auto"})
    process = processes.start("train", flags, tmp_path / "output", before=processes.slow_evaluation)
    stop_long_work(process, tmp_path / "output")
    assert not (tmp_path / "run" / "report.json").exists() and not (tmp_path / "run" / "export").exists()

    assert train.main(flags) == 0
    assert "this run is finished" in logged.text
    assert json.loads((tmp_path / "run" / "report.json").read_text())["step"] == STEPS
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    done = tiny.contents(tmp_path / "run")
    assert train.main(flags) == 0
    now = tiny.contents(tmp_path / "run")
    assert {name for name in now if now[name] != done.get(name)} == {"config.toml"} and now.keys() == done.keys()
    assert now["config.toml"][1] == done["config.toml"][1]


# ---- two at a time ----


def test_a_second_trainer_is_refused_while_the_first_lives(world, whole, tmp_path, capsys):
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    flags = world.flags(run, **RUN | {"checkpoint__interval": 100, "checkpoint__folder": checkpoints})
    process = processes.start("train", flags, tmp_path / "output", before=partial(processes.hold_at, 4, tmp_path))
    wait_for((tmp_path / "held0").exists, process)
    for folder, change, given in (
        (run, {}, f"job.dump_folder = '{run}'"),
        (run, {"checkpoint__resume": "never"}, f"job.dump_folder = '{run}'"),
        (tmp_path / "other", {"checkpoint__folder": checkpoints}, f"checkpoint.folder = '{checkpoints}'"),
    ):
        assert train.main(world.flags(folder, **RUN | change)) == 2
        line = capsys.readouterr().err
        assert f"{given}: another process is training in it" in line and line.count("\n") == 1
    assert not (tmp_path / "other").exists()
    process.kill()
    process.join()
    assert train.main(flags) == 0
    assert_as_uninterrupted(run, whole)


# ---- continued, started anew ----


def test_never_moves_the_old_folder_aside(world, whole, tmp_path, logged):
    shutil.copytree(whole, tmp_path / "run")
    before = tiny.contents(tmp_path / "run")
    assert train.main(world.flags(tmp_path / "run", **RUN, checkpoint__resume="never", job__seed=7)) == 0
    assert tiny.contents(tmp_path / "run.1") == before
    assert f"the folder of an earlier run is now {tmp_path / 'run.1'}" in logged.text
    assert tiny.reports(tmp_path / "run")[0]["sample_hash"] != tiny.reports(whole)[0]["sample_hash"]
    assert [report["step"] for report in tiny.reports(tmp_path / "run")] == [3, 6, 9, 12, 13]


def test_more_steps_continue_a_finished_run(world, tmp_path):
    constant = RUN | {"lr_scheduler__type": "constant", "lr_scheduler__warmup_steps": 0}
    assert train.main(world.flags(tmp_path / "long", **constant)) == 0
    for steps in (5, STEPS):
        assert train.main(world.flags(tmp_path / "grown", **constant | {"training__num_steps": steps})) == 0
    tiny.assert_same_training(tmp_path / "grown", tmp_path / "long", STEPS)
    assert [report["step"] for report in tiny.reports(tmp_path / "grown")] == [3, 5, 6, 9, 12, 13]


def test_a_finished_run_evaluates_and_exports_again_for_other_keys_only(world, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    keys = {"eval__at_end": "true", "eval__max_new_tokens": 4, "eval__num_prompts": 2, "export__format": "mlp_speculator"}

    def written(**changes) -> dict[str, bool]:
        """Which of its files one more start writes anew."""
        files = {name: run / name for name in ("report.json", "export/model.safetensors", "checkpoints")}
        before = {name: path.stat().st_mtime_ns for name, path in files.items() if path.exists()}
        assert train.main(world.flags(run, **RUN | keys | changes)) == 0
        return {name: before.get(name) != path.stat().st_mtime_ns for name, path in files.items()}

    assert written() == {"report.json": True, "export/model.safetensors": True, "checkpoints": False}
    assert written() == {"report.json": False, "export/model.safetensors": False, "checkpoints": False}
    assert written(export__format="arctic") == {"report.json": False, "export/model.safetensors": True, "checkpoints": False}
    assert json.loads((run / "export" / "config.json").read_text())["architectures"] == ["ArcticMLPSpeculatorPreTrainedModel"]
    again = written(export__format="arctic", eval__max_new_tokens=5)
    assert again == {"report.json": True, "export/model.safetensors": False, "checkpoints": False}
    assert json.loads((run / "report.json").read_text())["max_new_tokens"] == 5
    (run / "finished.json").write_text("[")
    assert written() == {"report.json": True, "export/model.safetensors": True, "checkpoints": False}


def test_load_path_starts_from_another_runs_checkpoint(world, whole, tmp_path, logged):
    before = tiny.contents(whole)
    flags = world.flags(tmp_path / "run", **RUN, checkpoint__load_path=tiny.checkpoint(whole, 8))
    assert train.main(flags) == 0
    tiny.assert_same_training(tmp_path / "run", whole, STEPS)
    assert tiny.learned(tmp_path / "run") == tiny.learned(whole)[2:]
    assert tiny.contents(whole) == before
    assert train.main(flags) == 0  # its own checkpoint counts now
    assert f"resumed from {tiny.checkpoint(tmp_path / 'run', STEPS)}" in logged.text


def test_a_checkpoint_from_before_there_were_packings_and_counters_of_skipped_steps(world, whole, tmp_path):
    """Step 8 lies between two reports."""
    old = Path(shutil.copytree(tiny.checkpoint(whole, 8), tmp_path / "old"))
    state = read_state(old)
    for name in ("unsupervised_steps", "skipped", "skipped_in_a_row", "tokens"):
        del state["report"][name]
    del state["identity"]["data.packing"], state["identity"]["data.overlong"]
    tiny.put_into(old, "state.json", json.dumps(state).encode())
    assert train.main(world.flags(tmp_path / "run", **RUN, checkpoint__load_path=old)) == 0
    tiny.assert_same_training(tmp_path / "run", whole, STEPS)
    assert tiny.learned(tmp_path / "run") == tiny.learned(whole)[2:]


def test_what_may_change_is_logged(world, whole, tmp_path, logged):
    flags = world.flags(tmp_path / "run", **RUN, checkpoint__load_path=tiny.checkpoint(whole, 8), optimizer__lr=0.02)
    assert train.main([*flags, "--training.micro_batch_size=4"]) == 0
    assert "optimizer.lr: 0.01 -> 0.02" in logged.text and "training.micro_batch_size: 2 -> 4" in logged.text
    assert tiny.reports(tmp_path / "run")[-1]["lr"] == 2 * tiny.reports(whole)[-1]["lr"]


@pytest.fixture(scope="module")
def other_base(world) -> Path:
    """A base of the same shape with one number changed."""
    return world.other_base(world.root / "other_base", "model.layers.1.mlp.up_proj.weight", lambda weight: weight[20, 3].add_(1))


CHANGES = {
    "speculator.speculator_width": 16,
    "speculator.n_speculator_heads": 2,
    "speculator.scale_input": "false",
    "data.path": "{root}/data/../data",
    "data.seq_length": 30,
    "training.global_batch_size": 8,
    "job.seed": 43,
    "base.identity": None,
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_run_is_refused_by_key(world, whole, other_base, capsys, key):
    value = str(CHANGES[key]).format(root=world.root)
    flag = f"--{key}={value}" if CHANGES[key] else f"--base.path={other_base}"
    before = tiny.contents(whole)
    assert train.main([*world.flags(whole, **RUN), flag]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{key} was " in line and "checkpoint.resume = never" in line
    assert tiny.contents(whole) == before


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_broken_checkpoint_falls_back_and_all_broken_is_an_error(world, whole, tmp_path, logged, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (STEPS, 12, 8):
        damage(tiny.checkpoint(run, step))
    assert train.main(world.flags(run, **RUN)) == 0
    warnings = [record.getMessage() for record in logged.records if record.levelname == "WARNING"]
    assert [step for step in (STEPS, 12, 8, 4) if any(str(tiny.checkpoint(run, step)) in line for line in warnings)] == [STEPS, 12, 8]
    assert_as_uninterrupted(run, whole)

    for checkpoint in (run / "checkpoints").iterdir():
        damage(checkpoint)
    before = tiny.contents(run)
    capsys.readouterr()
    assert train.main(world.flags(run, **RUN)) == 2
    assert "all 4 checkpoints are broken" in capsys.readouterr().err
    assert tiny.contents(run) == before


def test_only_the_latest_checkpoints_are_kept(world, tmp_path):
    assert train.main(world.flags(tmp_path / "run", **RUN | {"checkpoint__keep_latest_k": 2, "checkpoint__interval": 2})) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000012", "step-00000013"]
