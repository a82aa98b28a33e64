"""What train refuses before it does any work."""

import contextlib
import os
from types import SimpleNamespace

import pytest

from spectitan.config.manager import load
from spectitan.config.sections import Data
from spectitan.data.validation import check_seq_length, check_steps_fit
from spectitan.errors import UserError
from spectitan.run.folders import check_export, folders_to_write, paths_to_read
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.training import run_folder
from spectitan.training.batch_layout import check_batch_fits
from spectitan.training.run_folder import RunFolder, check_can_be_moved, check_can_be_written


def config_of(**changes):
    flags = {"base.path": "base", "data.path": "data", "training.num_steps": "5"}
    flags |= {key.replace("__", "."): value for key, value in changes.items()}
    return load([f"--{key}={value}" for key, value in flags.items()], "train", SPECULATOR_CONFIGS)


@pytest.mark.parametrize("key", ["job.dump_folder", "checkpoint.folder", "metrics.dir", "export.path"])
def test_a_file_where_a_folder_is_to_be_written(tmp_path, key):
    (tmp_path / "file").write_text("mine")
    folders = folders_to_write(config_of(**{key: tmp_path / "file" / "sub"}))
    with pytest.raises(UserError, match=f"^{key} = .*sub.: .*file: it is no folder$"):
        check_can_be_written(key, folders[key])
    check_can_be_written(key, str(tmp_path / "new" / "sub"))
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "new").exists()


def test_folders_that_are_not_written_are_not_checked():
    unused = config_of(job__dump_folder="run", metrics__dir="logs", metrics__loggers="", export__path="out", export__format="none")
    assert folders_to_write(unused) == {"job.dump_folder": "run", "checkpoint.folder": "run/checkpoints"}


def test_a_link_to_a_disk_that_is_not_there(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match=f"^checkpoint.folder = .*: {tmp_path / 'link'}: it is no folder$"):
        check_can_be_written("checkpoint.folder", str(tmp_path / "link" / "sub"))
    (tmp_path / "disk").mkdir()
    check_can_be_written("checkpoint.folder", str(tmp_path / "link" / "sub"))


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name, key", [("checkpoints", "checkpoint.folder"), ("export", "export.path")])
def test_a_file_in_the_runs_folder_where_another_is_to_be_written(tmp_path, name, key, resume):
    """Moved aside with the folder it is in nobody's way."""
    (tmp_path / name).write_text("mine")
    folders = folders_to_write(config_of(job__dump_folder=tmp_path, checkpoint__resume=resume))
    assert (key in folders) == (resume == "auto")
    if resume == "auto":
        with pytest.raises(UserError, match=f"^{key} = '{tmp_path / name}': {tmp_path / name}: it is no folder$"):
            check_can_be_written(key, folders[key])


@pytest.mark.parametrize("seen", [(), ("run",), ("run", "checkpoints")])
def test_folders_of_rank_0s_machine_alone(tmp_path, monkeypatch, seen):
    """Rank 0 has made both; of them another sees `seen`, and not at once."""
    slept = [0.0]

    def sleep(seconds):
        slept.append(slept[-1] + seconds)
        for name in seen:
            (tmp_path / name).mkdir(exist_ok=True)

    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: slept[-1], sleep=sleep))
    monkeypatch.setattr(run_folder.utils, "on_main", lambda work: None)
    problem = contextlib.nullcontext()
    if len(seen) < 2:
        key = ("job.dump_folder", "checkpoint.folder")[len(seen)]
        problem = pytest.raises(
            UserError, match=f"^{key} = .*: process 0 does not see the folder that process 0 has made; allowed: one that"
        )
    with problem:
        RunFolder(tmp_path / "run", str(tmp_path / "checkpoints")).begin("", resume="auto")
    assert len(slept) == 2 if len(seen) == 2 else slept[-1] > 60


@pytest.mark.parametrize("inside", [".", "sub/file"])
@pytest.mark.parametrize(
    "key", ["checkpoint.load_path", "speculator.path", "base.path", "data.path", "data.val_path", "data.drop_overlap", "eval.prompts"]
)
def test_what_a_run_reads_is_not_moved_aside(tmp_path, key, inside):
    run, beside = tmp_path / "run", {"base.path": "spectitan:pystdlib", "data.path": "python:stdlib", "eval.prompts": tmp_path / "runs"}
    check_can_be_moved(run, paths_to_read(config_of(**beside)))
    with pytest.raises(UserError, match=f"^job.dump_folder = .*run' holds {key}: checkpoint.resume = never cannot move that"):
        check_can_be_moved(run, paths_to_read(config_of(**beside | {key: run / inside})))


def test_the_working_folder_is_not_moved_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds the working folder"):
        check_can_be_moved(tmp_path, {})


@pytest.mark.parametrize(
    "format, freeze, type, refused",
    [
        ("auto", "true", "mlp", ["draft"]),
        ("arctic", "false", "mlp", ["draft"]),
        ("auto", "false", "none", ["draft"]),
        ("hf", "false", "mlp", ["draft"]),
        ("auto", "false", "mlp", ["draft", "draft_base"]),  # both are written
        ("none", "true", "mlp", []),
    ],
)
def test_an_export_over_the_base(tmp_path, format, freeze, type, refused):
    config = config_of(export__format=format, base__freeze=freeze, speculator__type=type, export__path=tmp_path / "draft")
    for name in ("draft", "draft_base", "elsewhere"):
        expected = pytest.raises(UserError, match=f"{name} is the base's own folder") if name in refused else contextlib.nullcontext()
        with expected:
            check_export(config, tmp_path / name)


def test_samples_longer_than_the_context():
    check_seq_length(Data(seq_length=64), 64)
    with pytest.raises(UserError, match="^data.seq_length = 65: the base allows at most 64$"):
        check_seq_length(Data(seq_length=65), 64)


def test_samples_in_which_a_step_has_no_target():
    check_steps_fit(Data(seq_length=9), 7)
    with pytest.raises(UserError, match="^data.seq_length = 8: step 7 of the speculator would never have a target; allowed: at least 9$"):
        check_steps_fit(Data(seq_length=8), 7)


@pytest.mark.parametrize("name", ["../other", "/tmp", "..", "a/b", "."])
def test_a_run_name_is_a_name(name):
    assert config_of(job__run_name="first try").job.run_name == "first try"
    with pytest.raises(UserError, match="job.run_name = .*; allowed: a name without /"):
        config_of(job__run_name=name)


@pytest.mark.parametrize("per_machine, needed", [("6", 60 * 4 * (17 + 3 * 24)), ("2", 20 * 4 * (17 + 3 * 24))])
def test_a_batch_beyond_the_machines_memory(monkeypatch, per_machine, needed):
    """60 samples of 4 tokens on 6 ranks, with ids of 8 bytes, a mask, documents of 8, and 3 targets of 3 x 8 for each token."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", per_machine)
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed}
    monkeypatch.setattr(os, "sysconf", memory.get)
    check_batch_fits(60, ranks=6, sample_tokens=4, steps=3)
    memory["SC_PHYS_PAGES"] -= 1
    with pytest.raises(UserError, match="^training.global_batch_size = 60: a step begins when all its samples and targets are in memory"):
        check_batch_fits(60, ranks=6, sample_tokens=4, steps=3)
