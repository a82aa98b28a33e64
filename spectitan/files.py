"""Files that are whole or not there, also after a crash."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: str) -> None:
    """Writes UTF-8 under a temporary name and renames: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: naming `path`; what was there is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's entries, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
