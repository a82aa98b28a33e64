"""Hidden states from the base, from a cache, or both: the same training, whatever they come from; caches that do not fit are refused."""

import errno
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from spectitan import prepare, train
from spectitan.models.decoder import Decoder
from spectitan.models.registry import fill_model
from spectitan.run import model
from spectitan.states import cache_files
from spectitan.training.checkpoint_reading import read_tensors
from tests.integration import processes, tiny

STEPS = 20
SAMPLES = 2 * STEPS
RUN = {"training__num_steps": STEPS, "checkpoint__interval": STEPS, "metrics__report_interval": 1, "objective__loss": "kl_div"}
RUN |= {"training__global_batch_size": 2}
RUN |= {"eval__at_end": "false", "export__format": "none"}
HELD_OUT = 6  # samples, as eval.loss_samples says
FAMILIES = {"mlp": {}, "lstm": {"speculator__type": "lstm"}, "eagle3": {"speculator__type": "eagle3"}}
FAMILIES["eagle3_padded"] = FAMILIES["eagle3"] | {"data__packing": "best_fit", "speculator__ttt_steps": 2, "data__seq_length": 47}


def online(keys: dict) -> dict:
    """The keys of the same run without files."""
    return {name: value for name, value in keys.items() if name != "states__dtype"}


def losses(run: Path) -> list:
    return [(report["loss"], report["grad_norm"], report["supervised_tokens"]) for report in tiny.reports(run)]


def counts(run: Path) -> dict[str, int]:
    """Over all of a run's reports."""
    reports = [report["state_counts"] for report in tiny.reports(run)]
    return {name: sum(report[name] for report in reports) for name in reports[0]}


def assert_same(left: Path, right: Path, step: int = STEPS) -> None:
    """Losses, gradient norms, and at the end every weight and number of the optimizer: bit for bit."""
    assert losses(left) == losses(right)
    ours, theirs = (read_tensors(tiny.checkpoint(run, step)) for run in (left, right))
    assert ours.keys() == theirs.keys() and len(ours) > 3
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("family, dtype", [*((family, "float32") for family in FAMILIES), ("mlp", "bfloat16"), ("eagle3", "bfloat16")])
def test_online_hybrid_and_offline_train_alike(world, tmp_path, family, dtype):
    """Bit for bit, in the dtype that is computed in; offline holds no layer of the base."""
    keys = RUN | FAMILIES[family] | {"training__compute_dtype": dtype, "states__dtype": dtype}
    cache = {"states__hidden_states_path": tmp_path / "states"}
    assert train.main(world.flags(tmp_path / "online", **online(keys))) == 0
    assert train.main(world.flags(tmp_path / "hybrid", **keys, **cache, states__source="hybrid")) == 0
    assert counts(tmp_path / "hybrid") == {"cached": 0, "generated": SAMPLES, "kept": SAMPLES, "skipped": 0}
    assert_same(tmp_path / "hybrid", tmp_path / "online")
    before = tiny.contents(tmp_path / "states")
    assert train.main(world.flags(tmp_path / "offline", **keys, **cache, states__source="offline")) == 0
    assert counts(tmp_path / "offline") == {"cached": SAMPLES, "generated": 0, "kept": 0, "skipped": 0}
    assert_same(tmp_path / "offline", tmp_path / "online")
    assert tiny.contents(tmp_path / "states") == before


@pytest.fixture(scope="module")
def filled(world, tmp_path_factory) -> Path:
    """The cache of EAGLE-3's layers, for all samples, by the program that fills it."""
    states = tmp_path_factory.mktemp("filled") / "states"
    assert prepare.main(world.flags(states.parent, **EAGLE3, states__hidden_states_path=states, prepare__states="true")) == 0
    return states


EAGLE3 = (
    RUN
    | {"training__global_batch_size": 4}
    | FAMILIES["eagle3"]
    | {"states__dtype": "float32", "training__num_steps": -1, "training__epochs": 1, "eval__prompts": "none"}
)


