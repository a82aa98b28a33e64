"""Folders in Hugging Face layout: read, written, identified; damaged and hostile ones refused in one line."""

import json
import math
import resource
import shutil
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from spectitan.errors import UserError
from spectitan.models import registry, weights
from spectitan.models.hf_config import read_config
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.registry import fill_model, get_model, register_model
from spectitan.models.weights import fingerprint, load_hf, resolve_base_path, save_hf
from tests.unit.model_fixtures import FAMILIES, oracle, random_tokens, relative_error, save_oracle
from tests.unit.test_files import full_disk


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    save_oracle("llama3", folder)
    return folder


@pytest.fixture
def folder(stored, tmp_path):
    """A good folder, to be damaged."""
    return shutil.copytree(stored, tmp_path / "base")


def load(folder):
    return get_model("auto", "auto", folder)


def refusal(action, *args) -> str:
    """The one line of a refusal."""
    with pytest.raises(UserError) as error:
        action(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


# Written weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 9000])
def test_transformers_reads_what_is_written(family, max_shard_bytes, tmp_path):
    theirs = save_oracle(family, tmp_path / "read")
    ours = load(tmp_path / "read")
    save_hf(ours, tmp_path / "written", torch.float32, max_shard_bytes=max_shard_bytes)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32, output_loading_info=True)
    assert type(again) is type(theirs) and not any(report.values())
    tokens = random_tokens(2, 13)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    for name in ("eos_token_id", "bos_token_id", "max_position_embeddings", "sliding_window", "rope_parameters"):
        assert getattr(again.config, name, None) == getattr(theirs.config, name, None), name
    files = {file.name for file in (tmp_path / "written").iterdir()}
    if max_shard_bytes == 10**9:
        assert files == {"config.json", "model.safetensors"}
    else:
        assert "model.safetensors.index.json" in files and len(files) > 5
        assert all(file.stat().st_size < 12_000 for file in (tmp_path / "written").iterdir())  # an embedding is 9.3 kB
    ours_again = load(tmp_path / "written")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), ours_again.parameters()))
    assert read_config(tmp_path / "written") == read_config(tmp_path / "read")


