"""Folders with a trained speculator: written for servers, and read back.

    config.json  model.safetensors  README.md

The family says what stands in config.json and under which names (`Speculator.serving`); this file writes and reads it.
"""

import json
import os
import shlex
import shutil
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.models.hf_config import ARCHITECTURES, read_config
from spectitan.models.safetensors_files import SINGLE, locate_tensors, open_tensors
from spectitan.speculators.base import Speculator
from spectitan.speculators.folder_config import FolderConfig
from spectitan.speculators.registry import SPECULATORS

# architectures[0] of config.json -> (speculator.type, format)
_ARCHITECTURES = {"MLPSpeculatorPreTrainedModel": ("mlp", "mlp_speculator")}
_FORMAT_OF_TYPE = {type: format for type, format in reversed(_ARCHITECTURES.values())}


class _BaseShape(NamedTuple):
    hidden_size: int
    vocab_size: int


def default_format(type: str) -> str:
    """What `export.format = "auto"` means for a family."""
    return _FORMAT_OF_TYPE[type]


def name_of_base(base_path: Path, name: str = "") -> str:
    """What a folder calls its base: `name` (export.base_name), else `_name_or_path` of the base's config.json, else its folder's name.

    A path of this machine is never written unless `name` asks for it.
    """
    if not name:
        stored = json.loads((base_path / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
        name = stored if isinstance(stored, str) and not PureWindowsPath(stored).anchor and not stored.startswith(("/", "~", ".")) else ""
    return name or base_path.resolve().name


def write_folder(speculator: Speculator, path: str | Path, format: str, base_path: Path, base_name: str = "") -> None:
    """Writes a serving folder, in float32. Every rank calls it; rank 0 writes.

    All is written to a folder beside `path` first. A new `path` then appears at once; in one that exists, the three files
    are replaced, each at once, and others stay. The same speculator gives the same bytes.

    Args:
        speculator: sharded or not.
        path: the folder, made with its parents.
        format: as `export.format`, not auto.
        base_path: the base's folder; its config.json is read.
        base_name: what the folder calls the base; "": see `name_of_base`.

    Raises:
        UserError: the format cannot hold this speculator.
    """
    config, tensors = speculator.serving(format)
    config |= {
        "base_model_name_or_path": name_of_base(base_path, base_name),
        "base_model_archs": [ARCHITECTURES[read_config(base_path).model_type]],
        "torch_dtype": "float32",
    }
    # A name that repeats another's tensor gets a copy: safetensors has no aliases.
    full = {name: _full(tensor).to("cpu", torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file(full, temporary / SINGLE, metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(temporary / "config.json", temporary / SINGLE)  # safetensors lets only the owner read
        (temporary / "README.md").write_text(_readme(config, sum(p.numel() for p in speculator.parameters())), encoding="utf-8")
        if not path.exists():
            temporary.rename(path)
            return
        for file in sorted(temporary.iterdir()):
            file.replace(path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the tensors of a serving folder, after checking that they are a whole speculator.

    Raises:
        UserError: one line that names the file: a missing or damaged one, a value that is not allowed, missing or extra
            tensors, a wrong shape, or tied weights that differ.
    """
    folder = FolderConfig(Path(path))
    _, _, expected = _skeleton(folder)
    return folder.content, _read_tensors(Path(path), expected)


def load_speculator(path: str | Path, base_config, objective: Objective = Objective()) -> Speculator:
    """The speculator of a serving folder, in float32 on the CPU.

    Args:
        base_config: the base's `hidden_size` and `vocab_size`.
        objective: the loss for training it on.

    Raises:
        UserError: as `read_folder`; or the folder is of another base.
    """
    folder = FolderConfig(Path(path))
    module, base_shape, expected = _skeleton(folder, objective)
    if base_shape != (base_config.hidden_size, base_config.vocab_size):
        raise UserError(
            f"{folder.file}: the speculator is for a base with hidden size {base_shape.hidden_size} and vocabulary "
            f"{base_shape.vocab_size}; this base has {base_config.hidden_size} and {base_config.vocab_size}"
        )
    stored = _read_tensors(Path(path), expected)
    module.to_empty(device="cpu")
    _, views = module.serving(_ARCHITECTURES[folder.architecture()][1])
    for name, tensor in stored.items():
        views[name].copy_(tensor)
    return module


def serve_notes(format: str, folder: str, base_name: str, num_draft_tokens: int) -> list[str]:
    """Lines that say how to serve a folder: the command, and which servers take it."""
    assert format == "mlp_speculator", format

    def command(**more: str) -> str:
        speculative_config = json.dumps(more | {"model": folder, "num_speculative_tokens": num_draft_tokens})
        return f"vllm serve {shlex.quote(base_name)} --speculative-config {shlex.quote(speculative_config)}"

    return [
        f"VLLM_USE_V1=0 {command()}",
        "",
        "Servers that take it:",
        "- vLLM 0.9 with its V0 engine (VLLM_USE_V1=0, the command above). Its V1 engine, the only one of later versions, does not.",
        '- ArcticInference (on vLLM 0.18), once "architectures" in config.json is ["ArcticMLPSpeculatorPreTrainedModel"]:',
        f"  ARCTIC_INFERENCE_ENABLED=1 {command(method='arctic')}",
        "- IBM's fms-extras, whose layout it is.",
    ]


def _readme(config: dict, parameters: int) -> str:
    heads = config["n_predict"]
    notes = serve_notes("mlp_speculator", ".", config["base_model_name_or_path"], heads)
    return "\n".join(
        [
            f"# MLP speculator for {config['base_model_name_or_path']}",
            "",
            f"A draft model for speculative decoding: {heads} heads, width {config['inner_dim']}, {parameters:,} parameters, in IBM's",
            "`mlp_speculator` layout. Written by spectitan. It works with the base model above and no other. In this folder:",
            "",
            f"    {notes[0]}",
            *notes[1:],
            "",
        ]
    )


def _skeleton(folder: FolderConfig, objective: Objective = Objective()) -> tuple[Speculator, _BaseShape, dict[str, Tensor]]:
    """The speculator that a config.json describes and its tensors by name, all on the meta device, and its base's shape."""
    architecture = folder.architecture()
    if architecture not in _ARCHITECTURES:
        raise UserError(f"{folder.file}: architectures = {architecture!r}: allowed: {', '.join(_ARCHITECTURES)}")
    type, format = _ARCHITECTURES[architecture]
    family = SPECULATORS[type][1]
    config, *shape = family.config_from_folder(folder)
    base_shape = _BaseShape(*shape)
    try:
        with torch.device("meta"):
            module = family(config, base_shape, objective)
    except UserError as error:
        raise UserError(f"{folder.file}: {error}") from None
    return module, base_shape, module.serving(format)[1]


def _read_tensors(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors that the folder has, by name.

    Names that share one tensor in `expected` are one weight of several steps: some writers store all of them, some the first
    only.
    """
    first_name: dict[int, str] = {}
    for name, tensor in expected.items():
        first_name.setdefault(id(tensor), name)
    repeats = {name: first_name[id(tensor)] for name, tensor in expected.items() if first_name[id(tensor)] != name}
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items() if name not in repeats}
    stored = {}
    for file in sorted(set(locate_tensors(folder, shapes, set(repeats)).values())):
        with open_tensors(file) as tensors:
            stored |= {name: tensors.get_tensor(name) for name in tensors.keys() if name in expected}
    for name, original in repeats.items():
        if name in stored and not torch.equal(stored[name], stored[original]):
            raise UserError(f"{folder / SINGLE}: {name} differs from {original}; with tie_weights they are one weight")
    return stored


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
