"""The files of datasets: trees of files, single files, and Python's standard library."""

import difflib
import hashlib
import itertools
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from spectitan.config.sections import Data
from spectitan.data.documents.formats import readable_suffixes
from spectitan.errors import UserError

STDLIB = "python:stdlib"
STDLIB_WITH_TESTS = "python:stdlib+tests"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TESTS = frozenset({"test", "tests"})
_EXCLUDED = {STDLIB: (_NOT_STDLIB | _TESTS, (".py",)), STDLIB_WITH_TESTS: (_NOT_STDLIB, (".py",))}  # folders, and suffixes to read


@dataclass(frozen=True)
class Dataset:
    """Files that are one dataset.

    Attributes:
        name: as in data.datasets; data.path itself where that is empty.
        root: the folder that held-out paths are relative to.
        files: POSIX paths below root, sorted.
    """

    name: str
    root: Path
    files: tuple[str, ...]

    def num_bytes(self) -> int:
        return sum((self.root / file).stat().st_size for file in self.files)

    def stat_hash(self) -> str:
        """Hash of what the file system says of every file: changes whenever a file is written."""
        stats = ((file, (self.root / file).stat()) for file in self.files)
        identity = [(str(self.root), file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for file, stat in stats]
        return hashlib.blake2b(repr(identity).encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def newest_change(self) -> float:
        """When a file was last changed, in seconds since the epoch."""
        return max((self.root / file).stat().st_ctime for file in self.files)

    def content_hash(self) -> str:
        """One sequential hash of every file's path, size and bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(os.fsencode(file) + b"\0%d\0" % (self.root / file).stat().st_size)
            with (self.root / file).open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def find_datasets(data: Data) -> list[Dataset]:
    """The datasets that data.path and data.datasets name, without reading them.

    Raises:
        UserError: no such path, a dataset that is not there (the nearest is named), no file of the right suffix.
    """
    if data.path.startswith("python:"):
        if data.path not in _EXCLUDED:
            raise UserError(f"data.path = {data.path}: unknown corpus; allowed: {', '.join(_EXCLUDED)}, or a file or folder")
        root = Path(sysconfig.get_path("stdlib"))
    else:
        root = Path(data.path).expanduser()
        if not data.path or not root.exists():
            raise UserError(f"data.path = {data.path!r}: no such file or folder")
    excluded, suffixes = _EXCLUDED.get(data.path, (frozenset(), readable_suffixes(data)))
    if not data.datasets:
        return [_dataset(data.path, root, root, suffixes, excluded)]
    if not root.is_dir():
        raise UserError(f"data.datasets = {data.datasets}: data.path = {data.path} is a file, it has no sub-folders")
    folders = {name: _sub_folder(data, name, root) for name in data.datasets}
    for inner, outer in itertools.permutations(folders, 2):
        if folders[inner].resolve().is_relative_to(folders[outer].resolve()):
            raise UserError(f"data.datasets: {inner!r} lies in {outer!r}; allowed: folders that share no file")
    return [_dataset(name, root, folder, suffixes, excluded) for name, folder in folders.items()]


def validation_datasets(data: Data) -> list[Dataset]:
    """The files of the evaluation text: data.val_path's, all of them, else those the held-out part is chosen from."""
    if not data.val_path:
        return find_datasets(data)
    path = Path(data.val_path).expanduser()
    if not path.exists():
        raise UserError(f"data.val_path = {data.val_path!r}: no such file or folder")
    return [_dataset(data.val_path, path, path, readable_suffixes(data))]


def _sub_folder(data: Data, name: str, root: Path) -> Path:
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"data.datasets: {name!r} leaves data.path = {data.path}; allowed: what lies below it")
    if not path.exists():
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        nearest = difflib.get_close_matches(name, there, 1, cutoff=0.0)
        hint = f"the nearest is {nearest[0]!r}" if nearest else "there is none"
        raise UserError(f"data.datasets: no {name!r} below data.path = {data.path}; {hint}")
    return path


def _dataset(name: str, root: Path, folder: Path, suffixes: tuple[str, ...], excluded: frozenset[str] = frozenset()) -> Dataset:
    """The files of `folder`, or the file that it is. Hidden files and folders are left out, and folders named in `excluded`."""
    if folder.is_file():
        root = root if root != folder else folder.parent
        return Dataset(name, root, (folder.relative_to(root).as_posix(),))
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [entry for entry in folders if not entry.startswith(".") and entry not in excluded]
        below = Path(parent).relative_to(root)
        files += [(below / file).as_posix() for file in names if file.endswith(suffixes) and not file.startswith(".")]
    files = sorted(file for file in files if (root / file).is_file())  # a link may lead nowhere
    if not files:
        raise UserError(f"{folder}: empty dataset, no file with suffix {', '.join(suffixes)} (data.suffixes, data.format)")
    return Dataset(name, root, tuple(files))
