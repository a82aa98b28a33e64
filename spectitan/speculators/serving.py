"""Folders with a trained speculator: written for servers and other trainers, and read back.

    config.json  model.safetensors (verl: pytorch_model.bin)  README.md

The family says what stands in config.json and under which names (`Speculator.serving`); this file writes and reads it.
"""

import json
import os
import shutil
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from torch import Tensor

from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.files import naming, replace_folder
from spectitan.hub import name_of_snapshot
from spectitan.models.config_file import ConfigFile
from spectitan.models.hf_config import hf_class
from spectitan.models.readout import Readout
from spectitan.models.safetensors_files import INDEX, SINGLE, check_tensors, list_tensors, open_tensors, write_tensors
from spectitan.speculators.base import Speculator
from spectitan.speculators.pickled_tensors import PICKLE, read_pickled, write_pickled
from spectitan.speculators.registry import SPECULATORS, type_of
from spectitan.speculators.serve_notes import folder_readme
from spectitan.speculators.speculators_folders import name_verifier

# architectures[0] and method in config.json -> speculator.type, and the export.format whose tensor names are its
_LAYOUTS = {
    ("MLPSpeculatorPreTrainedModel", "sum_rnn"): ("mlp", "mlp_speculator"),
    ("ArcticMLPSpeculatorPreTrainedModel", "sum_rnn"): ("mlp", "arctic"),
    ("ArcticLSTMSpeculatorPreTrainedModel", "sum_rnn"): ("mlp", "verl"),
    ("ArcticLSTMSpeculatorPreTrainedModel", "sum_lstm"): ("lstm", "verl"),
}
_SPECULATORS = {"eagle3": "eagle3"}  # speculators_model_type in config.json -> speculator.type; the format is "speculators"
_PREFIX = "speculator."  # of tensor names, in some layouts


class BaseShape(NamedTuple):
    hidden_size: int
    vocab_size: int


class Description(NamedTuple):
    """What the config.json of a folder says."""

    file: Path
    type: str  # speculator.type
    config: object  # the family's keys
    format: str  # whose tensor names it has
    base_shape: BaseShape
    base_fingerprint: str  # empty in folders of other systems


def choose_format(speculator: Speculator, format: str) -> str:
    """`export.format` itself if it can hold the speculator; auto is the family's first that can.

    Raises:
        UserError: it cannot, naming the key that is in the way.
    """
    if format == "auto" and speculator.formats:
        return next(format for format in speculator.formats if _holds(format, speculator))
    if format not in speculator.formats:
        allowed = ", ".join(["auto", *speculator.formats])
        raise UserError(f'export.format = "{format}" with speculator.type = "{type_of(speculator)}"; allowed: {allowed}')
    speculator.serving(format)
    return format


def _holds(format: str, speculator: Speculator) -> bool:
    try:
        speculator.serving(format)
    except UserError:
        return False
    return True


