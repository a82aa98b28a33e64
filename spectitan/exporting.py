"""A trained speculator as a folder for servers, a trained base for transformers. Shared by export and the end of training."""

from pathlib import Path

import torch

from spectitan.config.manager import Config
from spectitan.errors import UserError
from spectitan.models.weights import fingerprint, save_hf
from spectitan.speculators.serve_notes import serve_notes
from spectitan.speculators.serving import choose_format, name_of_base, write_folder
from spectitan.trained import Trained, base_fingerprint, check_base, find_trained, load_base, locate_base, read_speculator


def export_run(config: Config) -> None:
    """Writes what `speculator.path`, or the run of the config file, has trained to `export.path`, and prints how to serve it.

    Raises:
        UserError: nothing trained, or a format that cannot hold it.
    """
    trained = find_trained(config)
    if trained is None:
        raise UserError(f"job.dump_folder = {config.job.dump_folder!r} has no checkpoint and speculator.path is empty: nothing to export")
    target = Path(config.export.path or Path(config.job.dump_folder) / "export")
    format, has_speculator = config.export.format, trained.keys.get("speculator.type") != "none"
    if format == "none":
        raise UserError('export.format = "none": nothing to export; allowed: auto, mlp_speculator, arctic, verl, hf')
    if format == "hf" or format == "auto" and not has_speculator:
        if trained.keys.get("base.freeze", True):
            raise UserError(
                f'export.format = "hf" writes a trained base, and {trained.path} holds none; allowed: auto, mlp_speculator, arctic, verl'
            )
        base, base_path = load_base(config, torch.bfloat16)
        save_hf(base, target, torch.bfloat16, tokenizer_files_from=base_path)
        print(f"{target}: the base of {trained.path}, in Hugging Face layout")
        return
    _, base_path, base_config = locate_base(config, trained)
    speculator = read_speculator(trained, base_config)
    if speculator is None:
        raise UserError(f'export.format = "{format}": {trained.path} holds a base and no speculator; allowed: auto, hf')
    format = choose_format(speculator, format)
    write_folder(speculator, target, format, base_path, config.export.base_name, _fingerprint(config, trained, base_path))
    print(f"{target}: the speculator of {trained.path}, as {format}\n")
    print("\n".join(serve_notes(format, str(target), name_of_base(base_path, config.export.base_name), speculator.steps)))
    if not trained.keys.get("base.freeze", True):
        print("- The base was trained with it: --export.format hf writes that one, to be served in place of base.path.")


def _fingerprint(config: Config, trained: Trained, base_path: Path) -> str:
    """Of the base that the speculator was trained for, which has to be the base of the folder."""
    recorded = base_fingerprint(config, trained)
    if config.base.allow_other or not trained.keys.get("base.freeze", True):
        return recorded
    found = fingerprint(base_path)
    check_base(config, trained, found)
    return recorded or found
