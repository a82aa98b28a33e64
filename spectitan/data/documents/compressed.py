"""Files that may be compressed, read as they are unpacked: memory does not grow with the file."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spectitan.data.documents.damage import damage_of
from spectitan.errors import UserError

SUFFIXES = (".gz", ".zst")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such files begin


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file, whose position tells how far reading has come, and its content, unpacked if its name or first bytes say so.

    Raises:
        UserError: Zstandard, and no package for it.
        ValueError: the file is damaged, perhaps cut short.
    """
    with path.open("rb") as file:
        begins = file.peek(4)[:4]
        if path.suffix == ".gz" or begins.startswith(_GZIP):
            with damage_of("gzip", EOFError, zlib.error), gzip.GzipFile(fileobj=file) as content:
                if not begins:
                    raise EOFError("it is empty")
                yield file, content
        elif path.suffix == ".zst" or begins == _ZSTD:
            zstd = _zstd(path)
            with damage_of("Zstandard", EOFError, zstd.ZstdError), zstd.open(file) as content:
                yield file, content
        else:
            yield file, file


def _zstd(path: Path):
    try:
        from compression import zstd  # Python's own, since 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(f'{path}: reading it needs the package backports.zstd: pip install "spectitan[zstd]"') from None
    return zstd
