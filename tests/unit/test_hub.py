"""Models and datasets of Hugging Face's hub, resolved by huggingface_hub itself from a cache, and what is said where they are not."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from spectitan import hub
from spectitan.config.manager import load
from spectitan.config.sections import Objective
from spectitan.data.corpus import tokenise_held_out, tokenise_training
from spectitan.data.documents import Found, find_datasets, read_documents, validation_datasets
from spectitan.errors import UserError
from spectitan.models.llama import LlamaConfig
from spectitan.models.weights import resolve_base_path
from spectitan.speculators.draft_decoder import DecoderShape, decoder_to_json, settle_draft_config
from spectitan.speculators.eagle3 import Eagle3Config
from spectitan.speculators.registry import SPECULATOR_CONFIGS, new_speculator
from spectitan.speculators.serving import name_of_base
from spectitan.trained import family_keys, find_trained
from tests.unit.data_fixtures import ByteTokenizer, make_data
from tests.unit.source_fixtures import hub_snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """huggingface_hub's cache; the network is off in all tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    hub._snapshot.cache_clear()
    return tmp_path / "hub"


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


SPLITS = {
    "main/train-00000-of-00002.jsonl": rows("train 0"),
    "main/train-00001-of-00002.jsonl": rows("train 1"),
    "main/test-00000-of-00001.jsonl": rows("test"),
    "other/train.jsonl": rows("other"),
    "README.md": b"# A card",
    "questions.py": b"# A script",
}


def contents(datasets, data) -> list[str]:
    return [document.content for dataset in datasets for document in read_documents(dataset, data, None, Found())]


@pytest.mark.parametrize(
    ("path", "datasets", "expected"),
    [
        ("team/questions", [], ["train 0", "train 1", "other"]),
        ("team/questions", ["main"], ["train 0", "train 1"]),
        ("team/questions/main", [], ["train 0", "train 1"]),
        ("team/questions/main/test-00000-of-00001.jsonl", [], ["test"]),
    ],
)
def test_a_dataset_is_its_training_split_or_what_is_named(cache, path, datasets, expected):
    hub_snapshot(cache, "dataset", "team/questions", SPLITS)
    data = make_data(cache, path=path, datasets=datasets)
    assert contents(find_datasets(data), data) == expected


def test_the_evaluation_text_is_another_split(cache):
    hub_snapshot(cache, "dataset", "team/questions", SPLITS)
    data = make_data(cache, path="team/questions", val_path="team/questions")
    assert contents(validation_datasets(data), data) == ["test"]
    ((name, training),), ((_, held_out),) = (tokenise(data, ByteTokenizer()) for tokenise in (tokenise_training, tokenise_held_out))
    assert (name, training.meta["documents"], held_out.meta["documents"]) == ("team/questions", 3, 1)


def test_a_dataset_without_splits_is_all_its_files(cache):
    hub_snapshot(cache, "dataset", "team/texts", {"a.jsonl": rows("a"), "deep/contest.txt": b"b", "README.md": b"# A card"})
    data = make_data(cache, path="team/texts")
    assert contents(find_datasets(data), data) == ["a", "b"]


def test_other_splits_are_not_taken_for_the_one_that_is_missing(cache):
    hub_snapshot(cache, "dataset", "team/rest", {"a.jsonl": rows("a"), "data/test-0.jsonl": rows("test")})
    hub_snapshot(cache, "dataset", "team/bench", {"test.jsonl": rows("test"), "dev/a.jsonl": rows("dev")})
    hub_snapshot(cache, "dataset", "team/one", {"train.jsonl": rows("train")})
    data = make_data(cache, path="team/rest", val_path="team/one")
    assert contents(find_datasets(data), data) == ["a"]
    with pytest.raises(UserError, match="^team/one: of the splits train none is validation or test; allowed: the path of a file or folder"):
        validation_datasets(data)
    with pytest.raises(UserError, match="^team/bench: of the splits validation, test none is train; allowed: the path of a file or folder"):
        find_datasets(make_data(cache, path="team/bench"))
    data = make_data(cache, path="team/bench", datasets=["dev", "test.jsonl"])
    assert contents(find_datasets(data), data) == ["dev", "test"]
    data = make_data(cache, path="team/bench/dev", val_path="team/bench/test.jsonl")
    assert [contents(found, data) for found in (find_datasets(data), validation_datasets(data))] == [["dev"], ["test"]]


def test_a_misspelt_folder_of_a_dataset_is_named(cache):
    hub_snapshot(cache, "dataset", "team/questions", SPLITS)
    with pytest.raises(UserError, match="no such file or folder; the dataset team/questions of the hub has no 'mian'$"):
        find_datasets(make_data(cache, path="team/questions/mian"))
    with pytest.raises(UserError, match="no 'mian' below data.path = team/questions; the nearest is 'main'"):
        find_datasets(make_data(cache, path="team/questions", datasets=["mian"]))


