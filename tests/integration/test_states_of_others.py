"""Hidden states that other systems have written are read as they are, and train as the base itself does; what cannot be used is refused."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from spectitan import train
from spectitan.config.manager import load
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer
from spectitan.errors import UserError
from spectitan.keyed_random import uniform
from spectitan.models.registry import get_model
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.states.cached import CachedStates
from spectitan.states.document_files import DocumentFiles, Part
from spectitan.states.precision import Stored
from tests.integration import tiny
from tests.integration.test_states import counts
from tests.unit.source_fixtures import save_to_disk

LAYERS = (0, 1)
RUN = {"training__num_steps": 6, "checkpoint__interval": 6, "metrics__report_interval": 1, "objective__loss": "kl_div"}
RUN |= {
    "eval__at_end": "false",
    "export__format": "none",
    "eval__prompts": "none",
    "data__holdout": 0,
    "training__compute_dtype": "float32",
}
RUN |= {"data__packing": "best_fit", "data__overlong": "truncate", "data__seq_length": 47}
RUN |= {"speculator__type": "eagle3", "speculator__target_layer_ids": "0,1"}
FORMATS = {"hs": {}, "1": {"data__format": "pt"}, "0": {"data__format": "pt"}}


def documents() -> list[tuple[list[int], list[int]]]:
    """Token ids and masks, the mask of a prompt's length; two of them are longer than a sample, two are the same."""
    lengths = [3 + int(uniform(5, number) * 40) for number in range(37)] + [59, 48]
    ids = [(uniform(7, number, torch.arange(length)) * tiny.VOCAB).long().tolist() for number, length in enumerate(lengths)]
    return [(each, [int(place >= len(each) // 3) for place in range(len(each))]) for each in [*ids, ids[4]]]


def write(folder: Path, base: Path, format: str) -> dict:
    """The dataset and its states in one of the formats; the keys that read them."""
    model = get_model("auto", "auto", base).requires_grad_(False)
    rows = documents()
    for number, (ids, mask) in enumerate(rows):
        states = model(torch.tensor([ids]), taps=(*LAYERS, 2))
        taps, final = [tap[0].clone() for tap in states.taps], states.final[0].clone()
        inputs = {"input_ids": torch.tensor(ids), "loss_mask": torch.tensor(mask)}
        below = folder / "states" / f"part_{number % 3}"
        below.mkdir(parents=True, exist_ok=True)
        if format == "hs":
            save_file(
                {"hidden_states": torch.stack(taps, 1), "token_ids": inputs["input_ids"]}, folder / "states" / f"hs_{number}.safetensors"
            )
        elif format == "1":
            torch.save(inputs | {"hidden_states": taps}, below / f"data_{number}.pt")
        else:
            content = {"hidden_state": torch.cat(taps[:-1], -1)[None], "target": final[None]}
            torch.save({name: tensor[None] for name, tensor in inputs.items()} | content, below / f"data_{number}.pt")
    if format == "hs":
        columns = {"input_ids": pa.array([ids for ids, _ in rows]), "loss_mask": pa.array([mask for _, mask in rows])}
        save_to_disk(folder / "data", [columns | {"seq_len": pa.array([len(ids) for ids, _ in rows])}])
    path = folder / ("data" if format == "hs" else "states")
    return {"data__path": path, "states__hidden_states_path": folder / "states", "states__source": "offline"} | FORMATS[format]


@pytest.fixture(scope="module", params=FORMATS)
def written(request, world, tmp_path_factory) -> dict:
    return write(tmp_path_factory.mktemp(request.param), world.root / "base", request.param)


@pytest.fixture
def hs(world, tmp_path) -> tuple[Path, list[str]]:
    """The folder of states, and the flags of a run."""
    keys = write(tmp_path / "others", world.root / "base", "hs")
    return keys["states__hidden_states_path"], world.flags(tmp_path / "run", **RUN | keys)


@pytest.mark.parametrize("changes", [{}, {"data__packing": "document"}, {"speculator__type": "mlp"}])
def test_they_train_as_the_base_does(world, written, tmp_path, changes):
    """Documents share samples without seeing each other."""
    keys = RUN | changes
    if changes.get("speculator__type") == "mlp":
        keys = {name: value for name, value in keys.items() if name != "speculator__target_layer_ids"}
    online = {name: value for name, value in written.items() if name.startswith("data__")}
    assert train.main(world.flags(tmp_path / "online", **keys | online)) == 0
    assert train.main(world.flags(tmp_path / "offline", **keys | written)) == 0
    ours, theirs = (tiny.reports(tmp_path / name) for name in ("offline", "online"))
    assert len(ours) == len(theirs) == 6
    for our, their in zip(ours, theirs):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-4) and our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-3)
        assert our["supervised_tokens"] == their["supervised_tokens"] > 20 and our["accuracy"] == their["accuracy"]
    assert counts(tmp_path / "offline") == {"cached": 24, "generated": 0, "kept": 0, "skipped": 0}


def test_each_part_of_a_split_document_gets_its_own_states(world, written):
    """They have seen the whole document."""
    keys = RUN | written | {"data__overlong": "split", "data__seq_length": 31}
    config = load(world.flags(world.root / "run", **keys), "train", SPECULATOR_CONFIGS)
    tokenizer = load_tokenizer(config.base.path)
    loader = build_loader(config.data, tokenizer, seed=3, global_batch_size=5, micro_batch_size=5)
    base = get_model("auto", "auto", world.root / "base").requires_grad_(False)
    store = DocumentFiles(written["states__hidden_states_path"], written_format(written), "auto", LAYERS, 2, 24)
    source = CachedStates(store, loader.samples, LAYERS, base.readout, torch.float32, torch.device("cpu"))
    whole = {tuple(ids): base(torch.tensor([ids]), taps=LAYERS) for ids, _ in documents()}
    split = 0
    for _ in range(9):
        batch = next(loader)
        states = source.states(source.begin(batch))
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            at = 0
            for part in loader.samples[0].documents(sample_id):
                expected, here = whole[tuple(part.ids.tolist())], slice(part.start, part.start + part.length)
                for ours, theirs in zip((*states.taps, states.final), (*expected.taps, expected.final)):
                    torch.testing.assert_close(ours[row, at : at + part.length], theirs[0, here], rtol=1e-5, atol=1e-5)
                at, split = at + part.length, split + (part.start > 0)
            assert not states.taps[0][row, at:].any()
    source.close()
    assert split > 5


def test_before_or_after_the_norm_is_found_out(world, written, tmp_path, refused):
    is_normed = written_format(written) == "0"
    said, right = ("pre_norm", "post_norm") if is_normed else ("post_norm", "pre_norm")
    line = refused(world.flags(tmp_path / "run", **RUN | written, states__final=said))
    assert f"states.final = {right}" in line and ("after" if is_normed else "before") in line
    assert train.main(world.flags(tmp_path / "run", **RUN | written | {"training__num_steps": 1}, states__final=right)) == 0


def written_format(keys: dict) -> str:
    """What is in a folder, by the names of its files' tensors."""
    file = next(keys["states__hidden_states_path"].rglob("data_0.pt"), None)
    return "hs" if file is None else "0" if "target" in torch.load(file, weights_only=True) else "1"


def changed(file: Path, change) -> Path:
    """The file with another content."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def not_finite(states: Path) -> list[str]:
    for number in range(40):  # whichever is read first

        def change(tensors):
            tensors["hidden_states"][2, 1, 3] = np.nan

        changed(states / f"hs_{number}.safetensors", change)
    return ["hs_", "row 2 of state 1", "not finite"]


def other_ids(states: Path) -> list[str]:
    def change(tensors):
        tensors["token_ids"][1] += 1

    changed(states / "hs_7.safetensors", change)
    return ["hs_7.safetensors", "other token_ids than row 7"]


def swapped(states: Path) -> list[str]:
    """Two files under each other's names hold what they hold."""
    (states / "hs_7.safetensors").rename(states / "x")
    (states / "hs_8.safetensors").rename(states / "hs_7.safetensors")
    (states / "x").rename(states / "hs_8.safetensors")
    return []


def truncated(states: Path) -> list[str]:
    os.truncate(states / "hs_3.safetensors", 500)
    return ["hs_3.safetensors", "truncated"]


def fewer_states(states: Path) -> list[str]:
    def change(tensors):
        tensors["hidden_states"] = tensors["hidden_states"][1:].clone()

    changed(states / "hs_3.safetensors", change)
    return ["hs_3.safetensors", "as many"]


def other_layers(states: Path) -> list[str]:
    def change(tensors):
        tensors["hidden_states"] = tensors["hidden_states"][:, 1:].clone()

    for file in states.glob("hs_*"):
        changed(file, change)
    return ["2 states a token", "layers [0, 1] and the final state, 3"]


def other_layers_in_one(states: Path) -> list[str]:
    def change(tensors):
        tensors["hidden_states"] = tensors["hidden_states"][:, [0, 1, 1, 2]].clone()

    changed(states / "hs_7.safetensors", change)
    return ["hs_7.safetensors: 4 states a token; other files have 3"]


def other_size(states: Path) -> list[str]:
    def change(tensors):
        tensors["hidden_states"] = tensors["hidden_states"][..., 1:].clone()

    for file in states.glob("hs_*"):
        changed(file, change)
    return ["hidden size 23", "24"]


def one_is_missing(states: Path) -> list[str]:
    (states / "hs_9.safetensors").unlink()
    return [
        "states.on_missing = raise",
        "no hidden states of 1 of ",
        "; allowed: the files that were made of data.path, or states.on_missing",
    ]


def none_is_there(states: Path) -> list[str]:
    for file in states.glob("hs_*"):
        file.unlink()
    return ["states.hidden_states_path", "no hidden states there"]


@pytest.mark.parametrize(
    "damage", [not_finite, other_ids, truncated, fewer_states, other_layers, other_layers_in_one, other_size, one_is_missing, none_is_there]
)
def test_what_cannot_be_used(hs, refused, damage):
    states, flags = hs
    words = damage(states)
    line = refused(flags)
    assert all(word in line for word in words), line


def test_names_of_files_do_not_matter(hs):
    swapped(hs[0])
    assert train.main([*hs[1], "--training.num_steps=1"]) == 0


@pytest.mark.parametrize("format", ["hs", "1"])
def test_files_of_other_layers_are_not_read(tmp_path, world, format):
    """One file has a layer more; those whose headers say so are refused when they are opened."""
    folder = write(tmp_path, world.root / "base", format)["states__hidden_states_path"]
    states = torch.zeros(5, 4, 24)
    if format == "hs":
        save_file({"hidden_states": states, "token_ids": torch.arange(5)}, folder / "hs_99.safetensors")
        with pytest.raises(UserError, match=r"hs_99\.safetensors: 4 states a token; other files have 3"):
            DocumentFiles(folder, format, "auto", LAYERS, 2, 24)
        return
    torch.save({"input_ids": torch.arange(5), "hidden_states": list(states.unbind(1))}, folder / "x.pt")
    store, into = DocumentFiles(folder, format, "auto", LAYERS, 2, 24), Stored(torch.zeros(3, 1, 5, 24), None)
    with pytest.raises(UserError, match=r"x\.pt: 4 states a token; other files have 3"):
        store.read([Part(folder / "x.pt", 0, 5)], None, None, [0, 1, 2], 0, into)


def test_a_row_of_another_dataset(hs):
    """Numbers in names count the rows of one dataset: other text is missing, and not taken for another version of it."""
    store = DocumentFiles(hs[0], "hs", "auto", LAYERS, 2, 24)
    document = SimpleNamespace(ids=np.arange(5) + 1, row=7, start=0, length=5)
    training, validation = (SimpleNamespace(documents=lambda sample: [document]) for _ in range(2))
    assert store.find(training, 0) is None
    store.rows_of = training
    assert store.find(validation, 0) is None
    with pytest.raises(UserError, match=r"hs_7\.safetensors: other token_ids than row 7"):
        store.find(training, 0)


def test_nothing_is_added_to_them(hs, refused):
    assert "states.format = hs" in refused([*hs[1], "--states.source=hybrid"])


class Malice:
    def __reduce__(self):
        return os.mkdir, ("victim",)


@pytest.mark.parametrize("content", [Malice(), [1, 2]])
def test_pickles_that_hold_something_else(world, tmp_path, refused, content):
    keys = write(tmp_path / "others", world.root / "base", "1")
    file = sorted(keys["data__path"].rglob("*.pt"))[0]
    torch.save(content, file)
    line = refused(world.flags(tmp_path / "run", **RUN | keys))
    assert str(file) in line and not Path("victim").exists()