def test_dtypes_are_converted_both_ways(stored, tmp_path):
    save_hf(load(stored), tmp_path / "half", torch.bfloat16)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    exact, rounded = load_file(stored / "model.safetensors"), load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    model = get_model("embedllama", "auto", tmp_path / "half", dtype=torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert torch.equal(model.readout.norm.weight, rounded["model.norm.weight"].double())


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_a_head_that_nobody_asks_for_is_not_read(family, tmp_path):
    save_oracle(family, tmp_path)
    whole = get_model("embedllama", "auto", tmp_path)
    model = get_model("embedllama", "auto", tmp_path, device="meta")
    model.readout.drop_head()
    model.to_empty(device="cpu")
    load_hf(model, tmp_path)
    missing = {name for name, _ in whole.named_parameters()} - {name for name, _ in model.named_parameters()}
    assert missing == (set() if whole.readout.tied else {"readout.head.weight"})
    tokens = random_tokens(2, 7)
    assert torch.equal(model(tokens).final, whole(tokens).final)


def test_an_existing_folder_keeps_other_files_and_loses_old_weights(stored, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "qwen.tiktoken", "notes.txt"):
        (tokenizer / name).write_text(name)
    target = tmp_path / "deep/er/model"
    model = load(stored)
    save_hf(model, target, torch.float32, tokenizer_files_from=tokenizer, max_shard_bytes=9000)
    (target / "README.md").write_text("a card")
    save_hf(model, target, torch.float32, tokenizer_files_from=tokenizer)
    files = {file.name for file in target.iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "qwen.tiktoken"}
    assert [file.name for file in target.parent.iterdir()] == ["model"]
    assert fingerprint(target) == fingerprint(stored)


def test_a_full_disk_leaves_nothing_and_touches_nothing(folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = load(folder)
    for target in (folder, tmp_path / "new"):
        with full_disk(1000), pytest.raises(OSError, match="File too large") as caught:
            save_hf(model, target, torch.bfloat16)
        assert caught.value.filename == str(target)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


# Identity


def test_fingerprints_follow_content_not_form(stored, tmp_path):
    identity = fingerprint(stored)
    model = load(stored)
    assert fingerprint(model) == identity and len(identity) == 64
    save_hf(model, tmp_path / "shards", torch.float32, max_shard_bytes=9000)
    assert fingerprint(tmp_path / "shards") == identity
    assert fingerprint(model.double()) == identity
    save_hf(model, tmp_path / "half", torch.bfloat16)
    assert fingerprint(tmp_path / "half") == fingerprint(get_model("embedllama", "auto", tmp_path / "half")) == identity
    with torch.no_grad():
        model.layers[2].mlp.down_proj.weight.mul_(1.1)
    assert fingerprint(model) != identity


def test_fingerprints_see_the_config(folder):
    identity = fingerprint(folder)
    edit(folder, rms_norm_eps=1e-4)
    assert fingerprint(folder) != identity


def test_fingerprints_read_little_of_a_large_base(folder):
    """Of a sparse file of 2 GB only a few pages are touched."""
    config = json.loads((folder / "config.json").read_text())
    edit(folder, vocab_size=(vocab := 2**30 // (4 * config["hidden_size"])))
    header, end = {}, 0
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        shape = [vocab, *tensor.shape[1:]] if name == "model.embed_tokens.weight" else list(tensor.shape)
        if name == "lm_head.weight":
            shape = [vocab, *tensor.shape[1:]]
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert len(fingerprint(folder)) == 64
    after = resource.getrusage(resource.RUSAGE_SELF)
    pages = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
    assert end > 2**31 and pages < 10_000  # all of it would be 500,000


# Names


def test_shipped_and_other_paths(stored, tmp_path, monkeypatch):
    assert resolve_base_path(str(stored)) == stored
    monkeypatch.setattr(weights.resources, "files", lambda package: tmp_path)
    shutil.copytree(stored, tmp_path / "assets/tiny")
    assert resolve_base_path("spectitan:tiny") == tmp_path / "assets/tiny"
    assert refusal(resolve_base_path, "spectitan:huge").endswith("allowed: spectitan:tiny, or a folder")
    assert "no such folder" in refusal(resolve_base_path, tmp_path / "nowhere")
    for name in ("spectitan:", "spectitan:..", "spectitan:../assets/tiny"):
        assert "no such base ships" in refusal(resolve_base_path, name)


def test_models_by_name(stored, monkeypatch):
    assert "base.arch = 'gpt': allowed: auto, embedllama, embedmixtral, embedgptbigcode, hf" in refusal(get_model, "gpt", "7b")
    assert "base.variant = '9b': allowed: auto, 7b, " in refusal(get_model, "embedllama", "9b")
    assert "base.init = 'zero': allowed: pretrained, random" in refusal(get_model, "embedllama", "auto", stored, "zero")
    assert refusal(get_model, "embedllama", "7b").startswith("base.path is empty")
    assert refusal(get_model, "embedllama", "auto").startswith("base.path is empty")
    assert "7b' has vocab_size = 32000" in refusal(get_model, "embedllama", "7b", stored)
    monkeypatch.setattr(registry, "_VARIANTS", {"embedllama": {}})
    register_model("embedllama", "mine", read_config(stored))
    assert fingerprint(get_model("embedllama", "mine", stored)) == fingerprint(stored)
    random = [get_model("embedllama", "mine", init="random", seed=seed) for seed in (1, 1, 2)]
    assert fingerprint(random[0]) == fingerprint(random[1]) != fingerprint(random[2])


@pytest.mark.parametrize(
    "variant, billions",
    [("7b", 6.74), ("13b", 13.02), ("2-70b", 68.98), ("8b", 8.03), ("70b", 70.55), ("3.1-8b", 8.03), ("3.1-70b", 70.55), ("3.2-1b", 1.24),
     ("3.2-3b", 3.21), ("mistral-7b", 7.24), ("qwen2.5-0.5b", 0.49), ("qwen2.5-7b", 7.62), ("qwen3-0.6b", 0.60), ("qwen3-4b", 4.02),
     ("qwen3-8b", 8.19)],
)  # fmt: skip
def test_registered_variants_have_the_published_size(variant, billions):
    model = get_model("embedllama", variant, init="random", device="meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions


# config.json


def edit(folder, **changes):
    """Changes keys of config.json; ... removes one."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_older_rope_keys_say_the_same(folder):
    new = read_config(folder)
    edit(folder, rope_parameters=..., rope_theta=500.0, rope_scaling=None)
    assert read_config(folder) == new
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    edit(folder, rope_scaling={"type": "llama3", **scaling})
    old = read_config(folder)
    edit(folder, rope_scaling=..., rope_theta=..., rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **scaling})
    assert read_config(folder) == old


def test_defaults_are_those_of_the_family(folder):
    edit(folder, num_key_value_heads=..., head_dim=None, rope_parameters=..., rope_theta=..., tie_word_embeddings=..., attention_bias=...)
    config = read_config(folder)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.tie_embeddings, config.qkv_bias) == (
        6,
        4,
        10000.0,
        False,
        False,
    )
    edit(folder, model_type="mistral", num_key_value_heads=2)
    assert read_config(folder).sliding_window == 4096
    edit(folder, sliding_window=None)
    assert read_config(folder).sliding_window == -1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, 'model_type = "gpt2": allowed: llama, qwen2, qwen3, mistral, mixtral, gpt_bigcode'),
        ({"model_type": ...}, "model_type is missing"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
        ({"hidden_size": "big"}, 'hidden_size = "big": an integer'),
        ({"hidden_size": 0}, "hidden_size = 0: an integer from 1 to 2147483647"),
        ({"num_attention_heads": True}, "num_attention_heads = true: an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN: a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: true or false"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu": allowed: silu'),
        ({"head_dim": 7}, "head_dim = 7: rotary positions need an even number"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4: it must divide num_attention_heads = 6"),
        ({"eos_token_id": [1, "2"]}, 'eos_token_id = .1, "2".: an integer, a list of them, or null'),
        ({"bos_token_id": [1]}, "bos_token_id = .1.: an integer or null"),
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be read"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_parameters = .*allowed rope_type: default, linear, llama3"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic"}}, "rope_scaling = .*allowed rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters = .*factor must be a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters = .*only 1.0"),
        ({"rope_parameters": [1]}, "rope_parameters = .*an object or null"),
        ({"rope_parameters": ..., "rope_theta": -1}, "rope_theta = -1: rope_theta must be a number above 0"),
        ({"model_type": "qwen3", "head_dim": ...}, "head_dim is missing"),
        ({"model_type": "qwen2", "num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = true: qwen2 is read without"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "layer_types = .*full_attention"),
    ],
)
def test_configs_that_are_refused(folder, changes, message):
    edit(folder, **changes)
    line = refusal(load, folder)
    assert line.startswith(f"{folder / 'config.json'}: ")
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "content, message", [(b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1]", "a JSON object is expected, found list")]
)
def test_config_files_that_are_no_json_object(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert message in refusal(load, folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(load, folder)


# Damaged and hostile weights


def rewrite(folder, change):
    """Lets `change` edit the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 5000, -1])
def test_truncated_files(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(load, folder)
    assert message.startswith(f"{file}: ") and "truncated" in message


def damaged(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


@pytest.mark.parametrize(
    "content, message",
    [
        (damaged(b"{}", 2**63), "a header of 9223372036854775808 bytes"),
        (damaged(b"{}", 200_000_000) + bytes(1000), "a header of 200000000 bytes"),
        (damaged(b"not json"), "header is damaged"),
        (damaged(b"[" * 100_000), "header is damaged"),
        (damaged(b"[]"), "header is damaged"),
        (damaged(b'{"a": 1}'), "header is damaged"),
        (damaged(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4), "header is damaged: shape"),
        (damaged(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}') + bytes(4), r"shape \[2\] of F32 does not fit 4 bytes"),
        (damaged(b'{"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}') + bytes(4), "dtype I8, allowed: F64, F32, F16, BF16"),
        (damaged(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + bytes(2), "2 bytes of tensors, the header says 4"),
    ],
)
def test_damaged_headers(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    assert refusal(load, folder).startswith(f"{folder / 'model.safetensors'}: ")
    with pytest.raises(UserError, match=message):
        fingerprint(folder)


def test_overlapping_tensors_are_refused_by_the_library(folder):
    tensors = load_file(folder / "model.safetensors")
    header, start = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, start + 4 * tensor.numel()]}
        start += 4 * tensor.numel()
    names = [name for name in header if "norm" in name][:2]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    (folder / "model.safetensors").write_bytes(damaged(json.dumps(header).encode()) + bytes(start))
    assert "not a valid safetensors file" in refusal(load, folder)


def test_tensors_must_be_those_of_the_config(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in ("lm_head.weight", "model.norm.weight")])
    assert "2 tensors that config.json asks for are missing: lm_head.weight, model.norm.weight" in refusal(load, folder)


def test_unknown_tensors_are_refused_and_old_rotary_tables_are_not(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    load(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}))
    assert "1 tensors that config.json does not know: model.layers.0.self_attn.q_proj.bias" in refusal(load, folder)


def test_a_tied_head_may_be_stored(tmp_path):
    theirs = save_oracle("qwen2", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(97, 24)}))
    tokens = random_tokens(1, 5)
    ours = load(tmp_path)
    assert relative_error(ours.readout.logits(ours(tokens).final), theirs(tokens).logits) < 1e-5


def test_wrong_shapes(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(4, 24)}))
    assert "model.layers.1.self_attn.k_proj.weight is [4, 24], config.json asks for [8, 24]" in refusal(load, folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights; expected: model.safetensors" in refusal(load, folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pytorch_model.bin is a pickle" in refusal(load, folder)


@pytest.fixture
def sharded(stored, tmp_path):
    save_hf(load(stored), tmp_path / "shards", torch.float32, max_shard_bytes=9000)
    return tmp_path / "shards"


@pytest.mark.parametrize(
    "path", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "..\\b.safetensors", "C:\\b.safetensors"]
)
def test_an_index_stays_in_its_folder(sharded, path):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = path
    file.write_text(json.dumps(index))
    message = refusal(load, sharded)
    assert message.startswith(f"{file}: ") and "leaves the folder" in message


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "is expected: KeyError"),
        ("[]", "is expected"),
        ('{"weight_map": {"a": 3}}', "is expected: TypeError"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "is no safetensors file"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors: no such file"),
    ],
)
def test_broken_indices(sharded, content, message):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert message in refusal(load, sharded)


