"""Checkpoints at a URL: in fsspec's memory, and on its local file system, where a save can be interrupted for real."""

import json

import pytest

from spectitan import train
from spectitan.training.checkpoint import Checkpointer
from spectitan.training.checkpoint_reading import find_checkpoint, read_state, read_tensors
from tests.integration import processes, tiny
from tests.integration.tiny import SHORT

STEPS = SHORT["training__num_steps"]


@pytest.fixture
def memory():
    from fsspec.implementations.memory import MemoryFileSystem

    yield "memory://bucket/run"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def assert_equal(url: str, run) -> None:
    ours, theirs = read_tensors(f"{url}/step-{STEPS:08d}"), read_tensors(tiny.checkpoint(run, STEPS))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert read_state(f"{url}/step-{STEPS:08d}")["position"] == read_state(tiny.checkpoint(run, STEPS))["position"]


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_a_run_goes_on_from_a_url(world, run, tmp_path, memory, mode):
    keys = SHORT | {"checkpoint__folder": memory, "checkpoint__async_mode": mode, "lr_scheduler__type": "constant"}
    for steps in (3, STEPS):
        assert train.main(world.flags(tmp_path / "run", **keys | {"training__num_steps": steps})) == 0
    assert train.main(world.flags(tmp_path / "local", **SHORT, lr_scheduler__type="constant")) == 0
    assert [report["step"] for report in tiny.reports(tmp_path / "run")] == [2, 3, 4]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert_equal(memory, tmp_path / "local")
    assert [path.name for path in Checkpointer(memory).folder.iterdir()] == ["step-00000003", "step-00000004"]


def test_programs_read_from_a_url(world, run, tmp_path, memory, capsys):
    assert train.main(world.flags(tmp_path / "run", **SHORT, checkpoint__folder=memory)) == 0
    assert_equal(memory, run)
    for source, folder in ((memory, "one"), (f"{memory}/step-{STEPS:08d}", "two")):
        assert (
            tiny.PROGRAMS["export"].main(
                [f"--base.path={world.root / 'base'}", f"--speculator.path={source}", f"--export.path={tmp_path / folder}"]
            )
            == 0
        )
        assert (tmp_path / folder / "model.safetensors").exists()
    flags = world.flags(tmp_path / "other", **SHORT | {"training__num_steps": STEPS + 1}, checkpoint__load_path=memory)
    assert train.main(flags) == 0
    assert [report["step"] for report in tiny.reports(tmp_path / "other")][-1] == STEPS + 1
    never = world.flags(tmp_path / "run", **SHORT, checkpoint__folder=memory, checkpoint__resume="never")
    capsys.readouterr()
    assert train.main(never) == 2
    assert "holds checkpoints: checkpoint.resume = never cannot move them" in capsys.readouterr().err


def test_a_broken_checkpoint_at_a_url_falls_back(world, run, tmp_path, memory, caplog):
    assert train.main(world.flags(tmp_path / "run", **SHORT, checkpoint__folder=memory)) == 0
    checkpointer = Checkpointer(memory)
    file = checkpointer.folder / f"step-{STEPS:08d}" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert checkpointer.newest_valid().name == "step-00000002" and "step-00000004 is broken" in caplog.text
    assert find_checkpoint(memory).name == "step-00000002"


@pytest.mark.parametrize("call", [3, 4])
def test_kill_9_before_the_manifest(world, run, tmp_path, call):
    """At step 4: before state.json, before manifest.json."""
    url, folder = f"file://{tmp_path / 'checkpoints'}", tmp_path / "checkpoints"
    flags = world.flags(tmp_path / "run", **SHORT, checkpoint__folder=url)
    processes.run_killed("train", flags, tmp_path / "output", "spectitan.training.checkpoint", "write_json", call)
    unfinished = {path.name for path in (folder / "step-00000004").iterdir()}
    assert "__0_0.distcp" in unfinished and "manifest.json" not in unfinished
    assert find_checkpoint(url).name == "step-00000002"
    assert train.main(flags) == 0
    assert_equal(url, run)
    assert json.loads((folder / "step-00000004" / "manifest.json").read_text())["files"].keys() >= {
        ".metadata",
        "state.json",
        "__0_0.distcp",
    }


@pytest.mark.parametrize("url, words", [("nowhere://x/y", "nowhere://x/y: "), ("s3://bucket/run", "s3://bucket/run: ")])
def test_a_url_that_cannot_be_had_is_refused(world, refused, url, words):
    assert words in refused(world.flags(world.root / "run", **SHORT, checkpoint__folder=url))