def test_a_cache_filled_ahead_is_what_training_reads(world, filled, tmp_path, monkeypatch, capsys):
    """Also for another family, which reads the final state alone, with held-out losses on the way. No layer of the base is made."""
    keys = EAGLE3 | {"training__num_steps": 8, "training__epochs": -1, "eval__interval": 3}
    offline = {"states__hidden_states_path": filled, "states__source": "offline"}
    for family in ("eagle3", "mlp"):
        keys |= {"speculator__type": family}
        by_base, run = tmp_path / f"online_{family}", tmp_path / family
        assert train.main(world.flags(by_base, **online(keys))) == 0
        made = []
        with monkeypatch.context() as without:
            without.setattr(Decoder, "forward", None)
            without.setattr(model, "fill_model", lambda base, *rest: (made.extend(dict(base.named_parameters())), fill_model(base, *rest)))
            assert train.main(world.flags(run, **keys, **offline)) == 0
        assert losses(run) == losses(by_base) and set(made) == {"readout.embedding.weight", "readout.norm.weight"}  # its head is tied
        assert (run / "evaluations.jsonl").read_text() == (by_base / "evaluations.jsonl").read_text() != ""
    assert prepare.main(world.flags(tmp_path / "again", **EAGLE3, states__hidden_states_path=filled, prepare__states="true")) == 0
    assert ": 0 samples added, " in capsys.readouterr().out


def test_two_epochs_of_hybrid(world, tmp_path):
    """The first fills the cache, the second reads it alone."""
    keys = EAGLE3 | {"training__epochs": 2, "data__holdout": 0.5, "training__global_batch_size": 2}
    assert train.main(world.flags(tmp_path / "run", **keys, states__source="hybrid")) == 0
    reports = tiny.reports(tmp_path / "run")
    samples = counts(tmp_path / "run")["kept"]
    steps = len(reports)
    assert 2 * samples <= 2 * steps <= 2 * samples + 1 and samples > 20
    half = steps // 2
    generated = [report["state_counts"]["generated"] for report in reports]
    assert generated[:half] == [2] * half and generated[half + steps % 2 :] == [0] * half  # one step may be of both epochs
    assert [report["state_counts"]["cached"] for report in reports] == [2 - count for count in generated]
    assert (tmp_path / "run" / "hidden_states" / "meta.json").exists()


def test_states_that_are_not_kept(world, tmp_path):
    keys = EAGLE3 | {"training__num_steps": 3, "training__epochs": -1, "states__source": "hybrid", "states__on_generate": "delete"}
    assert train.main(world.flags(tmp_path / "online", **online(EAGLE3) | {"training__num_steps": 3, "training__epochs": -1})) == 0
    assert train.main(world.flags(tmp_path / "run", **keys)) == 0
    assert counts(tmp_path / "run")["kept"] == 0 and losses(tmp_path / "run") == losses(tmp_path / "online")
    assert not list((tmp_path / "run" / "hidden_states").glob("*.states"))


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.01), ("float16", 0.001), ("int8", 0.02)])
def test_rounded_states_train_nearly_alike(world, filled, tmp_path, dtype, tolerance):
    """Losses of ten steps differ, by no more than the rounding explains."""
    keys = EAGLE3 | {"training__num_steps": 10, "training__epochs": -1, "states__dtype": dtype}
    exact = {"states__source": "offline", "states__hidden_states_path": filled}
    assert train.main(world.flags(tmp_path / "exact", **keys, **exact)) == 0
    assert prepare.main(world.flags(tmp_path / "run", **keys, prepare__states="true")) == 0
    assert train.main(world.flags(tmp_path / "run", **keys, states__source="offline")) == 0
    ours, theirs = (torch.tensor([loss for loss, *_ in losses(tmp_path / name)]) for name in ("run", "exact"))
    assert 0 < ((ours - theirs).abs() / theirs).max() < tolerance
    sizes = [sum(path.stat().st_size for path in folder.glob("*.states")) for folder in (tmp_path / "run" / "hidden_states", filled)]
    samples = [len(read_records(folder)) for folder in (tmp_path / "run" / "hidden_states", filled)]
    numbers = {"bfloat16": 2, "float16": 2, "int8": 1 + 4 / tiny.CONFIG.hidden_size}[dtype] / 4
    assert sizes[0] / samples[0] == pytest.approx(numbers * sizes[1] / samples[1], rel=0.01)


def read_records(states: Path) -> np.ndarray:
    contents = [path.read_bytes().partition(b"\n")[2] for path in states.glob("*.index")]
    return np.frombuffer(b"".join(contents), cache_files.RECORD)


