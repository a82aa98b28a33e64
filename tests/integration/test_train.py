"""Training whole, in the process: against a plain loop, from the first step to report and export, in every precision."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from spectitan import evaluate, train
from spectitan.config.manager import load
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer
from spectitan.models.registry import get_model
from spectitan.speculators.registry import SPECULATOR_CONFIGS, build_speculator
from spectitan.training.checkpoint_reading import read_state, read_tensors
from spectitan.training.schedule import learning_rate_multiplier
from tests.integration import tiny

NO_END = {"eval__at_end": "false", "export__format": "none"}


@pytest.fixture(scope="module")
def base_run(world):
    """A base trained from random weights, and exported."""
    changes = tiny.BASE_ALONE | {"training__num_steps": 90, "checkpoint__interval": 100, "metrics__report_interval": 30}
    assert train.main(world.flags(world.root / "base_run", **changes)) == 0
    return world.root / "base_run"


@pytest.fixture(scope="module")
def run(world, base_run):
    """A speculator trained for that base, with evaluation and export."""
    changes = {"training__num_steps": 40, "checkpoint__interval": 30, "metrics__report_interval": 15, "metrics__loggers": "tensorboard"}
    assert train.main(world.flags(world.root / "run", base__path=base_run / "export", **changes)) == 0
    return world.root / "run"


def losses(folder) -> torch.Tensor:
    """[reports, heads]"""
    return torch.tensor([report["loss"] for report in tiny.reports(folder)], dtype=torch.float64)


def test_a_base_alone_is_trained_and_transformers_reads_it(base_run):
    first, *_, last = losses(base_run).tolist()
    assert last[0] < 0.6 * first[0]
    model = AutoModelForCausalLM.from_pretrained(base_run / "export", dtype=torch.float32)
    ours = get_model("embedllama", "auto", base_run / "export")
    saved = read_tensors(tiny.checkpoint(base_run, 90), "base.")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16().float()), name
    tokens = torch.randint(0, tiny.VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.readout.logits(ours(tokens).final), model(tokens).logits, rtol=1e-4, atol=1e-5)
    report = json.loads((base_run / "report.json").read_text())
    assert report["step"] == 90 and report["base_heldout_loss"] < 3 and "acceptance_length" not in report


def test_a_run_leaves_what_it_promises(world, run):
    names = {path.name for path in run.iterdir()}
    files = {".lock", "acceptance.svg", "config.toml", "finished.json", "metrics.jsonl", "report.json"}
    assert names == files | {"checkpoints", "export", "tensorboard"}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000030", "step-00000040"]
    assert list((run / "tensorboard").glob("events*"))

    reports = tiny.reports(run)
    assert [report["step"] for report in reports] == [15, 30, 40]
    for report in reports:
        keys = {"step", "lr", "loss", "accuracy", "grad_norm", "supervised_tokens", "tokens_by_dataset", "sample_hash"}
        assert keys <= report.keys() and len(report["loss"]) == len(report["accuracy"]) == 3
        assert sum(report["tokens_by_dataset"].values()) > report["supervised_tokens"] > 0
    assert (losses(run)[-1] < 0.8 * losses(run)[0]).all()

    report = json.loads((run / "report.json").read_text())
    section_6 = "acceptance_length acceptance_length_mean acceptance_by_position conditional_acceptance plain_tokens_per_second "
    section_6 += "speculative_tokens_per_second speedup round_cost identical sequences dtype overlap max_new_tokens prompt_tokens"
    assert set(section_6.split()) <= report.keys()
    assert report["step"] == 40 and report["identical"] is True and report["overlap"] == 0 and report["sequences"] == 3
    assert report["acceptance_length"] > 1
    assert math.isclose(report["acceptance_length"], 1 + sum(report["acceptance_by_position"]), rel_tol=1e-12)
    assert json.loads((run / "export" / "config.json").read_text())["n_predict"] == 3


def test_checkpoint_and_exported_folder_are_worth_the_same(world, base_run, run, tmp_path):
    timed = ("tokens_per_second", "speedup", "round_cost")
    figures = []
    for number, path in enumerate([run / "export", tiny.checkpoint(run, 40), run]):
        flags = world.flags(tmp_path / str(number), base__path=base_run / "export", speculator__path=path)
        assert evaluate.main(flags) == 0
        report = json.loads((tmp_path / str(number) / "report.json").read_text())
        assert report.pop("step", 40) == 40
        figures.append({key: value for key, value in report.items() if not key.endswith(timed)})
    at_end = json.loads((run / "report.json").read_text())
    assert figures[0] == figures[1] == figures[2] == {key: at_end[key] for key in figures[0]}


def test_the_resolved_configuration_runs_again_bit_equal(run, tmp_path):
    again = ["--job.config_file", str(run / "config.toml"), "--job.dump_folder", str(tmp_path / "again"), "--metrics.loggers="]
    assert train.main(again) == 0
    tiny.assert_same_training(tmp_path / "again", run, 40)
    assert tiny.learned(tmp_path / "again") == tiny.learned(run)
    ours, theirs = ((folder / "export" / "model.safetensors").read_bytes() for folder in (run, tmp_path / "again"))
    assert ours == theirs


# ---- against a plain loop ----


def plain_loss(base, speculator, batch, counts: list[int], heads: int) -> torch.Tensor:
    """Document by document, no packing, no fused loss: the sum over heads of the mean cross-entropy (counts are the global ones)."""
    total = torch.zeros((), dtype=torch.float64)
    for _, tokens in documents_of(batch):
        hidden = base(tokens[None]).final[0]
        if speculator is None:
            total = total + F.cross_entropy(base.readout.logits(hidden[:-1]), tokens[1:], reduction="sum") / counts[0]
            continue
        for t in range(len(tokens)):
            state = speculator.first_state(hidden[t : t + 1])
            for head in range(heads):
                if t + 2 + head < len(tokens):
                    state = speculator.advance(head, state, speculator.emb[0](tokens[t + 1 + head : t + 2 + head]))
                    logits = speculator.head[0](state.hidden)
                    total = total + F.cross_entropy(logits, tokens[t + 2 + head : t + 3 + head]) / counts[head]
    return total


def documents_of(batch):
    for row, ids in zip(batch.tokens, batch.document_ids):
        for document in ids[ids >= 0].unique():
            yield document, row[ids == document]


def plain_training(flags: list[str], base_of=None) -> tuple[torch.nn.Module, list[float]]:
    """The trained module and the loss of every step, by autograd, torch.optim.AdamW and torch's clipping, in float64."""
    config = load(flags, "train", SPECULATOR_CONFIGS)
    if base_of is None:
        base = get_model("auto", "auto", config.base.path, init=config.base.init, dtype=torch.float32, seed=config.job.seed).double()
    else:
        base = base_of(config.base.path)
    speculator = None
    if config.speculator.type != "none":
        speculator = build_speculator(config.speculator.type, config.speculator, base.config, config.objective)
        speculator.init_weights(torch.Generator().manual_seed(config.job.seed))
        speculator.double()
        base.requires_grad_(False)
    trained = base if speculator is None else speculator
    parameters = list(trained.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2]}, {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, betas=tuple(config.optimizer.betas), eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay
    )
    size, heads, lookahead = config.training.global_batch_size, 1 if speculator is None else 3, 0 if speculator is None else 1
    tokenizer = load_tokenizer(config.base.path)
    loader = build_loader(config.data, tokenizer, seed=config.job.seed, global_batch_size=size, micro_batch_size=size)
    values = []
    for step in range(config.training.num_steps):
        batch = next(loader)
        lengths = [len(tokens) for _, tokens in documents_of(batch)]
        counts = [sum(max(0, length - 1 - lookahead - head) for length in lengths) for head in range(heads)]
        optimizer.zero_grad()
        loss = plain_loss(base, speculator, batch, counts, heads)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate_multiplier(step, config.training.num_steps, config.lr_scheduler)
        optimizer.step()
        values.append(loss.item())
    return trained, values


