"""The meta.json of a folder in the cache: what is in its files, and whether they are as they were written."""

import json
import logging
import zlib
from pathlib import Path

from spectitan import heartbeat
from spectitan.files import sync

_BLOCK_BYTES = 2**22
_SHOWN_BYTES = 2**30  # of more than that it is said that they are read
_known: dict[tuple, int] = {}  # checksums made by this process, by all that the file system says of a file

logger = logging.getLogger(__name__)


class BrokenFolder(ValueError):
    """A folder that is not as it was written."""


def write_meta(folder: Path, meta: dict) -> None:
    """Writes meta.json: `meta`, and the lengths and checksums of all files; everything has reached the disk when this returns."""
    paths = sorted(folder.iterdir())
    content = meta | {"files": {path.name: path.stat().st_size for path in paths}}
    content |= {"checksums": {path.name: _checksum(path) for path in paths}}
    (folder / "meta.json").write_text(json.dumps(content | {"checksum": _checksum_of(content)}, indent=1))
    for path in [*folder.iterdir(), folder]:
        sync(path)


def read_meta(folder: Path, check_content: bool = False) -> dict:
    """What `write_meta` was given, and "files": {name: bytes}.

    Args:
        check_content: reads all of the files, each version of them once in a process; else only their lengths are looked at.

    Raises:
        BrokenFolder: a file is missing or changed.
    """
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        checksum = meta.pop("checksum", None)
        for name, size in meta["files"].items():
            if (folder / name).stat().st_size != size:
                raise BrokenFolder(f"{folder / name}: not as long as it was")
        if check_content:
            if checksum != _checksum_of(meta):  # an older version wrote none
                raise BrokenFolder(f"{folder / 'meta.json'}: not as it was written")
            _check(folder, meta["checksums"], sum(meta["files"].values()))
    except BrokenFolder:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFolder(f"{folder}: {error}") from None
    return meta


def _check(folder: Path, checksums: dict[str, int], size: int) -> None:
    if size > _SHOWN_BYTES:
        logger.info("%s: reading %.1f GB, which may be damaged (data.verify)", folder, size / 1e9)
    for name, checksum in checksums.items():
        if _checksum(folder / name) != checksum:
            raise BrokenFolder(f"{folder / name}: not as it was written")


def _checksum(path: Path) -> int:
    version = _version(path)
    if version not in _known:
        checksum = 0
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                checksum = zlib.crc32(block, checksum)
                heartbeat.beat()
        _known[version] = checksum
    return _known[version]


def _checksum_of(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _version(path: Path) -> tuple:
    """Changes whenever a file is written."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
