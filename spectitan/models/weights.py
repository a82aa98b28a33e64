"""Weights of a base model in Hugging Face layout: read, written, and identified."""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectitan import heartbeat, hub
from spectitan.errors import UserError
from spectitan.files import naming, replace_folder
from spectitan.models.decoder import Decoder, DecoderConfig
from spectitan.models.families import build_on_meta
from spectitan.models.hf_config import config_to_json, read_config
from spectitan.models.hf_layout import HFLayout
from spectitan.models.layers import own_part
from spectitan.models.safetensors_files import INDEX, SINGLE, locate_tensors, open_tensors, weight_files, write_tensors
from spectitan.models.transformers_config import HFConfig

_HEAD = "lm_head.weight"
_FINGERPRINT_NUMBERS = 256  # of each tensor
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "generation_config.json",  # the ids at which generation ends
)


def resolve_base_path(path: str | Path) -> Path:
    """The folder that `base.path` means: itself, a model of Hugging Face's hub, or for "spectitan:NAME" one that ships with the package.

    Raises:
        UserError: there is no such folder, and no such model.
    """
    text = str(path)
    if not text.startswith("spectitan:"):
        folder, problem = Path(text).expanduser(), f"base.path = {text!r}: no such folder"
        if folder.is_dir():
            return folder
        if hub.could_be_model(text):
            return hub.fetch_model(text, ("config.json", SINGLE, INDEX, "model-*.safetensors", *_TOKENIZER_FILES), problem)
        raise UserError(problem)
    assets = Path(str(resources.files("spectitan"))) / "assets"
    shipped = sorted(folder.name for folder in assets.iterdir() if (folder / "config.json").is_file())
    name = text.removeprefix("spectitan:")
    if name not in shipped:
        allowed = ", ".join(f"spectitan:{each}" for each in shipped) or "none"
        raise UserError(f"base.path = {text!r}: no such base ships; allowed: {allowed}, or a folder")
    return assets / name


def load_hf(model: Decoder, path: str | Path) -> None:
    """Fills every parameter of a model, sharded or not, in its own dtype. A rank reads only the bytes of what it keeps.

    Raises:
        UserError: see `locate_tensors`.
    """
    layout = HFLayout(build_on_meta(model.config))  # the model may have dropped its head or its layers
    wanted = {piece.stored for name, _ in model.named_parameters() for piece in layout.pieces[name]}
    shapes = {name: shape for name, shape in layout.shapes.items() if name in wanted}
    # A tied head may be stored all the same (it is the embedding), and what nobody asks for need not be read.
    files = locate_tensors(resolve_base_path(path), shapes, (layout.shapes.keys() | {_HEAD}) - wanted)
    for name, parameter in model.named_parameters():
        local, place = own_part(parameter)
        for stored, stored_place, part in layout.parts(name, local, place):
            with open_tensors(files[stored]) as tensors:  # anew for each tensor: what is mapped counts as this process's memory
                part.copy_(tensors.get_slice(stored)[stored_place])
            heartbeat.beat()


def save_hf(
    model: Decoder,
    path: str | Path,
    dtype: torch.dtype,
    tokenizer_files_from: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, safetensors and tokenizer files. Every rank calls it; rank 0 writes.

    All is written to a folder beside `path` first. A new `path` then appears at once. In one that exists files are replaced,
    each at once, and weights of before removed; other files, a model card say, stay.

    Args:
        model: sharded or not.
        dtype: of the tensors on disk.
        tokenizer_files_from: folder, or spectitan:NAME, whose tokenizer files are copied.
        max_shard_bytes: larger weights become several files with an index.
    """
    path = Path(path)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    temporary = path.absolute().with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            if writes:
                temporary.mkdir(parents=True)
            _write_tensors(model, temporary if writes else None, dtype, max_shard_bytes)
            if writes:
                content = config_to_json(model.config, str(dtype).removeprefix("torch."))
                (temporary / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                for file in temporary.glob("*.safetensors"):
                    shutil.copymode(temporary / "config.json", file)  # safetensors lets only the owner read
                if tokenizer_files_from is not None:
                    source = resolve_base_path(tokenizer_files_from)
                    for file in {file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)}:
                        shutil.copyfile(file, temporary / file.name)
                replace_folder(temporary, path, stale=("model*.safetensors", INDEX))
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def fingerprint(source: nn.Module | str | Path, config: DecoderConfig | None = None) -> str:
    """Hex identity of a base, by which another one is refused later. Every rank calls it.

    A hash of what the config says about the function, and of a piece of every tensor in bfloat16: the same for a folder, the
    model read from it, and a copy in a wider dtype.

    Args:
        source: a model or a folder.
        config: of a folder; None: what config.json there says. transformers' models are identified by their folders.
    """
    if isinstance(source, nn.Module) and isinstance(source.config, HFConfig):
        source, config = source.config.folder, source.config
    if isinstance(source, nn.Module):
        config = source.config
        pieces = ((name, _middle(tensor)) for name, tensor in HFLayout(source).stored_tensors(source))
    else:
        folder = resolve_base_path(source)
        config = config or read_config(folder)
        pieces = _all_pieces(folder) if isinstance(config, HFConfig) else _stored_pieces(folder, config)
    digest = hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode())
    for name, piece in sorted(pieces, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(piece.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _middle(tensor: Tensor) -> Tensor:
    """The first numbers of the middle row (of a vector: of itself): few, and likely trained, unlike the first token's."""
    row = tensor if tensor.dim() == 1 else tensor[tensor.shape[0] // 2]
    return row[:_FINGERPRINT_NUMBERS].clone()


def _stored_pieces(folder: Path, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    shapes = HFLayout(build_on_meta(config)).shapes
    files = locate_tensors(folder, shapes, {_HEAD} - shapes.keys())
    for file in sorted(set(files.values())):
        with open_tensors(file) as tensors:
            for name in files:
                if files[name] == file:
                    heartbeat.beat()
                    yield name, _middle(tensors.get_tensor(name))


def _all_pieces(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and tensor.dim():
                    yield name, _middle(tensor)


def _write_tensors(model: Decoder, folder: Path | None, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Gathers one shard after another; None as folder only takes part in the gathering."""
    layout = HFLayout(model)
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, shape in layout.shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    stored = layout.stored_tensors(model)
    for file, shard in zip(files, shards):
        tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in itertools.islice(stored, len(shard))}
        assert list(tensors) == shard
        heartbeat.beat()
        if folder is not None:
            write_tensors(tensors, folder / file)
    if folder is not None and len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