LSTM = {"speculator__type": "lstm", "speculator__tie_lstm_embs": "false", "speculator__proj_dim": "11.20"}


@pytest.mark.parametrize("kind", [{}, LSTM, tiny.BASE_ALONE], ids=["mlp", "lstm", "base"])
def test_training_equals_a_plain_loop_however_a_batch_is_cut(world, tmp_path, kind):
    changes = kind | NO_END | {"training__compute_dtype": "float64", "metrics__report_interval": 1}
    changes |= {"training__num_steps": 3, "training__max_grad_norm": 0.3, "optimizer__weight_decay": 0.7}
    trained, values = plain_training(world.flags(tmp_path, **changes))
    parameters = dict(trained.named_parameters())
    for micro_batch_size in (1, 2, 4):
        folder = tmp_path / str(micro_batch_size)
        assert train.main(world.flags(folder, **changes, training__micro_batch_size=micro_batch_size)) == 0
        torch.testing.assert_close(losses(folder).sum(1), torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=0)
        saved = read_tensors(tiny.checkpoint(folder, 3), "base." if kind is tiny.BASE_ALONE else "speculator.")
        assert saved.keys() == parameters.keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(saved[name], parameter.data, rtol=1e-9, atol=1e-12, msg=name)


def lines(world, folder: Path) -> Path:
    """The first lines of the texts as short documents."""
    texts = [line for path in sorted((world.root / "data").iterdir()) for line in path.read_text().splitlines()[1:9] if line]
    folder.mkdir(exist_ok=True)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "lines.jsonl"


