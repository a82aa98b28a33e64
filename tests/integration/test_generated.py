"""prepare.generate writes what stage 2 would sample, in parts or whole, and training reads it back with the prompts masked."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch

from spectitan import prepare
from spectitan.config.sections import Data, Stage2
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer, train_bpe
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.sampling import Sampler, Sampling, Stream
from spectitan.errors import StopRequested
from spectitan.keyed_random import uniform
from spectitan.models.registry import get_model
from spectitan.states import generated
from spectitan.states.continued import ContinuedStates
from spectitan.states.online import OnlineStates
from tests.integration import tiny

PROMPTS, PROMPT, NEW, SEED, SAMPLES = 2, 5, 11, 42, 17  # in micro-batches of 2, so that the last one is cut
KEYS = {"stage2__batch_size": 4 * PROMPTS, "stage2__prompt_length": PROMPT, "stage2__seq_length": NEW, "stage2__top_k": 4}
KEYS |= {"prepare__show": 0, "prepare__generate_samples": SAMPLES}


@pytest.fixture(scope="module")
def whole(world) -> Path:
    path = world.root / "whole" / "a.jsonl"
    assert prepare.main(flags(world, path)) == 0
    return path


def flags(world, path: Path, **changes) -> list[str]:
    return world.flags(world.root / "unused", **KEYS | {"prepare__generate": path} | changes)


def rows_of(path: Path) -> list[list[int]]:
    return [row["input"] + row["output"] for row in map(json.loads, path.read_text().splitlines())]


def samples_of(world, size: int):
    data = Data(path=str(world.root / "data"), seq_length=31, holdout=0.2)
    return build_loader(data, load_tokenizer(world.root / "base"), seed=SEED, global_batch_size=size, micro_batch_size=size)


def test_the_ids_are_those_of_stage_2_and_of_plain_decoding(world, whole, monkeypatch):
    base = get_model("embedllama", "auto", world.root / "base").requires_grad_(False)
    config = Stage2(0, 4 * PROMPTS, PROMPT, NEW, 1.0, 4)
    source = ContinuedStates(OnlineStates(base, (), True), config, first_sample=0, prompts=PROMPTS, steps=3, seed=SEED)
    batch = source.begin(next(samples_of(world, SAMPLES)))  # all in one batch
    found = rows_of(whole)
    assert found == batch.tokens.tolist() and len(found) == PROMPTS * SAMPLES

    def quantiles(self, stream, round, step=0):
        assert stream == Stream.TEXT
        return uniform(SEED, Stream.CONTINUATION, self.row_keys, round)

    monkeypatch.setattr(Sampler, "uniform", quantiles)
    prompts = [row[:PROMPT] for row in found]
    plain = generate_plain(base, prompts, NEW, sampling=Sampling(1.0, 4), row_keys=list(range(len(prompts))))
    assert plain.tokens == [row[PROMPT:] for row in found]


def test_reading_back_masks_the_prompts(world, whole):
    loader = build_loader(
        Data(path=str(whole.parent), seq_length=PROMPT + NEW), load_tokenizer(world.root / "base"), seed=0, global_batch_size=1, micro_batch_size=1
    )  # fmt: skip
    (counts,) = loader.counts.values()
    assert counts["kinds"] == {"ids of prompt and response": PROMPTS * SAMPLES} and counts["supervised"] == PROMPTS * SAMPLES * NEW
    found = []
    for _ in range(PROMPTS * SAMPLES):
        batch = next(loader)
        assert batch.loss_mask[0].tolist() == [False] * PROMPT + [True] * NEW and batch.document_ids.unique().tolist() == [0]
        found += batch.tokens.tolist()
    assert sorted(found) == sorted(rows_of(whole))


@pytest.mark.parametrize("start", [1, 4, 10])
def test_processes_share_the_samples(world, whole, tmp_path, start):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert prepare.main(flags(world, first, prepare__generate_samples=start)) == 0
    assert prepare.main(flags(world, second, prepare__generate_start=start, prepare__generate_samples=SAMPLES - start)) == 0
    assert rows_of(first) + rows_of(second) == rows_of(whole)


def test_all_samples_from_a_start_on(world, tmp_path):
    samples = samples_of(world, 1).samples_per_epoch
    assert prepare.main(flags(world, tmp_path / "a", prepare__generate_samples=-1, prepare__generate_start=samples - 3)) == 0
    expected = samples_of(world, samples)
    usable = sum(bool((sample[part : part + 15] >= 0).sum() >= PROMPT) for sample in next(expected).document_ids[-3:] for part in (0, 15))
    assert len(rows_of(tmp_path / "a")) == usable > 0


@pytest.mark.parametrize("left", [0, 1, 300, 1000, -1])
def test_what_was_stopped_goes_on(world, whole, tmp_path, monkeypatch, left):
    """Wherever the part ends: in a line, between lines of a batch, after its last byte."""
    path, begun = tmp_path / "a.jsonl", []
    partial = tmp_path / "a.jsonl.partial"
    partial.write_bytes(whole.read_bytes()[: left if left >= 0 else None])
    (tmp_path / "a.jsonl.json").write_bytes(whole.with_name("a.jsonl.json").read_bytes())
    original = ContinuedStates.begin
    monkeypatch.setattr(ContinuedStates, "begin", lambda self, batch: begun.append(batch.index[0]) or original(self, batch))
    kept = 0
    for first in range(0, SAMPLES, 2):  # batches that are whole
        end = sum(map(len, whole.read_bytes().splitlines(keepends=True)[: min(first + 2, SAMPLES) * PROMPTS]))
        kept += end <= partial.stat().st_size
    assert prepare.main(flags(world, path)) == 0
    assert path.read_bytes() == whole.read_bytes() and not partial.exists()
    assert begun == list(range(2 * kept, SAMPLES, 2))


def test_a_stop_leaves_a_part_that_goes_on(world, whole, tmp_path, monkeypatch):
    original, calls = ContinuedStates.begin, []

    def begin(self, batch):
        calls.append(1)
        if len(calls) == 4:
            raise StopRequested(2)
        return original(self, batch)

    monkeypatch.setattr(ContinuedStates, "begin", begin)
    assert prepare.main(flags(world, tmp_path / "a.jsonl")) == 128 + 2
    assert len((tmp_path / "a.jsonl.partial").read_text().splitlines()) == 3 * 2 * PROMPTS and not (tmp_path / "a.jsonl").exists()
    assert prepare.main(flags(world, tmp_path / "a.jsonl")) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole.read_bytes()


def test_a_whole_file_is_left_alone(world, whole, monkeypatch):
    before = tiny.contents(whole.parent)
    monkeypatch.setattr(ContinuedStates, "begin", None)
    assert prepare.main(flags(world, whole)) == 0
    assert tiny.contents(whole.parent) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage2__temperature": 0.5}, "was written with stage2.temperature = 1.0, and it is 0.5 now"),
        ({"job__seed": 3}, "was written with job.seed = 42"),
        ({"prepare__generate_samples": 4}, "was written with prepare.generate_samples = 17"),
        ({"stage2__seq_length": 60}, "stage2.prompt_length + stage2.seq_length = 65: the base allows at most 64"),
        ({"stage2__batch_size": 6}, "stage2.batch_size = 6; allowed"),
        ({"prepare__generate_start": 10**6, "prepare__generate_samples": -1}, "prepare.generate_start = 1000000; allowed: below the "),
        ({"prepare__generate_samples": 0}, "prepare.generate_samples = 0; allowed: -1, or above 0"),
    ],
)
def test_other_settings_and_what_does_not_fit_are_refused(world, whole, capsys, changes, named):
    assert named in tiny.refusal(prepare, flags(world, whole, **changes), capsys, whole.parent)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage2__prompt_length": 16}, "data.seq_length = 31: stage2.batch_size / training.global_batch_size = 2 prompts"),
        ({"base__variant": "7b"}, "base.variant = '7b' has vocab_size = 32000"),
        ({"base__path": "{tmp_path}/base"}, "the tokenizer has 298 tokens, the model 291"),
        ({"prepare__generate": "{tmp_path}"}, "is a folder; allowed: a file"),
        ({"prepare__generate": "{tmp_path}/base/config.json/a"}, "base/config.json: it is no folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_tokenising(world, tmp_path, capsys, monkeypatch, changes, named):
    shutil.copytree(world.root / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(train_bpe(map(tiny.text, range(tiny.FILES)), tiny.VOCAB + 7), encoding="utf-8")
    monkeypatch.setattr(prepare, "build_loader", None)
    changes = {key: str(value).format(tmp_path=tmp_path) for key, value in changes.items()}
    assert named in tiny.refusal(prepare, flags(world, tmp_path / "a.jsonl", **changes), capsys, tmp_path)


def test_a_file_of_another_origin_is_refused(world, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("mine")
    for description in (None, "no JSON", "[]", "3", "null"):
        if description:
            (tmp_path / "a.jsonl.json").write_text(description)
        assert "does not say how it was made" in tiny.refusal(prepare, flags(world, tmp_path / "a.jsonl"), capsys, tmp_path)
    assert "is a folder" in tiny.refusal(prepare, flags(world, tmp_path), capsys, tmp_path)
    line = tiny.refusal(prepare, world.flags(tmp_path, prepare__generate_start=1), capsys, tmp_path)
    assert "prepare.generate_start = 1 without prepare.generate" in line


def test_two_writers_of_one_file_are_refused(world, tmp_path, capsys):
    with (tmp_path / "a.jsonl.partial").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing it" in tiny.refusal(prepare, flags(world, tmp_path / "a.jsonl"), capsys, tmp_path)


def test_text_without_a_prompt_is_refused(tmp_path, world):
    """A sample that is all padding but for less than a prompt."""
    path, settings = tmp_path / "a.jsonl", {"stage2.prompt_length": PROMPT}
    batch = next(samples_of(world, 1))
    batch = batch._replace(document_ids=torch.full_like(batch.document_ids, -1))
    base = get_model("embedllama", "auto", world.root / "base").requires_grad_(False)
    source = ContinuedStates(OnlineStates(base, (), True), Stage2(0, 1, PROMPT, NEW), first_sample=0, prompts=1, steps=1, seed=1)
    with pytest.raises(generated.UserError, match=f"stage2.prompt_length = {PROMPT}: the text gives no prompt"):
        generated.write_generated(path, settings, 1, iter([batch]), lambda: source)
    assert not path.exists()
