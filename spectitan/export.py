"""Writes what was trained as a folder for servers (a speculator) or for Hugging Face transformers (a base).

    python -m spectitan.export --job.config_file train_configs/quickstart.toml
    python -m spectitan.export --base.path BASE --speculator.path CHECKPOINT_OR_FOLDER --export.path OUT
"""

import sys
from pathlib import Path

import torch

from spectitan import program
from spectitan.config.manager import Config
from spectitan.errors import UserError
from spectitan.models.weights import save_hf
from spectitan.signals import StopSignal
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.speculators.serving import default_format, name_of_base, serve_notes, write_folder
from spectitan.trained import find_trained, load_base, locate_base, read_speculator


def export(config: Config, stop: StopSignal) -> None:
    """The program's work."""
    trained = find_trained(config)
    if trained is None:
        raise UserError(f"job.dump_folder = {config.job.dump_folder!r} has no checkpoint and speculator.path is empty: nothing to export")
    target = Path(config.export.path or Path(config.job.dump_folder) / "export")
    speculator_type = trained.keys.get("speculator.type", config.speculator.type)
    format = config.export.format
    if format == "auto":
        format = "hf" if speculator_type == "none" else default_format(speculator_type)
    if format == "none":
        raise UserError('export.format = "none": nothing to export; allowed: auto, mlp_speculator, hf')
    if format == "hf":
        if trained.keys.get("base.freeze", True):
            raise UserError(f'export.format = "hf" writes a trained base, and {trained.path} holds none; allowed: auto, mlp_speculator')
        base, base_path = load_base(config, torch.bfloat16)
        save_hf(base, target, torch.bfloat16, tokenizer_files_from=base_path)
        print(f"{target}: the base of {trained.path}, in Hugging Face layout")
        return
    _, base_path, base_config = locate_base(config, trained)
    speculator = read_speculator(trained, base_config)
    if speculator is None:
        raise UserError(f'export.format = "{format}": {trained.path} holds a base and no speculator; allowed: auto, hf')
    write_folder(speculator, target, format, base_path, config.export.base_name)
    print(f"{target}: the speculator of {trained.path}, as {format}\n")
    print("\n".join(serve_notes(format, str(target), name_of_base(base_path, config.export.base_name), speculator.steps)))


def main(argv: list[str] | None = None) -> int:
    """The program: returns the exit status."""
    return program.run("export", export, argv, SPECULATOR_CONFIGS)


if __name__ == "__main__":
    sys.exit(main())
