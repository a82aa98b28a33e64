"""EAGLE-3 through the programs: prepare counts tokens, train learns with a draft vocabulary, evaluate drafts, export is read back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectitan import evaluate, export, prepare, train
from spectitan.speculators.draft_vocabulary import maps_of, write_maps
from spectitan.training.checkpoint_reading import read_tensors
from tests.integration import tiny

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def flags(world) -> dict:
    counts = world.root / "token_freq.pt"
    assert prepare.main(world.flags(world.root / "prepared", prepare__token_freq=str(counts), prepare__show="0")) == 0
    keys = {"type": "eagle3", "ttt_steps": "2", "draft_vocab_size": "29", "token_freq_path": str(counts)}
    return {f"speculator__{name}": value for name, value in keys.items()} | {"objective__loss": "kl_div", "training__num_steps": str(STEPS)}


@pytest.fixture(scope="module")
def run(world, flags):
    assert train.main(world.flags(world.root / "eagle3", **flags)) == 0
    return world.root / "eagle3"


def test_a_run_leaves_what_it_promises(run):
    report = json.loads((run / "report.json").read_text())
    assert report["identical"] and len(report["heldout_cond_accuracy"]) == 2
    assert 0 < report["heldout_outside_vocabulary"][0] < 1
    last = tiny.reports(run)[-1]
    assert last["outside_vocabulary"][0] > 0 and last["full_accuracy"][0] == pytest.approx(last["accuracy"][0])
    d2t, written = np.load(run / "d2t.npy"), load_file(run / "export" / "model.safetensors")
    assert written["d2t"].tolist() == d2t.tolist() and written["lm_head.weight"].shape[0] == 29
    assert written["t2d"].tolist() == np.load(run / "t2d.npy").tolist()


def test_checkpoint_and_folder_are_worth_the_same(world, run, tmp_path):
    for place, source in {"a": run, "b": run / "export"}.items():
        path = {
            "speculator__path": str(source),
            "speculator__type": "eagle3",
            "base__path": f"{world.root}/base",
            "objective__loss": "kl_div",
        }
        assert evaluate.main(world.flags(tmp_path / place, **path)) == 0
    reports = [json.loads((tmp_path / place / "report.json").read_text()) for place in "ab"]
    for key in ("acceptance_length", "acceptance_by_position", "heldout_loss", "heldout_accuracy", "heldout_alpha"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-6), key
    assert export.main(world.flags(tmp_path / "c", speculator__path=str(run / "export"), export__path=str(tmp_path / "again"))) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "export" / name).read_bytes()


def test_a_stopped_run_goes_on_as_if_it_had_not(world, flags, run, tmp_path):
    assert train.main(world.flags(tmp_path / "run", **flags | {"training__num_steps": "2", "lr_scheduler__type": "constant"})) == 0
    assert train.main(world.flags(tmp_path / "run", **flags | {"lr_scheduler__type": "constant"})) == 0
    assert train.main(world.flags(tmp_path / "whole", **flags | {"lr_scheduler__type": "constant"})) == 0
    stopped, whole = (read_tensors(tiny.checkpoint(tmp_path / name, STEPS)) for name in ("run", "whole"))
    assert stopped.keys() == whole.keys() and all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_other_counts_are_another_vocabulary(world, flags, run, tmp_path, capsys):
    torch.save(dict.fromkeys(range(200, 290), 1), tmp_path / "other.pt")
    assert train.main(world.flags(run, **flags | {"speculator__token_freq_path": str(tmp_path / "other.pt")})) == 2
    assert "speculator." in capsys.readouterr().err


def test_a_run_from_a_folder_and_from_its_config_alone(world, flags, run, tmp_path):
    keys = {"speculator__type": "eagle3", "speculator__ttt_step_loss_decay": "0.5", "training__num_steps": "1", "eval__at_end": "false"}
    start = keys | {"speculator__path": str(run / "export"), "optimizer__lr": "1e-9"}
    assert train.main(world.flags(tmp_path / "tuned", **start)) == 0
    tuned, before = (load_file(folder / "export" / "model.safetensors") for folder in (tmp_path / "tuned", run))
    assert all(torch.allclose(tuned[name].double(), before[name].double(), atol=1e-6) for name in before)

    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_bytes((run / "export" / "config.json").read_bytes())
    new = keys | {"speculator__path": str(tmp_path / "shape"), "job__init_only": "true"}
    new |= {"speculator__token_freq_path": flags["speculator__token_freq_path"]}
    assert train.main(world.flags(tmp_path / "new", **new)) == 0
    initial = load_file(tmp_path / "new" / "export" / "model.safetensors")
    assert initial.keys() == before.keys() and torch.equal(initial["d2t"], before["d2t"])
    assert not torch.allclose(initial["fc.weight"], before["fc.weight"])


def test_a_trained_ones_vocabulary_is_in_its_files(world, flags, run, tmp_path, capsys):
    """A run from it needs no counts: it is planned, its states are cached, it is stopped and goes on. Files of other tokens are refused."""
    start = {"speculator__type": "eagle3", "speculator__path": str(run / "export")} | tiny.SHORT | {"lr_scheduler__type": "constant"}
    assert train.main(world.flags(tmp_path / "plan", **start, job__plan="true")) == 0
    states = {"prepare__states": "true", "prepare__show": 0, "states__hidden_states_path": tmp_path / "states"}
    assert prepare.main(world.flags(tmp_path / "fill", **start, **states)) == 0
    for name, steps in (("stopped", 2), ("stopped", 4), ("whole", 4)):
        assert train.main(world.flags(tmp_path / name, **start | {"training__num_steps": steps})) == 0
    tiny.assert_same_training(tmp_path / "stopped", tmp_path / "whole", 4)

    torch.save(dict.fromkeys(range(200, 290), 1), tmp_path / "other.pt")
    write_maps(tmp_path, *maps_of(torch.arange(0, 58, 2), tiny.VOCAB))
    counts, maps = {"token_freq_path": tmp_path / "other.pt"}, {"d2t_path": tmp_path / "d2t.npy", "t2d_path": tmp_path / "t2d.npy"}
    for (first, file), *others in (counts.items(), maps.items()):
        keys = start | {f"speculator__{name}": path for name, path in [(first, file), *others]}
        line = tiny.refusal(train, world.flags(tmp_path / "run", **keys), capsys, world.root)
        assert f"speculator.{first} = '{file}': another draft vocabulary" in line
    same = {"d2t_path": run / "d2t.npy", "t2d_path": run / "t2d.npy"}
    keys = start | {f"speculator__{name}": path for name, path in same.items()} | {"training__num_steps": 1}
    assert train.main(world.flags(tmp_path / "same", **keys)) == 0


def test_mistakes_are_told_in_one_line(world, flags, run, tmp_path, capsys):
    """From the program, before anything is tokenised or written."""
    write_maps(tmp_path, torch.tensor([0, 2]), torch.arange(tiny.VOCAB) < 2)
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "decoder.json").write_text(json.dumps(shape))
    new = {"speculator__type": "eagle3"}
    mistakes = {
        "target_layer_ids = [1, 1]; allowed: different ids from 0 to the base's 2 layers": {"target_layer_ids": "1,1"},
        "target_layer_ids = [3]; allowed: different ids": {"target_layer_ids": "3"},
        "d2t and t2d contradict each other": {"d2t_path": tmp_path / "d2t.npy", "t2d_path": tmp_path / "t2d.npy"},
        "hidden_size = 32; allowed: the base's 24": {"draft_config": tmp_path / "decoder.json"},
        "which that file decides; allowed: one of them": {"draft_config": tmp_path / "decoder.json", "num_layers": 2},
        "which has a decoder already; allowed: one of them": {"draft_config": tmp_path / "decoder.json", "path": run / "export"},
        "draft_vocab_size = 29 needs speculator.token_freq_path": {"draft_vocab_size": 29},
        'attention = "flex" has no backward on a CPU': {"attention": "flex"},
        "norm_before_fc = true and speculator.fc_norm = true": {"norm_before_fc": "true", "fc_norm": "true"},
    }
    for words, keys in mistakes.items():
        changes = new | {f"speculator__{name}": value for name, value in keys.items()}
        line = tiny.refusal(train, world.flags(tmp_path / "run", **tiny.SHORT | changes), capsys, world.root)
        assert words in line, line
    line = tiny.refusal(train, world.flags(tmp_path / "run", **tiny.SHORT | new, job__init_only="true"), capsys, world.root)
    assert "job.init_only = true with export.format" in line
    assert not (tmp_path / "run" / "config.toml").exists()