def test_shards_must_hold_what_the_index_says(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = index["weight_map"]
    first, last = "model.embed_tokens.weight", "model.norm.weight"
    names[first], names[last] = names[last], names[first]
    file.write_text(json.dumps(index))
    assert f"{sharded / names[last]}: tensor {first} is not what" in refusal(load, sharded)


def test_nothing_is_changed_by_a_refused_load(folder):
    model = load(folder)
    before = [parameter.clone() for parameter in model.parameters()]
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(25)}))
    refusal(load_hf, model, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_registered_sizes_are_configs_that_can_be_written(tmp_path):
    tiny = LlamaConfig(17, 8, 12, num_layers=1, num_heads=2, eos_token_id=(3, 4))
    model = EmbedLLaMA(tiny)
    model.init_weights(torch.Generator().manual_seed(0))
    save_hf(model, tmp_path / "tiny", torch.float32)
    assert read_config(tmp_path / "tiny") == tiny
    assert oracle("llama2").config.model_type == tiny.model_type


@pytest.mark.parametrize("family", ["llama2", "llama3.2", "mixtral", "gpt_bigcode"])
def test_the_readout_alone_is_read(tmp_path, family):
    """Without its layers a base has its two ends, and no more, also where the files of the layers are not there."""
    save_oracle(family, tmp_path)
    whole = get_model("auto", "auto", tmp_path)
    ends = {name: tensor for name, tensor in whole.named_parameters() if name.startswith("readout.")}
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name and ".h." not in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors")
    alone = get_model("auto", "auto", tmp_path, device="meta")
    alone.drop_layers()
    alone.to_empty(device="cpu")
    fill_model(alone, tmp_path)
    found = dict(alone.named_parameters())
    assert found.keys() - ends.keys() == {name for name in found if "position" in name}
    assert all(torch.equal(found[name], tensor) for name, tensor in ends.items())
