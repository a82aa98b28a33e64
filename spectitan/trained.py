"""What was trained, as evaluate, export and generate find it: an exported folder, or a checkpoint and the run's keys in it."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectitan.config.manager import Config
from spectitan.config.sections import Base, Objective
from spectitan.errors import UserError
from spectitan.models.llama import LlamaConfig
from spectitan.models.registry import choose_config, get_model
from spectitan.models.weights import resolve_base_path
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import SPECULATORS, build_speculator
from spectitan.speculators.serving import load_speculator
from spectitan.training.checkpoint import find_checkpoint, read_state, read_tensors


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
    """What `speculator.path` names: an exported folder, one checkpoint, or a dump_folder. Without it, the run of the config file.

    Returns:
        None if neither is given, or if that run has saved nothing yet.

    Raises:
        UserError: nothing at `speculator.path`, or no valid checkpoint.
    """
    if config.speculator.path:
        path = Path(config.speculator.path).expanduser()
        if not path.is_dir():
            raise UserError(f"speculator.path = {config.speculator.path!r}: no such folder")
        if (path / "config.json").is_file():
            return Trained(path, {})
    elif config.job.config_file and (Path(config.job.dump_folder) / "checkpoints").is_dir():
        path = Path(config.job.dump_folder)
    else:
        return None
    checkpoint = find_checkpoint(path)
    state = read_state(checkpoint)
    return Trained(checkpoint, state["identity"], state["step"])


def locate_base(config: Config, trained: Trained | None) -> tuple[Base, Path, LlamaConfig]:
    """The base's keys, folder and shape: as configured, or where `base.path` is empty, as in the run that wrote the checkpoint."""
    base = config.base
    if not base.path and trained and trained.keys:
        base = trained.section("base", Base)
    if not base.path:
        where = f"{trained.path} does not hold its base" if trained else "there is nothing to take it from"
        raise UserError(f"base.path is empty, and {where}; allowed: a folder in Hugging Face layout, or spectitan:NAME")
    path = resolve_base_path(base.path)
    return base, path, choose_config(base.arch, base.variant, path)


def load_base(config: Config, dtype: torch.dtype) -> tuple[nn.Module, Path]:
    """The base, frozen, on the CPU, and the folder of its config.json and tokenizer.

    A base that the run itself trained comes from the checkpoint, any other from `base.path`.

    Raises:
        UserError: no base is named, or its files cannot be read.
    """
    trained = find_trained(config)
    base, path, _ = locate_base(config, trained)
    if trained and trained.keys and not trained.keys["base.freeze"]:
        model = get_model(base.arch, base.variant, path, init="random", dtype=dtype)
        _fill(model, read_tensors(trained.path, "base."), trained.path)
    else:
        model = get_model(base.arch, base.variant, path, dtype=dtype)
    return model.requires_grad_(False).eval(), path


def load_speculator_for(config: Config, base: nn.Module) -> Speculator | None:
    """The trained speculator, frozen, in the base's dtype and on its device; None if there is none to draft with.

    Raises:
        UserError: files that cannot be read, or a speculator of another base.
    """
    trained = find_trained(config)
    if config.speculator.type == "none" or trained is None:
        return None
    speculator = read_speculator(trained, base.config, config.objective)
    if speculator is None:
        return None
    weight = base.readout.head.weight
    return speculator.to(weight.device, weight.dtype).requires_grad_(False).eval()


def read_speculator(trained: Trained, base_config: LlamaConfig, objective: Objective = Objective()) -> Speculator | None:
    """The speculator of a folder or checkpoint, in float32 on the CPU; None if the run trained a base alone.

    `objective` is a folder's, which does not say what it was trained with; a checkpoint does.
    """
    if not trained.keys:
        return load_speculator(trained.path, base_config, objective)
    type = trained.keys["speculator.type"]
    if type == "none":
        return None
    config, objective = trained.section("speculator", SPECULATORS[type][0]), trained.section("objective", Objective)
    speculator = build_speculator(type, config, base_config, objective)
    _fill(speculator, read_tensors(trained.path, "speculator."), trained.path)
    return speculator


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies a checkpoint's tensors into a module's parameters, all of them and no others."""
    parameters = dict(module.named_parameters())
    for name in sorted(parameters.keys() | tensors.keys()):
        expected, found = (list(group[name].shape) if name in group else "no such tensor" for group in (parameters, tensors))
        if expected != found:
            raise UserError(f"{path}: {name}: {found} in the checkpoint, {expected} expected; was it trained for another base?")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