def test_a_folder_of_this_name_comes_first(cache, tmp_path):
    hub_snapshot(cache, "dataset", "team/questions", SPLITS)
    (tmp_path / "team/questions").mkdir(parents=True)
    (tmp_path / "team/questions/test.txt").write_text("mine")
    data = make_data(cache, path="team/questions")
    assert contents(find_datasets(data), data) == ["mine"]


def test_a_base_of_the_hub_keeps_its_name(cache):
    folder = hub_snapshot(cache, "model", "team/Base-1B", {"config.json": b'{"model_type": "llama"}'})
    assert resolve_base_path("team/Base-1B") == folder and name_of_base(folder) == "team/Base-1B"
    assert name_of_base(folder, "own") == "own"


def test_a_drafter_and_its_shape_of_the_hub(cache):
    base = LlamaConfig(53, 24, 40, num_layers=3, num_heads=2)
    shape = decoder_to_json(DecoderShape(53, 24, intermediate_size=40, num_layers=2, num_heads=3), [-1, -1])
    config = {"speculators_model_type": "eagle3", "eagle_aux_hidden_state_layer_ids": [0, 2], "transformer_layer_config": shape}
    folder = hub_snapshot(cache, "model", "team/Draft-1B", {"config.json": json.dumps(config).encode()})
    argv = ["--base.path=b", "--data.path=d", "--training.num_steps=1", "--speculator.type=eagle3"]
    trained = find_trained(load([*argv, "--speculator.path=team/Draft-1B"], "train", SPECULATOR_CONFIGS))
    assert trained.path == folder and family_keys(trained)[1].target_layer_ids == [0, 2]
    speculator = new_speculator("eagle3", Eagle3Config(draft_config="team/Draft-1B"), base, Objective())
    assert (len(speculator.layers), speculator.decoder.num_heads) == (2, 3)


@pytest.mark.parametrize("key", ["path", "draft_config"])
def test_a_drafter_that_is_not_there(cache, key):
    with pytest.raises(UserError, match=f"^speculator.{key} = 'team/nothing': no such .*{OFFLINE.format('model')}$"):
        config = load(["--base.path=b", "--speculator.type=eagle3", f"--speculator.{key}=team/nothing"], "export", SPECULATOR_CONFIGS)
        find_trained(config)
        settle_draft_config(config.speculator)


OFFLINE = "as a {} of Hugging Face's hub is not in its cache, and the hub cannot be reached; give a path"


def test_offline_one_line_says_to_give_a_path(cache):
    with pytest.raises(UserError) as error:
        find_datasets(make_data(cache, path="team/nothing"))
    assert str(error.value) == f"data.path = 'team/nothing': no such file or folder; team/nothing {OFFLINE.format('dataset')}"
    with pytest.raises(UserError) as error:
        validation_datasets(make_data(cache, val_path="team/nothing/main"))
    assert str(error.value) == f"data.val_path = 'team/nothing/main': no such file or folder; team/nothing {OFFLINE.format('dataset')}"
    with pytest.raises(UserError) as error:
        resolve_base_path("team/nothing")
    assert str(error.value) == f"base.path = 'team/nothing': no such folder; team/nothing {OFFLINE.format('model')}"


@pytest.mark.parametrize("path", ["nowhere", "/team/nothing", "./team/nothing", "team/nothing/", "team/../nothing", "team//nothing", ""])
def test_what_cannot_be_a_name_is_not_looked_for(cache, monkeypatch, path):
    monkeypatch.setattr(hub, "_snapshot", None)
    with pytest.raises(UserError, match=r"no such file or folder$"):
        find_datasets(make_data(cache, path=path))
    if path:
        with pytest.raises(UserError, match=r"no such folder$"):
            resolve_base_path(path)


class Response:
    """What the errors of huggingface_hub keep of an answer."""

    status_code, headers, request = 401, {}, None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError, "is not there, or private (hf auth login); or give a path"),
        (GatedRepoError, "is open to those only who asked for access and logged in (hf auth login); or give a path"),
        (ConnectionResetError, "cannot be fetched (ConnectionResetError: two lines); give a path"),
    ],
)
def test_what_the_hub_refuses_is_one_line(cache, monkeypatch, error, words):
    def refuse(*args, **keys):
        raise error("two\nlines", response=Response()) if issubclass(error, RepositoryNotFoundError) else error("two\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as refusal:
        resolve_base_path("team/nothing")
    message = str(refusal.value)
    assert message == f"base.path = 'team/nothing': no such folder; team/nothing as a model of Hugging Face's hub {words}"


def test_without_the_package_one_line_says_how_to_install_it(tmp_path):
    code = """
import sys
sys.modules["huggingface_hub"] = None
from spectitan import hub
try:
    hub.fetch_model("team/base", (), "base.path = 'team/base': no such folder")
except ValueError as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "UserError base.path = 'team/base': no such folder; team/base as a model of Hugging Face's hub needs the package huggingface_hub: "
        'pip install "spectitan[hub]", or give a path\n'
    )
