"""What was trained, as train, evaluate, export and generate find it: an exported folder, or a checkpoint and the run's keys in it."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectitan import hub
from spectitan.config.keys import toml_value
from spectitan.config.sections import Base, Objective
from spectitan.config.tables import Config
from spectitan.errors import UserError
from spectitan.files import to_path
from spectitan.models.decoder import DecoderConfig
from spectitan.models.registry import choose_config, get_model
from spectitan.models.safetensors_files import INDEX, SINGLE
from spectitan.models.weights import fingerprint, resolve_base_path
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import SPECULATORS, build_speculator, new_speculator
from spectitan.speculators.serving import describe_folder, load_speculator
from spectitan.training.checkpoint import checkpoints_folder, module_tensors
from spectitan.training.checkpoint_reading import find_checkpoint, read_state, read_tensors


class Trained(NamedTuple):
    """Where trained weights are."""

    path: Path  # an exported folder, or one checkpoint
    keys: dict[str, object]  # "section.key" -> value of the run that wrote the checkpoint; empty for a folder
    step: int | None = None  # optimizer steps done; None for a folder

    def section(self, name: str, kind: type):
        """One table of the run as an instance of `kind`; keys that it does not know are left out."""
        fields = [field.name for field in dataclasses.fields(kind)]
        return kind(**{field: self.keys[f"{name}.{field}"] for field in fields if f"{name}.{field}" in self.keys})


def find_trained(config: Config) -> Trained | None:
    """What `speculator.path` names: an exported folder, perhaps of the hub, a checkpoint, or a dump_folder. Without it: config file's run.

    Returns:
        None if neither is given, or if that run has saved nothing yet.

    Raises:
        UserError: nothing at `speculator.path`, or no valid checkpoint, or a speculator of another family than speculator.type, if given.
    """
    if config.speculator.path:
        path = _folder_named(config.speculator.path)
        if (path / "config.json").is_file():
            return _of_type_given(config, Trained(path, {}))
    elif config.job.config_file and checkpoints_folder(config.checkpoint, config.job.dump_folder).is_dir():
        path = checkpoints_folder(config.checkpoint, config.job.dump_folder)
    else:
        return None
    return _of_type_given(config, open_checkpoint(find_checkpoint(path)))


def _of_type_given(config: Config, trained: Trained) -> Trained:
    """`trained`, unless it is of another family than a given speculator.type; "none" asks for the base alone."""
    given = config.speculator.type
    if "speculator.type" in config.given and given != "none" and trained.keys.get("speculator.type") != "none":
        found = family_keys(trained)[0]
        if found != given:
            raise UserError(
                f"speculator.type = {toml_value(given)}; {trained.path} has {toml_value(found)}: leave speculator.type out, or name another "
                "speculator.path"
            )
    return trained


def _folder_named(path: str) -> Path:
    folder, problem = to_path(path).expanduser(), f"speculator.path = {path!r}: no such folder"
    if folder.is_dir():
        return folder
    if hub.could_be_model(path):
        return hub.fetch_model(path, ("config.json", SINGLE, INDEX, "model-*.safetensors"), problem)
    raise UserError(problem)


def open_checkpoint(path: Path) -> Trained:
    """A checkpoint that has been verified."""
    state = read_state(path)
    return Trained(path, state["identity"], state["step"])


def family_keys(trained: Trained) -> tuple[str, object]:
    """speculator.type, and the family's keys as an instance of its Config class."""
    if not trained.keys:
        folder = describe_folder(trained.path)
        return folder.type, folder.config
    type = trained.keys["speculator.type"]
    if type == "none":
        raise UserError(f"{trained.path} holds a base and no speculator")
    return type, trained.section("speculator", SPECULATORS[type][0])


def base_fingerprint(config: Config, trained: Trained) -> str:
    """Fingerprint of the base that it was trained for; empty if a folder of another system does not say it."""
    if not trained.keys:
        return describe_folder(trained.path).base_fingerprint
    if trained.keys["base.freeze"]:
        return trained.keys["base.identity"]
    return fingerprint(load_base(config, trained, torch.bfloat16)[0])


def check_base(config: Config, trained: Trained, found: str) -> None:
    """Refuses another base than the one that it was trained for, unless base.allow_other is set.

    Args:
        found: the base's fingerprint.
    """
    expected = "" if config.base.allow_other else base_fingerprint(config, trained)
    if expected and expected != found:
        raise UserError(
            f"{trained.path}: the speculator was trained for another base (fingerprint {expected[:12]}) than base.path, "
            f"whose fingerprint is {found[:12]}; allowed: its own base, or base.allow_other = true"
        )


