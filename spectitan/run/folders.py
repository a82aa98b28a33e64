"""Which folders a run reads and writes, and what it must not write over."""

from pathlib import Path

from spectitan.config.tables import Config
from spectitan.exporting import base_folder, check_keeps_base, export_folder
from spectitan.states.sources import hidden_states_folder
from spectitan.training.checkpoint import checkpoints_folder


def folders_to_write(config: Config) -> dict[str, str]:
    """Key -> folder, of every folder that a run is to write; where it moves its old folder aside, without what lies in that."""
    run = config.job.dump_folder
    folders = {}
    if "://" not in config.checkpoint.folder:
        folders["checkpoint.folder"] = str(checkpoints_folder(config.checkpoint, run))
    if config.metrics.loggers and config.metrics.dir:
        folders["metrics.dir"] = config.metrics.dir
    if config.states.source == "hybrid" and config.states.on_generate == "cache":
        folders["states.hidden_states_path"] = str(hidden_states_folder(config.states, run))
    if config.export.format != "none":
        folders["export.path"] = str(export_folder(config))
    if config.checkpoint.resume == "never":
        folders = {key: folder for key, folder in folders.items() if not Path(folder).resolve().is_relative_to(Path(run).resolve())}
    return {"job.dump_folder": run} | folders


def paths_to_read(config: Config) -> dict[str, str]:
    """Key -> path, or "", of what a run reads at its start and mostly again at its end."""
    return {
        "checkpoint.load_path": config.checkpoint.load_path,
        "speculator.path": config.speculator.path,
        "base.path": config.base.path,
        "data.path": config.data.path,
        "data.val_path": config.data.val_path,
        "data.drop_overlap": config.data.drop_overlap,
        "eval.prompts": config.eval.prompts,
        "states.hidden_states_path": existing_states(config),
    }


def existing_states(config: Config) -> str:
    """Where hidden states are, that a run reads or adds to; "" if there are none yet, or none are read."""
    folder = hidden_states_folder(config.states, config.job.dump_folder)
    return str(folder) if config.states.source != "online" and folder.exists() else ""


def check_export(config: Config, base_path: Path) -> None:
    """Raises UserError if the export at the end of the run would replace the files of its base."""
    target, format = export_folder(config), config.export.format
    if format != "none":
        check_keeps_base(target, base_path)
    if format == "auto" and not config.base.freeze and config.speculator.type != "none":
        check_keeps_base(base_folder(target), base_path)