def name_of_base(base_path: Path, name: str = "") -> str:
    """What a folder calls its base: `name` (export.base_name), else `_name_or_path` of the base's config.json, else its folder's name.

    The folder of a model of Hugging Face's hub has the model's.

    A path of this machine is never written unless `name` asks for it.
    """
    if not name:
        stored = json.loads((base_path / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
        name = stored if isinstance(stored, str) and not PureWindowsPath(stored).anchor and not stored.startswith(("/", "~", ".")) else ""
    return name or name_of_snapshot(base_path) or base_path.resolve().name


def write_folder(
    speculator: Speculator,
    path: str | Path,
    format: str,
    base_path: Path,
    base_name: str = "",
    base_fingerprint: str = "",
    readout: Readout | None = None,
) -> None:
    """Writes a folder, in float32.

    All is written to a folder beside `path` first. A new `path` then appears at once; in one that exists, the three files
    are replaced, each at once, weights of another format removed, and other files stay. The same speculator gives the same bytes.

    Args:
        speculator: whole, not sharded.
        path: the folder, made with its parents.
        format: as `export.format`, not auto.
        base_path: the base's folder; its config.json is read.
        base_name: what the folder calls the base; "": see `name_of_base`.
        base_fingerprint: of the base that it was trained for; "": unknown.
        readout: of the base; needed where the folder holds some of it (`Speculator.borrowed`).

    Raises:
        UserError: the format cannot hold this speculator.
        OSError: the disk is full; what was at `path` is unchanged.
    """
    config, tensors = speculator.serving(format)
    name, architecture = name_of_base(base_path, base_name), hf_class(base_path)
    if format == "speculators":
        name_verifier(config, name, architecture)
    else:
        config |= {"base_model_name_or_path": name, "base_model_archs": [architecture], "torch_dtype": "float32"}
    if speculator.borrowed:
        tensors = tensors | speculator.base_tensors(readout)
    if base_fingerprint:
        config["base_fingerprint"] = base_fingerprint
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.mkdir(parents=True)
            _write_tensors(tensors, temporary, pickled=format == "verl")
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in temporary.glob("*.safetensors"):
                shutil.copymode(temporary / "config.json", file)  # safetensors lets only the owner read
            parameters = sum(parameter.numel() for parameter in speculator.parameters())
            readme = folder_readme(type_of(speculator), format, name, speculator.steps, parameters)
            (temporary / "README.md").write_text(readme, encoding="utf-8")
            replace_folder(temporary, path, stale=(SINGLE, INDEX, PICKLE))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tensors(tensors: dict[str, Tensor], folder: Path, pickled: bool) -> None:
    whole = {id(tensor): _on_disk(tensor) for tensor in tensors.values()}
    named = {name: whole[id(tensor)] for name, tensor in tensors.items()}
    if pickled:
        write_pickled(named, folder / PICKLE)
        return
    written: set[int] = set()
    for name, tensor in named.items():  # safetensors has no aliases: a name that repeats another's tensor gets a copy
        if id(tensor) in written:
            named[name] = tensor.clone()
        written.add(id(tensor))
    write_tensors(named, folder / SINGLE)


def _on_disk(tensor: Tensor) -> Tensor:
    """A copy on the CPU; numbers with a fraction are float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def has_weights(path: Path) -> bool:
    """Whether a folder holds more than a config.json."""
    return any((path / name).is_file() for name in (SINGLE, INDEX, PICKLE))


def describe_folder(path: str | Path) -> Description:
    """What a folder's config.json says; no weights are read.

    Raises:
        UserError: one line that names the file: no such file, or a value that is not allowed.
    """
    file = ConfigFile(Path(path), "a speculator's folder has config.json and its weights")
    if file.get("speculators_model_type") is not None:
        family = file.text("speculators_model_type")
        file.must(family in _SPECULATORS, "speculators_model_type", f"allowed: {', '.join(_SPECULATORS)}")
        type = _SPECULATORS[family]
        config, *base_shape = SPECULATORS[type][1].config_from_folder(file, "speculators")
        return Description(file.file, type, config, "speculators", BaseShape(*base_shape), file.text("base_fingerprint", ""))
    given = file.get("architectures")
    architecture = given[0] if isinstance(given, list) and len(given) == 1 else given  # ArcticTraining's mlp has no list
    file.must(isinstance(architecture, str), "architectures", "allowed: a list with one name")
    known = dict.fromkeys(architecture for architecture, _ in _LAYOUTS)
    file.must(architecture in known, "architectures", f"allowed: {', '.join(known)}")
    method = file.text("method", "sum_rnn")
    methods = [method for known, method in _LAYOUTS if known == architecture]
    file.must(method in methods, "method", f"allowed: {', '.join(methods)}")
    type, format = _LAYOUTS[architecture, method]
    config, *base_shape = SPECULATORS[type][1].config_from_folder(file, format)
    return Description(file.file, type, config, format, BaseShape(*base_shape), file.text("base_fingerprint", ""))


def load_speculator(path: str | Path, base_config, objective: Objective = Objective(), config=None) -> Speculator:
    """The speculator of a folder, in float32 on the CPU.

    Args:
        base_config: of the base, `hidden_size` and `vocab_size` at least.
        objective: the loss for training it on.
        config: the family's keys, if they differ from the folder's in what concerns training alone.

    Raises:
        UserError: one line that names the file: a missing or damaged one, a value that is not allowed, missing or extra
            tensors, a wrong shape, shared weights that differ; or the speculator is for a base of another shape.
    """
    folder = describe_folder(path)
    if folder.base_shape != (base_config.hidden_size, base_config.vocab_size):
        raise UserError(
            f"{folder.file}: the speculator is for a base with hidden size {folder.base_shape.hidden_size} and vocabulary "
            f"{folder.base_shape.vocab_size}; this base has {base_config.hidden_size} and {base_config.vocab_size}"
        )
    try:
        with torch.device("meta"):
            module = SPECULATORS[folder.type][1](config or folder.config, base_config, objective)
        expected = {name.removeprefix(_PREFIX): tensor for name, tensor in module.serving(folder.format)[1].items()}
    except UserError as error:
        raise UserError(f"{folder.file}: {error}") from None
    stored = _read_tensors(Path(path), expected, set(module.borrowed) - set(expected))
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, view in module.serving(folder.format)[1].items():
            if name.removeprefix(_PREFIX) in stored:
                view.copy_(stored[name.removeprefix(_PREFIX)])
    try:
        module.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return module


def _read_tensors(folder: Path, expected: dict[str, Tensor], borrowed: set[str]) -> dict[str, Tensor]:
    """All tensors of a folder, by name without the prefix; those in `borrowed`, the base's own, are left out.

    Names that share one tensor in `expected` are one weight with several names: some writers store all, some the first only.
    """
    first_name: dict[int, str] = {}
    for name, tensor in expected.items():
        first_name.setdefault(id(tensor), name)
    repeats = {name: first_name[id(tensor)] for name, tensor in expected.items() if first_name[id(tensor)] != name}
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items() if name not in repeats}

    where, found = _stored_tensors(folder)
    stored = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
    if len(stored) < len(found):
        raise UserError(f"{where}: tensors with and without the prefix {_PREFIX!r}; allowed: all names one way")
    check_tensors(where, {name: tuple(tensor.shape) for name, tensor in stored.items()}, shapes, set(repeats) | borrowed)
    for name, original in repeats.items():
        if name in stored and not torch.equal(stored[name], stored[original]):
            raise UserError(f"{where}: {name} differs from {original}; config.json says that they are one weight")
    return {name: stored[name] for name in expected if name in stored}


def _stored_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that holds or lists a folder's weights, and all tensors as they are named there, memory-mapped."""
    where = next((folder / name for name in (SINGLE, INDEX, PICKLE) if (folder / name).is_file()), folder / SINGLE)
    if where.name == PICKLE:
        return where, read_pickled(where)
    stored = {}
    for file in sorted({file for file, _ in list_tensors(folder).values()}):
        with open_tensors(file) as tensors:
            stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    return where, stored