def locate_base(config: Config, trained: Trained | None) -> tuple[Base, Path, DecoderConfig]:
    """The base's keys, folder and shape: as configured, or where `base.path` is empty, as in the run that wrote the checkpoint.

    Raises:
        UserError: no base is named, or it is not the one that the checkpoint's was made from.
    """
    base = config.base
    if not base.path and trained and trained.keys:
        base = trained.section("base", Base)
    if not base.path:
        where = f"{trained.path} does not hold its base" if trained else "there is nothing to take it from"
        raise UserError(f"base.path is empty, and {where}; allowed: a folder in Hugging Face layout, or spectitan:NAME")
    path = resolve_base_path(base.path)
    base_config = choose_config(base.arch, base.variant, path)
    if _holds_base(trained):
        _check_base_config(trained, base_config, path)
    return base, path, base_config


def load_base(config: Config, trained: Trained | None, dtype: torch.dtype) -> tuple[nn.Module, Path]:
    """The base, frozen, on the CPU, and the folder of its config.json and tokenizer.

    A base that the run itself trained comes from the checkpoint, any other from `base.path`.

    Raises:
        UserError: no base is named, or its files cannot be read.
    """
    base, path, _ = locate_base(config, trained)
    if _holds_base(trained):
        model = get_model(base.arch, base.variant, path, init="random", dtype=dtype)
        _fill(model, read_tensors(trained.path, "base."), trained.path)
    else:
        model = get_model(base.arch, base.variant, path, dtype=dtype)
    return model.requires_grad_(False).eval(), path


def _holds_base(trained: Trained | None) -> bool:
    """Whether it is a checkpoint of a run that trained its base."""
    return bool(trained and trained.keys and not trained.keys["base.freeze"])


def _check_base_config(trained: Trained, base_config: DecoderConfig, path: Path) -> None:
    """A base from a checkpoint computes as in the run that trained it: what base.path says beyond shapes must be the same."""
    for name, found in base_config.identity().items():
        saved = trained.keys.get(f"base.config.{name}", found)  # a checkpoint may be older than a key
        if json.dumps(saved) != json.dumps(found):
            raise UserError(
                f"{path}: {name} = {json.dumps(found)}; the base in {trained.path} was trained with {json.dumps(saved)}; "
                "allowed: the base.path of that run, or none"
            )


def speculator_shape(config: Config, base_config: DecoderConfig) -> Speculator:
    """What a run of these keys trains, without weights. `config` takes the keys of the speculator at speculator.path.

    Raises:
        UserError: as the run would.
    """
    make = new_speculator
    if config.speculator.path:
        trained, make = find_trained(config), build_speculator
        config.adopt_speculator(*family_keys(trained), source=str(trained.path))
    with torch.device("meta"):
        return make(config.speculator.type, config.speculator, base_config, config.objective)


def load_speculator_for(config: Config, trained: Trained | None, base: nn.Module) -> Speculator | None:
    """The trained speculator, frozen, in the base's dtype and on its device; None if there is none to draft with.

    Raises:
        UserError: files that cannot be read, or a speculator of another base.
    """
    if config.speculator.type == "none" or trained is None:
        return None
    speculator = read_speculator(trained, base.config, None if trained.keys else config.objective)
    if speculator is None:
        return None
    if trained.keys.get("base.freeze", True):  # else the base comes from the same checkpoint
        check_base(config, trained, fingerprint(base))
    weight = base.readout.head.weight
    return speculator.to(weight.device, weight.dtype).requires_grad_(False).eval()


def read_speculator(trained: Trained, base_config: DecoderConfig, objective: Objective | None = None, config=None) -> Speculator | None:
    """The speculator of a folder or checkpoint, in float32 on the CPU; None if the run trained a base alone.

    Args:
        objective: what it is to be measured or trained with; None: that of the checkpoint's run, the default for a folder.
        config: the family's keys, if they differ from its own in what concerns training alone.
    """
    if not trained.keys:
        return load_speculator(trained.path, base_config, objective or Objective(), config)
    type = trained.keys["speculator.type"]
    if type == "none":
        return None
    config = config or trained.section("speculator", SPECULATORS[type][0])
    speculator = build_speculator(type, config, base_config, objective or trained.section("objective", Objective))
    _fill(speculator, read_tensors(trained.path, "speculator."), trained.path)
    speculator.check()
    return speculator


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies a checkpoint's tensors into a module's parameters and persistent buffers, all of them and no others."""
    parameters = module_tensors(module)
    for name in sorted(parameters.keys() | tensors.keys()):
        expected, found = (list(group[name].shape) if name in group else "no such tensor" for group in (parameters, tensors))
        if expected != found:
            raise UserError(f"{path}: {name}: {found} in the checkpoint, {expected} expected; was it trained for another base?")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