def test_the_second_stage_after_a_cached_first(world, filled, tmp_path):
    """Stage 1 reads the cache, stage 2 has the base write its text and compute its states, as without a cache."""
    keys = EAGLE3 | {"training__num_steps": 6, "training__epochs": -1, "stage2__start_step": 4, "stage2__prompt_length": 5}
    keys |= {"stage2__seq_length": 7}
    assert train.main(world.flags(tmp_path / "online", **online(keys))) == 0
    hybrid = {"states__source": "hybrid", "states__hidden_states_path": filled}
    assert train.main(world.flags(tmp_path / "hybrid", **keys, **hybrid)) == 0
    assert_same(tmp_path / "hybrid", tmp_path / "online", 6)
    assert counts(tmp_path / "hybrid") == {"cached": 16, "generated": 0, "kept": 0, "skipped": 0}


def test_noise_is_the_same_wherever_states_come_from(world, filled, tmp_path):
    """And moves what is trained, not what is held out."""
    keys = EAGLE3 | {"training__num_steps": 4, "training__epochs": -1, "eval__interval": 1, "optimizer__lr": 1e-12}
    offline = {"states__source": "offline", "states__hidden_states_path": filled}
    for name, changes in {"plain": {}, "online": {"states__noise_std": 0.3}, "offline": offline | {"states__noise_std": 0.3}}.items():
        assert train.main(world.flags(tmp_path / name, **online(keys) | changes)) == 0
    assert losses(tmp_path / "online") == losses(tmp_path / "offline") != losses(tmp_path / "plain")
    noisy, plain = (json.loads((tmp_path / name / "evaluations.jsonl").read_text().splitlines()[0]) for name in ("online", "plain"))
    assert noisy["heldout_loss/head_0"] == pytest.approx(plain["heldout_loss/head_0"], rel=1e-6)


def test_an_offline_run_is_measured_and_exported_with_its_base(world, filled, tmp_path):
    """Which is read for it; on the way as well as at the end."""
    keys = {name: value for name, value in EAGLE3.items() if name not in ("eval__prompts", "eval__at_end", "export__format")}
    keys |= {"training__num_steps": 4, "training__epochs": -1, "eval__interval": 2}
    offline = {"states__source": "offline", "states__hidden_states_path": filled}
    for name, changes in {"online": {}, "offline": offline}.items():
        assert train.main(world.flags(tmp_path / name, **online(keys) | changes)) == 0
    ours, theirs = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("offline", "online"))
    assert ours["acceptance_length"] == theirs["acceptance_length"] and ours["heldout_loss"] == theirs["heldout_loss"]
    assert (tmp_path / "offline" / "evaluations.jsonl").read_text() == (tmp_path / "online" / "evaluations.jsonl").read_text()
    assert (tmp_path / "offline" / "export" / "model.safetensors").read_bytes() == (
        (tmp_path / "online" / "export" / "model.safetensors").read_bytes()
    )


def test_a_stopped_hybrid_run_goes_on(world, filled, tmp_path):
    """As if it had not been stopped; what it had cached is read, or made again."""
    keys = EAGLE3 | {"training__num_steps": 8, "training__epochs": -1, "states__source": "hybrid", "checkpoint__interval": 3}
    assert train.main(world.flags(tmp_path / "whole", **keys)) == 0
    flags = world.flags(tmp_path / "run", **keys)
    processes.run_killed("train", flags, tmp_path / "output", "spectitan.train", "step_if_finite", 5)
    assert train.main(flags) == 0
    assert_same(tmp_path / "run", tmp_path / "whole", 8)
    after = tiny.reports(tmp_path / "run")[3:]
    assert after[0]["state_counts"]["cached"] == 4 and after[-1]["state_counts"]["generated"] == 4


# ---- accidents ----


def full_disk(monkeypatch, writes: int) -> None:
    """So many writes go well; then the disk has room for half of one."""
    original, calls = cache_files._write, []

    def write(file, content):
        calls.append(1)
        if len(calls) > writes:
            original(file, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file, content)

    monkeypatch.setattr(cache_files, "_write", write)