@pytest.mark.parametrize(
    ("packing", "kind"), [("best_fit", {}), ("document", LSTM), ("document", tiny.BASE_ALONE)], ids=["mlp", "lstm", "base"]
)
def test_rows_with_padding_train_like_their_documents_alone(world, tmp_path, packing, kind):
    changes = kind | NO_END | {"training__compute_dtype": "float64", "metrics__report_interval": 1, "training__num_steps": 3}
    changes |= {"data__path": lines(world, tmp_path), "data__packing": packing, "data__seq_length": 37}
    flags = world.flags(tmp_path / "run", **changes)
    trained, values = plain_training(flags)
    assert train.main(flags) == 0
    torch.testing.assert_close(losses(tmp_path / "run").sum(1), torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=0)
    saved = read_tensors(tiny.checkpoint(tmp_path / "run", 3))
    for name, parameter in trained.named_parameters():
        part = "base." if kind is tiny.BASE_ALONE else "speculator."
        torch.testing.assert_close(saved[part + name], parameter.data, rtol=1e-9, atol=1e-12, msg=name)
    config = load(flags, "train", SPECULATOR_CONFIGS)
    batch = next(build_loader(config.data, load_tokenizer(config.base.path), seed=42, global_batch_size=4, micro_batch_size=4))
    padding = (batch.document_ids < 0).sum(1)
    assert bool((padding > 0).any()) and (packing == "document") == (len(list(documents_of(batch))) == 4)
    assert sum(tiny.reports(tmp_path / "run")[0]["tokens_by_dataset"].values()) == 4 * 37 - int(padding.sum())
    again = world.flags(
        tmp_path / "again", **changes | {"metrics__report_interval": 2, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 0}
    )
    assert train.main(again) == 0
    assert read_state(tiny.checkpoint(tmp_path / "again", 1))["report"]["tokens"] == 4 * 37 - int(padding.sum())


def test_what_happened_to_documents_is_counted_in_every_report(world, tmp_path, caplog):
    caplog.set_level("INFO", logger="spectitan")
    path = lines(world, tmp_path)
    tokenizer = load_tokenizer(world.root / "base")
    lengths = [len(tokenizer.document(tokenizer.encode(json.loads(line)["text"]))) for line in path.read_text().splitlines()]
    with path.open("a") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in ("", "", "x")))
    changes = NO_END | {"data__path": path, "data__holdout": 0, "data__seq_length": 9, "metrics__report_interval": 1}
    changes |= {"data__packing": "best_fit", "data__overlong": "truncate"}
    for num_steps in (2, 4):  # the second goes on
        assert train.main(world.flags(tmp_path / "run", **changes, training__num_steps=num_steps)) == 0
    too_long = [length - 9 for length in lengths if length > 9]
    expected = {"documents truncated": len(too_long), "tokens cut off them": sum(too_long), "dropped: empty": 2, "dropped: one token": 1}
    reports = tiny.reports(tmp_path / "run")
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    assert all(report["data_counts"] == expected for report in reports)
    for text in (f"{len(too_long)} documents truncated, {sum(too_long)} tokens cut off them", "2 dropped: empty, 1 dropped: one token"):
        assert text in caplog.text


# ---- precision, objectives, lengths ----


