"""The folder of a run: checked before any work, begun when all that can fail has been done."""

import logging
import os
from pathlib import Path

from spectitan.distributed import utils
from spectitan.errors import UserError
from spectitan.files import write_whole
from spectitan.training.checkpoint import move_aside

logger = logging.getLogger(__name__)


def check_can_be_written(key: str, folder: str) -> None:
    """Raises UserError, naming the configuration key, unless the folder is one, or could be made."""
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "it may not be written" if existing.is_dir() else "it is no folder"
        raise UserError(f"{key} = {folder!r}: {existing}: {problem}")


def check_can_be_moved(folder: Path, sources: dict[str, str]) -> None:
    """What must stay where it is may not lie in the folder that checkpoint.resume = never moves aside.

    Args:
        sources: key -> path, or "", of what the run starts from.
    """
    paths = {"the working folder": Path.cwd()} | {key: Path(path).expanduser() for key, path in sources.items() if path}
    for what, path in paths.items():
        if path.resolve().is_relative_to(folder.resolve()):
            given = f"job.dump_folder = {str(folder)!r} holds {what}"
            raise UserError(f"{given}: checkpoint.resume = never cannot move that; use another folder")


def begin_run_folder(folder: Path, config_toml: str, resume: str) -> None:
    """Moves the folder of an earlier run aside, if checkpoint.resume is never, and writes config.toml. All ranks call it together."""
    moved = move_aside(folder) if resume == "never" else None
    if moved:
        logger.info("checkpoint.resume = never: the folder of an earlier run is now %s", moved)
    utils.on_main(lambda: _write(folder, config_toml))


def _write(folder: Path, config_toml: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.toml", config_toml)  # the file may be the one that this run was started with
