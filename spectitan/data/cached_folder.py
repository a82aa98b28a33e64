"""A folder that is made once, whole or not at all, by whichever process wants it first."""

import fcntl
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from spectitan import heartbeat

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_TRIES = 0.1

Opened = TypeVar("Opened")


def open_or_make(
    lock: Path,
    task: str,
    find: Callable[[], Path | None],
    open_folder: Callable[[Path], Opened | None],
    write: Callable[[Path], Path],
) -> Opened:
    """Opens the folder; if it is not there, one process writes it while others that want the same wait.

    Args:
        lock: file whose lock the writer holds, in the folder where the new one will lie.
        task: what writing does, for those that wait: "data NAME: ..., which another process does".
        find: where the folder should be; None: it is nowhere.
        open_folder: None: it is not there, or broken, and is made anew.
        write: fills an empty folder, has it on the disk when it returns, and says where it belongs.

    Raises:
        OSError: the disk is full; the error names the folder that `lock` lies in.
    """
    opened = _found(find, open_folder)
    if opened is not None:
        return opened
    with _locked(lock, task) as held:
        opened = _found(find, open_folder)  # another process may have written it while this one waited
        if opened is not None:
            return opened
        if held:
            _remove_leftovers(lock)
        temporary = lock.with_name(f"{lock.stem}.{secrets.token_hex(8)}.tmp")
        temporary.mkdir()
        try:
            folder = write(temporary)
            if folder.exists() and not (held or open_folder(folder) is None):
                shutil.rmtree(temporary)  # without locks, another process has written the same
            else:
                shutil.rmtree(folder, ignore_errors=True)  # broken
                temporary.rename(folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which
                problem = f"{error.strerror} ({task}; data.cache_dir names the folder)"
                raise OSError(error.errno, problem, str(lock.parent)) from None
            raise
    opened = open_folder(folder)
    assert opened is not None, f"{folder} was just written"
    return opened


def _found(find: Callable[[], Path | None], open_folder: Callable[[Path], Opened | None]) -> Opened | None:
    folder = find()
    return None if folder is None else open_folder(folder)


def _remove_leftovers(lock: Path) -> None:
    """What processes that were killed have begun in this folder: they hold their locks no more."""
    for leftover in lock.parent.glob("*.*.tmp"):
        of_leftover = lock.with_name(f"{leftover.name.partition('.')[0]}.lock")
        if of_leftover == lock or _is_free(of_leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            return _try_lock(file)
        except OSError:
            return False


def _try_lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(path: Path, task: str) -> Iterator[bool]:
    """One process at a time, on one machine and over file systems that pass locks on. Ends with the process, however that ends.

    Where a file system has no locks, which is said and given as False, processes may do the same work twice; renaming keeps the
    result whole.
    """
    with path.open("w") as file:
        held = True
        try:
            if not _try_lock(file):
                logger.info("%s: waiting for another process that does it", task)
                while not _try_lock(file):
                    heartbeat.beat()  # the other one may take long
                    time.sleep(_SECONDS_BETWEEN_TRIES)
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s)", path, error.strerror)
            held = False
        yield held