def test_precisions_agree(world, tmp_path):
    found = {}
    for dtype in ("float64", "float32", "bfloat16"):
        assert train.main(world.flags(tmp_path / dtype, **NO_END, training__compute_dtype=dtype, metrics__report_interval=1)) == 0
        found[dtype] = losses(tmp_path / dtype)
        saved = read_tensors(tiny.checkpoint(tmp_path / dtype, 7))
        master = torch.float64 if dtype == "float64" else torch.float32
        assert {tensor.dtype for name, tensor in saved.items() if not name.endswith(".step")} == {master}
    torch.testing.assert_close(found["float32"], found["float64"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["bfloat16"], found["float64"], rtol=0.03, atol=0)
    assert not torch.equal(found["bfloat16"], found["float32"])


def test_kl_divergence_to_the_base_falls(world, base_run, tmp_path):
    changes = {"base__path": base_run / "export", "training__num_steps": 30, "metrics__report_interval": 10}
    assert train.main(world.flags(tmp_path / "run", **NO_END, **changes, objective__loss="kl_div", training__compute_dtype="float64")) == 0
    found = losses(tmp_path / "run")
    assert (found > 0).all() and (found[-1] < 0.8 * found[0]).all()
    alpha = [report["alpha"] for report in tiny.reports(tmp_path / "run")]
    assert all(0 < first < last < 1 for first, last in zip(alpha[0], alpha[-1]))


@pytest.mark.parametrize("epochs", [1, 1.3])
def test_epochs_are_passes_over_the_samples(world, tmp_path, epochs):
    changes = {"training__num_steps": -1, "training__epochs": epochs, "data__seq_length": 61, "data__holdout": 0}
    assert train.main(world.flags(tmp_path / "run", **NO_END, **changes)) == 0
    tokenizer = load_tokenizer(world.root / "base")
    texts = [path.read_text(encoding="utf-8") for path in (world.root / "data").iterdir()]
    tokens = sum(len(tokenizer.document(tokenizer.encode(text))) for text in texts)
    steps = math.ceil(epochs * math.ceil(tokens / 61) / 4)
    reports = tiny.reports(tmp_path / "run")
    assert reports[-1]["step"] == steps
    if epochs == 1:  # the last step begins a second pass
        assert tokens <= sum(sum(report["tokens_by_dataset"].values()) for report in reports) <= tokens + 3 * 61


def test_workers_and_evaluations_on_the_way_change_nothing(world, tmp_path, caplog):
    caplog.set_level("INFO")
    assert train.main(world.flags(tmp_path / "plain", **NO_END)) == 0
    assert " evaluation | " not in caplog.text
    assert train.main(world.flags(tmp_path / "other", **NO_END, data__loader_workers=1, eval__interval=3)) == 0
    evaluations = [record.getMessage() for record in caplog.records if " evaluation | " in record.getMessage()]
    assert [line.split()[1] for line in evaluations] == ["3", "6"]
    for name in ("heldout_loss/head_2", "heldout_accuracy/head_0", "acceptance_length"):
        assert name in evaluations[0]
    tiny.assert_same_training(tmp_path / "plain", tmp_path / "other", 7)
    assert tiny.learned(tmp_path / "plain") == tiny.learned(tmp_path / "other")


def test_without_anything_to_measure_a_run_still_ends_well(world, tmp_path):
    changes = tiny.BASE_ALONE | {"data__holdout": 0, "training__num_steps": 1}
    assert train.main(world.flags(tmp_path / "run", **changes)) == 0
    assert not (tmp_path / "run" / "report.json").exists() and (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_datasets_have_their_shares(world, tmp_path):
    for name, numbers in {"a": (0, 1, 2), "b": (3, 4), "c": (5,)}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in numbers:
            shutil.copy(world.root / "data" / f"{number:02}.txt", tmp_path / "data" / name)
    changes = {"data__path": tmp_path / "data", "data__datasets": "a,b,c", "data__weights": "1,3,0", "data__holdout": 0}
    assert train.main(world.flags(tmp_path / "run", **NO_END, **changes, training__num_steps=10)) == 0
    found = [report["tokens_by_dataset"] for report in tiny.reports(tmp_path / "run")]
    totals = {name: sum(report[name] for report in found) for name in "abc"}
    assert totals["c"] == 0 and 0.2 < totals["a"] / (totals["a"] + totals["b"]) < 0.3
