"""The files of a checkpoint folder: names, sizes, hashes, and whether a folder is whole."""

import hashlib
import json
import re
from pathlib import Path

from spectitan import heartbeat
from spectitan.errors import UserError
from spectitan.files import is_remote, sync

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_HASH_BLOCK = 1 << 22
MANIFEST = "manifest.json"  # the file that says that all others are there


def step_of(path: Path) -> int:
    """The step in the name of a step folder."""
    return int(_STEP_FOLDER.fullmatch(path.name)[1])


def step_folders(folder: Path) -> list[Path]:
    """Step folders by ascending step."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)), key=step_of)


def find_problem(path: Path, share: int = 0, shares: int = 1, hashes: bool = True) -> str | None:
    """What is wrong with this share of a checkpoint's files, or None."""
    try:
        files = read_json(path / MANIFEST)["files"]
        for needed in (".metadata", "state.json"):
            if needed not in files:
                return f"manifest.json lacks {needed}"
        for name in sorted(files)[share::shares]:
            file = path / name
            if Path(name).name != name or not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != files[name]["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {files[name]['bytes']}"
            if hashes and describe(file) != files[name]:
                return f"{name} has changed since it was written (hash)"
    except (UserError, OSError, KeyError, TypeError) as error:
        return str(error) if isinstance(error, (UserError, OSError)) else "manifest.json is not a manifest"
    return None


def describe(path: Path) -> dict:
    """A file's entry in the manifest."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            size += len(block)
            heartbeat.beat()
    return {"bytes": size, "blake2b": digest.hexdigest()}


def read_json(path: Path) -> dict:
    """Raises UserError, naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def write_json(path: Path, value: dict) -> None:
    """Returns when it is on the disk."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    if not is_remote(path):
        sync(path)
