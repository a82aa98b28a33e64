"""Architectures and their named sizes; how a base model comes to be."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from spectitan.errors import UserError
from spectitan.models.decoder import DecoderConfig
from spectitan.models.families import ARCHITECTURES, arch_of, build_on_meta
from spectitan.models.gpt_bigcode import GPTBigCodeConfig
from spectitan.models.hf_config import read_config
from spectitan.models.layers import RopeScaling
from spectitan.models.llama import LlamaConfig
from spectitan.models.mixtral import MixtralConfig
from spectitan.models.transformers_config import read_hf_config
from spectitan.models.transformers_decoder import HFDecoder
from spectitan.models.transformers_weights import fill_hf
from spectitan.models.weights import load_hf, resolve_base_path

_ROPE_3_1 = RopeScaling("llama3", factor=8.0)
_ROPE_3_2 = RopeScaling("llama3", factor=32.0)
_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192, "bos_token_id": 128000, "eos_token_id": 128001}
_LLAMA_3_1 = {**_LLAMA_3, "max_position_embeddings": 131072}
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_layers": 40, "num_heads": 40}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8}
_3_2_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "tie_embeddings": True}
_3_2_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_layers": 28, "num_heads": 24, "num_kv_heads": 8, "tie_embeddings": True}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {"vocab_size": 151936, "rope_theta": 1e6, "norm_eps": 1e-6, "bos_token_id": 151643}
_QWEN_2 = dict(**_QWEN, model_type="qwen2", qkv_bias=True, max_position_embeddings=32768, eos_token_id=151643)
_QWEN_3 = dict(**_QWEN, model_type="qwen3", qk_norm=True, head_dim=128, max_position_embeddings=40960, eos_token_id=151645)

_MIXTRAL = {"vocab_size": 32000, "num_kv_heads": 8, "bos_token_id": 1, "eos_token_id": 2}

_CODE = {"vocab_size": 49152, "bos_token_id": 0, "eos_token_id": 0}  # StarCoder and Granite
_20B = {"hidden_size": 6144, "num_heads": 48}

_VARIANTS: dict[str, dict[str, DecoderConfig]] = {
    "embedllama": {
        "7b": LlamaConfig(**_LLAMA_2, **_7B),
        "13b": LlamaConfig(**_LLAMA_2, **_13B),
        "2-70b": LlamaConfig(**_LLAMA_2, **_70B),
        "8b": LlamaConfig(**_LLAMA_3, **_8B),
        "70b": LlamaConfig(**_LLAMA_3, **_70B),
        "3.1-8b": LlamaConfig(**_LLAMA_3_1, **_8B, rope_scaling=_ROPE_3_1),
        "3.1-70b": LlamaConfig(**_LLAMA_3_1, **_70B, rope_scaling=_ROPE_3_1),
        "3.2-1b": LlamaConfig(**_LLAMA_3_1, **_3_2_1B, rope_scaling=_ROPE_3_2),
        "3.2-3b": LlamaConfig(**_LLAMA_3_1, **_3_2_3B, rope_scaling=_ROPE_3_2),
        "mistral-7b": LlamaConfig(**_MISTRAL, **_8B),
        "qwen2.5-0.5b": LlamaConfig(
            **_QWEN_2, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2, tie_embeddings=True
        ),
        "qwen2.5-7b": LlamaConfig(
            **{**_QWEN_2, "vocab_size": 152064, "max_position_embeddings": 131072},
            hidden_size=3584,
            intermediate_size=18944,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
        ),
        "qwen3-0.6b": LlamaConfig(
            **_QWEN_3, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8, tie_embeddings=True
        ),
        "qwen3-4b": LlamaConfig(
            **_QWEN_3, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, num_kv_heads=8, tie_embeddings=True
        ),
        "qwen3-8b": LlamaConfig(**_QWEN_3, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8),
    },
    "embedmixtral": {
        "8x7b": MixtralConfig(
            **_MIXTRAL, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, max_position_embeddings=32768
        ),
        "8x22b": MixtralConfig(
            **_MIXTRAL, hidden_size=6144, intermediate_size=16384, num_layers=56, num_heads=48, max_position_embeddings=65536
        ),
    },
    "embedgptbigcode": {
        "starcoder-1b": GPTBigCodeConfig(**_CODE, hidden_size=2048, num_layers=24, num_heads=16),
        "starcoder-3b": GPTBigCodeConfig(**_CODE, hidden_size=2816, num_layers=36, num_heads=22),
        "starcoder-7b": GPTBigCodeConfig(**_CODE, hidden_size=4096, num_layers=42, num_heads=32),
        "starcoder": GPTBigCodeConfig(**_CODE, **_20B, num_layers=40),
        "20b": GPTBigCodeConfig(**_CODE, **_20B, num_layers=52),  # Granite's
        "34b": GPTBigCodeConfig(**_CODE, **_20B, num_layers=88),
    },
}


def register_model(arch: str, variant: str, config: DecoderConfig) -> None:
    """Adds a named size. Registering a name anew replaces it."""
    _check_choice("base.arch", arch, _VARIANTS)
    _VARIANTS[arch][variant] = config


def get_model(
    arch: str,
    variant: str,
    path: str | Path = "",
    init: str = "pretrained",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """A base model with its weights.

    Args:
        arch: embedllama, embedmixtral, embedgptbigcode, hf (whatever transformers loads), or auto: as config.json in `path`, or the variant, says.
        variant: a registered size, or "auto": config.json in `path` says it.
        path: folder in Hugging Face layout, or spectitan:NAME.
        init: "pretrained" reads the weights in `path`; "random" draws them.
        dtype: of the parameters.
        device: "meta" gives shapes without weights, to be sharded, made by `to_empty` and filled by `fill_model`.
        seed: of random weights.

    Raises:
        UserError: an unknown name, no such folder, config.json or weights that do not fit.
    """
    _check_choice("base.init", init, ("pretrained", "random"))
    config = choose_config(arch, variant, path)
    if init == "pretrained" and not path:
        raise UserError('base.path is empty: base.init = "pretrained" needs a folder with weights; base.init = "random" does not')
    if arch_of(config) == "hf" and init != "pretrained":
        raise UserError(f'base.init = "{init}" with base.arch = "hf", which runs a frozen base; allowed: pretrained')
    model = build_on_meta(config)
    for parameter in model.parameters():  # not `to`: rotary frequencies stay as they are
        parameter.data = parameter.data.to(dtype)
    if torch.device(device).type == "meta":
        return model
    fill_model(model.to_empty(device=device), path, init, seed)
    return model


def fill_model(model: nn.Module, path: str | Path = "", init: str = "pretrained", seed: int = 0) -> None:
    """Gives every parameter of a model, sharded or not, its value. Arguments and errors: see `get_model`."""
    if isinstance(model, HFDecoder):
        fill_hf(model, resolve_base_path(path))
    elif init == "pretrained":
        load_hf(model, path)
    else:
        model.init_weights(torch.Generator().manual_seed(seed))


def choose_config(arch: str, variant: str, path: str | Path) -> DecoderConfig:
    """The config that `get_model` builds, without building it. Raises as that does."""
    _check_choice("base.arch", arch, ("auto", *ARCHITECTURES))
    if variant == "auto" and not path:
        raise UserError('base.path is empty: base.variant = "auto" reads config.json there; a registered variant needs none')
    if variant == "auto":
        return _read_config(arch, path)
    config = _registered(arch, variant)
    if path and (resolve_base_path(path) / "config.json").is_file():
        stored = _read_config(arch_of(config), path).identity()
        for name, value in config.identity().items():
            if stored[name] != value:
                here, there = f"base.variant = {variant!r} has {name} = {value}", f"config.json in {path} says {stored[name]}"
                raise UserError(f'{here}, {there}; allowed there: "auto"')
    return config


def _read_config(arch: str, path: str | Path) -> DecoderConfig:
    if arch == "hf":
        return read_hf_config(resolve_base_path(path))
    config = read_config(resolve_base_path(path))
    if arch not in ("auto", arch_of(config)):
        raise UserError(f"base.arch = {arch!r}: config.json in {path} is of {arch_of(config)}; allowed there: that, or auto")
    return config


def _registered(arch: str, variant: str) -> DecoderConfig:
    variants = {name: config for each in _VARIANTS if arch in ("auto", each) for name, config in _VARIANTS[each].items()}
    _check_choice("base.variant", variant, ("auto", *variants))
    return variants[variant]


def _check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key} = {value!r}: allowed: {', '.join(allowed)}")