def test_a_disk_that_is_full(world, tmp_path, monkeypatch, caplog, refused):
    """Training goes on without caching, and says so once; what was cached is whole. Filling ahead stops instead."""
    keys, cache = RUN | FAMILIES["mlp"] | {"states__dtype": "float32"}, {"states__hidden_states_path": tmp_path / "states"}
    assert train.main(world.flags(tmp_path / "online", **online(keys))) == 0
    with monkeypatch.context() as full:
        full_disk(full, writes=1 + 2 * 7)
        assert train.main(world.flags(tmp_path / "hybrid", **keys, **cache, states__source="hybrid")) == 0
    assert counts(tmp_path / "hybrid") == {"cached": 0, "generated": SAMPLES, "kept": 7, "skipped": 0}
    assert_same(tmp_path / "hybrid", tmp_path / "online")
    said = [record.message for record in caplog.records if "cached no more" in record.message]
    assert len(said) == 1 and str(tmp_path / "states") in said[0] and "No space left on device" in said[0]

    assert train.main(world.flags(tmp_path / "offline", **keys, **cache, states__source="offline", states__on_missing="skip")) == 0
    assert counts(tmp_path / "offline") == {"cached": 7, "generated": 0, "kept": 0, "skipped": SAMPLES - 7}
    full_disk(monkeypatch, writes=2 * 3)
    line = refused(world.flags(tmp_path / "fill", **keys, **cache, prepare__states="true"), "prepare")
    assert str(tmp_path / "states") in line and "No space left on device" in line


def test_too_little_room(world, some, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    cache = {"states__hidden_states_path": tmp_path / "states", "prepare__states": "true"}
    line = refused(world.flags(tmp_path / "run", **EAGLE3, **cache), "prepare")
    assert "do not fit" in line and "states.hidden_states_path" in line
    more = {"states__hidden_states_path": some, "prepare__states": "true"}  # of which a part is there
    assert "do not fit" in refused(world.flags(tmp_path / "run", **EAGLE3, **more), "prepare")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base__path": "other"}, ["another base", "base.allow_other"]),
        ({"speculator__target_layer_ids": "0,9"}, ["speculator.target_layer_ids"]),
        ({"states__hidden_states_path": "file"}, ["states.hidden_states_path", "it is no folder"]),
        ({"states__hidden_states_path": "hs"}, ["states.format = hs", "another folder"]),
    ],
)
def test_what_cannot_be_filled_is_refused_before_the_text_is_read(world, some, tmp_path, monkeypatch, refused, changes, words):
    monkeypatch.setattr(prepare, "build_loader", None)
    keys = EAGLE3 | {"states__hidden_states_path": some, "prepare__states": "true"}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "hs").mkdir()
    (tmp_path / "hs" / "hs_0.safetensors").write_bytes(b"")
    changes = {name: tmp_path / value if name.endswith("path") else value for name, value in changes.items()}
    if "base__path" in changes:
        changes = other_base(world, tmp_path)
    line = refused(world.flags(tmp_path / "run", **keys | changes), "prepare")
    assert all(word in line for word in words), line
    assert os.listdir(tmp_path / "hs") == ["hs_0.safetensors"]


def test_killed_while_it_fills(world, filled, tmp_path):
    """The same command goes on, and what both have written is read."""
    flags = world.flags(tmp_path / "run", **EAGLE3, states__hidden_states_path=tmp_path / "states", prepare__states="true")
    processes.run_killed("prepare", flags, tmp_path / "output", cache_files.__name__, "_write", 20)
    assert not list((tmp_path / "states").glob("*.json.tmp")) and sizes_of(tmp_path / "states")[0] == 9
    assert prepare.main(flags) == 0
    assert sizes_of(tmp_path / "states") == [9, sizes_of(filled)[0] - 9]
    keys = EAGLE3 | {"training__num_steps": 7, "training__epochs": -1, "states__source": "offline"}
    for run, states in (("again", tmp_path / "states"), ("whole", filled)):
        assert train.main(world.flags(tmp_path / run, **keys, states__hidden_states_path=states)) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


