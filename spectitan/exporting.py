"""A trained speculator as a folder for servers, a trained base for transformers. Shared by export and the end of training."""

from pathlib import Path

import torch

from spectitan.config.tables import Config
from spectitan.errors import UserError
from spectitan.models.decoder import DecoderConfig
from spectitan.models.weights import fingerprint, save_hf
from spectitan.speculators.serve_notes import serve_notes
from spectitan.speculators.serving import choose_format, name_of_base, write_folder
from spectitan.trained import Trained, base_fingerprint, check_base, load_base, locate_base, read_speculator


def export_folder(config: Config) -> Path:
    return Path(config.export.path or Path(config.job.dump_folder) / "export")


def base_folder(target: Path) -> Path:
    """Where the base goes that was trained together with the speculator at `target`."""
    return target.with_name(f"{target.name}_base")


def check_keeps_base(target: Path, base_path: Path) -> None:
    """Raises UserError if what is written to `target` would replace the files of the base."""
    if target.resolve() == base_path.resolve():
        raise UserError(f"export.path: {target} is the base's own folder, whose files would be replaced; allowed: another folder")


def export_run(config: Config, trained: Trained | None) -> None:
    """Writes what was trained to `export.path`, and prints how to serve it.

    What was trained together is exported together: `auto` writes the base beside its speculator, to `<export.path>_base`.

    Raises:
        UserError: nothing trained, or a format that cannot hold it.
    """
    if trained is None:
        raise UserError(f"job.dump_folder = {config.job.dump_folder!r} has no checkpoint and speculator.path is empty: nothing to export")
    target, format = export_folder(config), config.export.format
    has_speculator, has_base = trained.keys.get("speculator.type") != "none", not trained.keys.get("base.freeze", True)
    if format == "none":
        raise UserError('export.format = "none": nothing to export; allowed: auto, mlp_speculator, arctic, verl, speculators, hf')
    if format == "hf" or format == "auto" and not has_speculator:
        if not has_base:
            raise UserError(
                f'export.format = "hf" writes a trained base, and {trained.path} holds none; allowed: auto, mlp_speculator, arctic, verl, speculators'
            )
        _export_base(config, trained, target)
        return
    _, base_path, base_config = locate_base(config, trained)
    check_keeps_base(target, base_path)
    speculator = read_speculator(trained, base_config)
    if speculator is None:
        raise UserError(f'export.format = "{format}": {trained.path} holds a base and no speculator; allowed: auto, hf')
    base_target, written_base = base_folder(target), has_base and format == "auto"
    if written_base:
        _export_base(config, trained, base_target)
    format, base_name = choose_format(speculator, format), config.export.base_name
    if has_base:  # not the one at base.path any more
        base_name = base_name or base_target.name
    readout = load_base(config, trained, torch.float32)[0].readout if speculator.borrowed else None
    write_folder(speculator, target, format, base_path, base_name, _fingerprint(config, trained, base_path, base_config), readout)
    print(f"{target}: the speculator of {trained.path}, as {format}\n")
    served = name_of_base(base_path, base_name)  # as in the folder's README; on the screen, what a server here finds
    if written_base and not config.export.base_name:
        served = str(base_target)
    elif not base_name and "/" not in served:
        served = str(base_path)
    print("\n".join(serve_notes(format, str(target), served, speculator.steps)))
    if has_base and not written_base:
        print("- The base was trained with it: --export.format hf writes that one, to be served in place of base.path.")


def _export_base(config: Config, trained: Trained, target: Path) -> None:
    check_keeps_base(target, locate_base(config, trained)[1])
    base, base_path = load_base(config, trained, torch.bfloat16)
    save_hf(base, target, torch.bfloat16, tokenizer_files_from=base_path)
    print(f"{target}: the base of {trained.path}, in Hugging Face layout")


def _fingerprint(config: Config, trained: Trained, base_path: Path, base_config: DecoderConfig) -> str:
    """Of the base that the speculator was trained for, which has to be the base of the folder."""
    recorded = base_fingerprint(config, trained)
    if config.base.allow_other or not trained.keys.get("base.freeze", True):
        return recorded
    found = fingerprint(base_path, base_config)
    check_base(config, trained, found)
    return recorded or found
