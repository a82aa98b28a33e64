"""The folder of a run: checked and locked before any work, begun when all that can fail has been done."""

import fcntl
import logging
import os
import time
from pathlib import Path
from typing import TextIO

from spectitan.distributed import utils
from spectitan.errors import UserError
from spectitan.files import write_whole

logger = logging.getLogger(__name__)

_SECONDS_TO_APPEAR = 90.0  # a client of NFS may remember for a minute that there was no such folder


def check_can_be_written(key: str, folder: str) -> None:
    """Raises UserError, naming the configuration key, unless the folder is one, or could be made."""
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "it may not be written" if existing.is_dir() else "it is no folder"
        raise UserError(f"{key} = {folder!r}: {existing}: {problem}")


def check_can_be_moved(folder: Path, sources: dict[str, str]) -> None:
    """What must stay where it is may not lie in the folder that checkpoint.resume = never moves aside.

    Args:
        sources: key -> path, or "", of what the run reads.
    """
    paths = {"the working folder": Path.cwd()} | {key: Path(path).expanduser() for key, path in sources.items() if path}
    for what, path in paths.items():
        if path.resolve().is_relative_to(folder.resolve()):
            given = f"job.dump_folder = {str(folder)!r} holds {what}"
            raise UserError(f"{given}: checkpoint.resume = never cannot move that; use another folder")


class RunFolder:
    """The folder of a run, and that of its checkpoints if it is another one, locked against a second trainer. All ranks call every
    method together; rank 0 holds the locks.

    A lock is on a file in the folder, and the system releases it when the process ends, however it does. It is a record lock,
    which loader workers do not inherit: they may outlive a killed trainer for a moment.

    Args:
        path: job.dump_folder.
        checkpoints: checkpoint.folder, or ""; at a URL, where there are no locks, nothing is kept from a second trainer.
    """

    def __init__(self, path: Path, checkpoints: str = ""):
        self.path, self._folders = path, {"job.dump_folder": path}
        if checkpoints and "://" not in checkpoints:
            self._folders["checkpoint.folder"] = Path(checkpoints)
        self._locked: list[TextIO] = []

    def lock(self) -> None:
        """Locks the folders, those that are there yet.

        Raises:
            UserError: another process is training in one of them.
        """
        utils.on_main(self._lock)

    def _lock(self) -> None:
        for key, folder in self._folders.items():
            if folder.is_dir():
                self._lock_folder(key, folder)

    def _lock_folder(self, key: str, folder: Path) -> None:
        file = open(folder / ".lock", "a")
        self._locked.append(file)  # until the end: closing any file object would release the lock of all of them
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{key} = {str(folder)!r}: another process is training in it: let it end, or use another folder") from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)

    def begin(self, config_toml: str, resume: str) -> None:
        """Moves the folder of an earlier run aside, if checkpoint.resume is never; makes the folders, locks them, writes config.toml.

        Raises:
            UserError: another process is training in one of them, or a rank does not see them.
        """
        moved = move_aside(self.path) if resume == "never" else None
        if moved:
            logger.info("checkpoint.resume = never: the folder of an earlier run is now %s", moved)
        utils.on_main(lambda: self._begin(config_toml))
        utils.together(self._check_is_shared)

    def _begin(self, config_toml: str) -> None:
        for folder in self._folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        write_whole(self.path / "config.toml", config_toml)  # the file may be the one that this run was started with

    def _check_is_shared(self) -> None:
        """Every rank writes its part of a checkpoint: a folder of rank 0's machine alone would be found out at the first one."""
        deadline = time.monotonic() + _SECONDS_TO_APPEAR
        for key, folder in self._folders.items():
            while not folder.is_dir():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{key} = {str(folder)!r}: process {utils.rank()} does not see the folder that process 0 has made; allowed: one that "
                        "all machines share"
                    )
                time.sleep(0.1)

    def close(self) -> None:
        """Releases the locks."""
        for file in self._locked:
            file.close()


def move_aside(path: str | os.PathLike) -> Path | None:
    """Renames a file or folder to the first free `<name>.<number>`, and returns that; None if there is nothing to move."""
    path = Path(path)

    def rename() -> Path | None:
        if not path.exists():
            return None
        number = 1
        while (target := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(target)
        return target

    return utils.on_main(rename)