def sizes_of(states: Path) -> list[int]:
    """Records of each shard, the fewest first; held-out samples have a shard of their own, the last."""
    headers = [len(path.read_bytes().partition(b"\n")[0]) + 1 for path in states.glob("*.index")]
    sizes = [path.stat().st_size for path in states.glob("*.index")]
    records = sorted((size - header) // cache_files.RECORD.itemsize for size, header in zip(sizes, headers))
    return [count for count in records if count != HELD_OUT]


def test_two_at_once(world, filled, tmp_path):
    """Two programs that fill one folder disturb each other in nothing."""
    flags = world.flags(tmp_path / "run", **EAGLE3, states__hidden_states_path=tmp_path / "states", prepare__states="true")
    started = [processes.start("prepare", flags, tmp_path / f"output{number}") for number in range(2)]
    assert processes.join(started) == [0, 0], (tmp_path / "output0").read_text() + (tmp_path / "output1").read_text()
    keys = EAGLE3 | {"states__source": "offline"}
    for run, states in (("again", tmp_path / "states"), ("whole", filled)):
        assert train.main(world.flags(tmp_path / run, **keys, states__hidden_states_path=states)) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


# ---- what is missing ----


@pytest.fixture(scope="module")
def some(world, tmp_path_factory) -> Path:
    """The cache of the samples of three steps."""
    states = tmp_path_factory.mktemp("some") / "states"
    keys = EAGLE3 | {"training__num_steps": 3, "training__epochs": -1}
    assert prepare.main(world.flags(states.parent, **keys, states__hidden_states_path=states, prepare__states="true")) == 0
    return states


FIVE_STEPS = EAGLE3 | {"training__num_steps": 5, "training__epochs": -1, "states__source": "offline"}


@pytest.mark.parametrize("on_missing", ["skip", "warn"])
def test_samples_that_are_skipped(world, some, tmp_path, caplog, on_missing):
    keys = FIVE_STEPS | {"states__hidden_states_path": some, "states__on_missing": on_missing}
    assert train.main(world.flags(tmp_path / "run", **keys)) == 0
    reports = tiny.reports(tmp_path / "run")
    assert [report["state_counts"]["cached"] for report in reports] == [4, 4, 4, 0, 0]
    assert [report["state_counts"]["skipped"] for report in reports] == [0, 0, 0, 4, 4]
    assert [report["unsupervised_steps"] for report in reports] == [0, 0, 0, 1, 1]
    assert [report["supervised_tokens"] > 0 for report in reports] == [True, True, True, False, False]
    named = [record.message for record in caplog.records if record.message.startswith("skipped, without hidden states: sample ")]
    assert len(named) == (4 if on_missing == "warn" else 0)  # one a micro-batch
    assert any("8 of 20 samples" in record.message for record in caplog.records)


def test_samples_that_are_asked_for(world, some, tmp_path, refused):
    for on_missing in ("raise", "auto"):
        keys = FIVE_STEPS | {"states__hidden_states_path": some, "states__on_missing": on_missing}
        line = refused(world.flags(tmp_path / "run", **keys))
        assert "8 of 20 samples" in line and str(some) in line and "prepare.states" in line
    assert not (tmp_path / "run").exists()


# ---- caches that do not fit ----


def other_base(world, tmp_path: Path) -> dict:
    return {"base__path": world.other_base(tmp_path / "base", "model.layers.1.mlp.up_proj.weight", lambda weight: weight.mul_(1.01))}


def other_text(world, tmp_path: Path) -> dict:
    shutil.copytree(world.root / "data", tmp_path / "data")
    (tmp_path / "data" / "03.txt").write_text("something else")
    return {"data__path": tmp_path / "data"}


@pytest.mark.parametrize(
    "changes, words",
    [
        (other_base, ["another base", "base.allow_other"]),
        (
            other_text,
            ["no hidden states of this run's samples; there: another text, or one chosen or tokenised otherwise; allowed: fill it"],
        ),
        ({"data__seq_length": 29}, ["no hidden states of this run's samples; there: seq_length 31, here 29; allowed: fill it"]),
        ({"data__packing": "best_fit"}, ["there: packing concat, here best_fit; allowed: fill it"]),
        ({"states__hidden_states_path": "nowhere"}, ["nowhere", "no hidden states there", "prepare.states"]),
        ({"states__source": "hybrid", "states__dtype": "int8"}, ["states.dtype = int8", "float32"]),
        ({"states__on_missing": "generate"}, ["states.on_missing = generate", "skip, warn, raise"]),
        ({"states__source": "hybrid", "states__on_missing": "skip"}, ["states.on_missing = skip", "generate"]),
        ({"states__source": "online"}, ["states.hidden_states_path", "online"]),
        ({"states__on_generate": "delete"}, ["states.on_generate", "hybrid"]),
        ({"base__freeze": "false"}, ["states.source = offline", "base.freeze"]),
        ({"stage2__start_step": 1}, ["stage2.start_step", "hybrid"]),
        ({"speculator__type": "mlp", "states__noise_std": 0.05}, ["states.noise_std", "mlp"]),
        ({"states__dtype": "int4"}, ["states.dtype", "int8"]),
    ],
)
def test_a_cache_that_does_not_fit(world, filled, tmp_path, refused, changes, words):
    changes = changes(world, tmp_path) if callable(changes) else changes
    keys = FIVE_STEPS | {"states__hidden_states_path": filled} | changes
    line = refused(world.flags(tmp_path / "run", **keys))
    assert all(word in line for word in words), line


def test_a_cache_of_other_layers(world, tmp_path, refused):
    keys = FIVE_STEPS | {"states__hidden_states_path": tmp_path / "states"}
    two = {"speculator__target_layer_ids": "0,2", "prepare__states": "true"}
    assert prepare.main(world.flags(tmp_path / "run", **keys, **two)) == 0
    line = refused(world.flags(tmp_path / "run", **keys, speculator__target_layer_ids="0,1"))
    assert "layers [0, 2]" in line and "reads [0, 1]" in line and "speculator.target_layer_ids" in line
    assert train.main(world.flags(tmp_path / "run", **keys, speculator__target_layer_ids="2")) == 0  # one of them


def truncated(states: Path) -> Path:
    largest = max(states.glob("*.states"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    return largest


def altered(states: Path) -> Path:
    largest = max(states.glob("*.states"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    for place in range(50, len(content), 500):
        content[place] ^= 1
    largest.write_bytes(content)
    return largest


def truncated_index(states: Path) -> Path:
    largest = max(states.glob("*.index"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - cache_files.RECORD.itemsize)
    return largest


def altered_index(states: Path) -> Path:
    largest = max(states.glob("*.index"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-30] ^= 1
    largest.write_bytes(content)
    return largest


def altered_header(states: Path) -> Path:
    largest = max(states.glob("*.index"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes())
    return largest


def altered_meta(states: Path) -> Path:
    (states / "meta.json").write_text("{}")
    return states / "meta.json"


def other_ids(states: Path) -> Path:
    """The index says that the samples are of other token ids, and its checksums are right."""
    largest = max(states.glob("*.index"), key=lambda path: path.stat().st_size)
    header, _, content = largest.read_bytes().partition(b"\n")
    records = np.frombuffer(content, cache_files.RECORD).copy()
    records["ids"] ^= 1
    records["self"] = [zlib.crc32(record.tobytes()[:-4]) for record in records]
    largest.write_bytes(header + b"\n" + records.tobytes())
    return largest.with_suffix(".states")


def not_finite(states: Path) -> Path:
    """With checksums that are right."""
    largest = max(states.glob("*.index"), key=lambda path: path.stat().st_size)
    header, _, content = largest.read_bytes().partition(b"\n")
    records, numbers = np.frombuffer(content, cache_files.RECORD).copy(), np.fromfile(largest.with_suffix(".states"), np.float32)
    for record in records:
        start, size = record["offset"] // 4, record["tokens"] * 4 * tiny.CONFIG.hidden_size  # three layers and the final state
        numbers[start + size - 1] = np.nan
        record["states"] = zlib.crc32(numbers[start : start + size])
        record["self"] = zlib.crc32(record.tobytes()[:-4])
    numbers.tofile(largest.with_suffix(".states"))
    largest.write_bytes(header + b"\n" + records.tobytes())
    return largest.with_suffix(".states")


@pytest.mark.parametrize(
    "damage", [not_finite, truncated, altered, truncated_index, altered_index, altered_header, altered_meta, other_ids]
)
def test_a_damaged_cache(world, filled, tmp_path, refused, damage):
    shutil.copytree(filled, tmp_path / "states")
    file = damage(tmp_path / "states")
    line = refused(world.flags(tmp_path / "run", **FIVE_STEPS, states__hidden_states_path=tmp_path / "states"))
    assert str(file) in line and (damage is not not_finite or "the final state at token 30 is not finite" in line)


def test_states_that_are_not_finite(world, tmp_path, refused):
    """A base too loud for float16: refused before it is cached, by sample, layer and token."""
    loud = world.other_base(tmp_path / "base", "model.embed_tokens.weight", lambda weight: weight.mul_(1e6))
    keys = EAGLE3 | {"base__path": loud, "states__dtype": "float16", "states__hidden_states_path": tmp_path / "states"}
    line = refused(world.flags(tmp_path / "run", **keys, prepare__states="true"), "prepare")
    assert "sample " in line and "layer 0 at token " in line and "not finite as float16" in line
    assert not list((tmp_path / "states").glob("*.states"))
