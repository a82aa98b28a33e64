"""A folder that is made once, whole or not at all, by whichever process wants it first."""

import fcntl
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

Opened = TypeVar("Opened")


def open_or_make(
    folder: Path, lock: Path, task: str, open_folder: Callable[[Path], Opened | None], write: Callable[[Path], None]
) -> Opened:
    """Opens the folder; if it is not there, one process writes it while others that want the same wait.

    Args:
        lock: file whose lock the writer holds.
        task: what writing does, for those that wait: "data NAME: ..., which another process does".
        open_folder: None: it is not there, or broken, and is made anew.
        write: fills an empty folder, and has it on the disk when it returns.

    Raises:
        OSError: the disk is full; the error names the folder that `folder` lies in.
    """
    opened = open_folder(folder)
    if opened is not None:
        return opened
    with _locked(lock, task):
        opened = open_folder(folder)  # another process may have written it while this one waited
        if opened is not None:
            return opened
        for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):  # of a process that was killed: it holds the lock no more
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.tmp")
        temporary.mkdir()
        try:
            write(temporary)
            if folder.exists():  # broken
                shutil.rmtree(folder)
            temporary.rename(folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which
                raise OSError(error.errno, error.strerror, str(folder.parent)) from None
            raise
    opened = open_folder(folder)
    assert opened is not None, f"{folder} was just written"
    return opened


@contextmanager
def _locked(path: Path, task: str) -> Iterator[None]:
    """One process at a time, on one machine and over file systems that pass locks on. Ends with the process, however that ends.

    Where a file system has no locks, processes may do the same work twice; renaming keeps the result whole.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another process that does it", task)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s)", path, error.strerror)
        yield
