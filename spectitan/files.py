"""Files and folders that are whole or not there, also after a crash; places on other file systems, by URL."""

import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from spectitan.errors import UserError


def to_path(text: str | os.PathLike) -> Path:
    """A path; of a URL (s3://bucket/run) an object of universal_pathlib with the same methods, which is no `Path`.

    Raises:
        UserError: a package for such URLs is missing, or nobody knows them.
    """
    if "://" not in str(text) or isinstance(text, Path):
        return Path(text)
    try:
        from upath import UPath

        path = UPath(text)
        path.exists()
    except ImportError as error:
        raise UserError(f'{text}: {error}; URLs need pip install "spectitan[remote]", and a package of fsspec for their kind') from None
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None
    return path


def is_remote(path: Path) -> bool:
    """Whether it is an object of `to_path` for a URL: nothing can be renamed there at once, or synced to a disk."""
    return not isinstance(path, Path)


def remove_folder(path: Path) -> None:
    """With all that is in it, as far as it can be removed; nothing happens where there is none."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes bytes, of a text UTF-8, under a temporary name and renames: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: naming `path`; what was there is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def replace_folder(temporary: Path, path: Path, stale: Collection[str]) -> None:
    """Moves a folder's files to `path`. A new `path` appears at once; in one that exists each file is replaced at once, config.json after
    all else is done: a new one stands for a folder that is whole.

    Args:
        temporary: on the same file system.
        stale: patterns of files that are removed if they are not among the new ones; all others stay.
    """
    if not path.exists():
        temporary.rename(path)
        return
    new, last = {file.name for file in temporary.iterdir()}, "config.json"
    for name in sorted(new - {last}):
        (temporary / name).replace(path / name)
    for old in {file for pattern in stale for file in path.glob(pattern)}:
        if old.name not in new:
            old.unlink()
    (temporary / last).replace(path / last)


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} where there is none. UserError if it is something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's entries, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
