"""The files of datasets: trees of files, single files, datasets of Hugging Face's hub, and Python's standard library."""

import difflib
import itertools
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from spectitan import hub
from spectitan.config.sections import Data
from spectitan.data.documents import hub_splits, saved
from spectitan.data.documents.formats import readable_suffixes
from spectitan.errors import UserError

STDLIB = "python:stdlib"
STDLIB_WITH_TESTS = "python:stdlib+tests"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TESTS = frozenset({"test", "tests"})
_NO_TEXT = frozenset({".json", ".csv", ".tsv"})  # a file that is named is read whatever its suffix, but these would be a text by mistake
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


class _Source(NamedTuple):
    """What data.path or data.val_path names."""

    root: Path  # a file or folder
    suffixes: tuple[str, ...]  # of the files that are read in a folder
    excluded: frozenset[str]  # names of folders that are left out
    splits: tuple[str, ...]  # of a dataset of the hub: those to read, the first that it has; () for files of one's own


def find_datasets(data: Data) -> list[Dataset]:
    """The datasets that data.path and data.datasets name, without reading them.

    Raises:
        UserError: no such path, a dataset that is not there (the nearest is named), no file of the right suffix.
    """
    source = _source(data, "data.path", data.path, hub_splits.TRAINING)
    root = source.root
    if not data.datasets:
        return [_dataset(data.path, source, root)]
    if not root.is_dir():
        raise UserError(f"data.datasets = {data.datasets}: data.path = {data.path} is a file, it has no sub-folders")
    folders = {name: _sub_folder(data, name, root) for name in data.datasets}
    for inner, outer in itertools.permutations(folders, 2):
        if folders[inner].resolve().is_relative_to(folders[outer].resolve()):
            raise UserError(f"data.datasets: {inner!r} lies in {outer!r}; allowed: folders that share no file")
    return [_dataset(name, source, folder) for name, folder in folders.items()]


def validation_datasets(data: Data) -> list[Dataset]:
    """The files of the evaluation text: data.val_path's, all of them, else of the datasets that the held-out part is chosen from."""
    if data.val_path:
        source = _source(data, "data.val_path", data.val_path, hub_splits.EVALUATION)
        return [_dataset(data.val_path, source, source.root)]
    datasets = find_datasets(data)
    return [dataset for dataset, weight in zip(datasets, data.weights or [1.0] * len(datasets), strict=True) if weight > 0]


def _source(data: Data, key: str, path: str, splits: tuple[str, ...]) -> _Source:
    if path.startswith("python:"):
        if path not in _EXCLUDED:
            raise UserError(f"{key} = {path}: unknown corpus; allowed: {', '.join(_EXCLUDED)}, or a file or folder")
        excluded, suffixes = _EXCLUDED[path]
        return _Source(Path(sysconfig.get_path("stdlib")), suffixes, excluded, ())
    suffixes, local = readable_suffixes(data), Path(path).expanduser()
    if path and local.exists():
        if data.format == "auto" and local.suffix in _NO_TEXT and not local.name.endswith(suffixes) and local.is_file():
            allowed = "JSON lines, text or Parquet; data.format = jsonl or text, if it is one of these under another name"
            raise UserError(f"{key} = {path!r}: a table that is not read, and no text; allowed: {allowed}")
        return _Source(local, suffixes, frozenset(), ())
    problem = f"{key} = {path!r}: no such file or folder"
    if not hub.could_be_dataset(path):
        raise UserError(problem)
    return _Source(hub.fetch_dataset(path, (*suffixes, *saved.FILES), problem), suffixes, frozenset(), splits)


def _sub_folder(data: Data, name: str, root: Path) -> Path:
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"data.datasets: {name!r} leaves data.path = {data.path}; allowed: what lies below it")
    if not path.exists():
        parent = root
        while (deeper := parent / Path(name).relative_to(parent.relative_to(root)).parts[0]).is_dir():
            parent = deeper
        there = sorted(entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        nearest = difflib.get_close_matches(name, [entry.relative_to(root).as_posix() for entry in there], 1, cutoff=0.0)
        hint = f"the nearest is {nearest[0]!r}" if nearest else "there is none"
        raise UserError(f"data.datasets: no {name!r} below data.path = {data.path}; {hint}")
    return path


def _dataset(name: str, source: _Source, folder: Path) -> Dataset:
    """The files of `folder`, or the file that it is. Hidden files and folders are left out; links are followed."""
    root = source.root
    if folder.is_file():
        root = root if root != folder else folder.parent
        return Dataset(name, root, (folder.relative_to(root).as_posix(),))
    files, others = [], set()
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [entry for entry in folders if not entry.startswith(".") and entry not in source.excluded]
        folders[:] = [entry for entry in folders if not _leads_back(Path(parent, entry))]
        names = [file for file in names if not file.startswith(".")]
        readable = [file for file in names if file.endswith(source.suffixes)]
        others.update(Path(file).suffix or file for file in set(names).difference(readable))
        if ".arrow" in source.suffixes:
            readable = saved.without_leftovers(Path(parent), names, readable)
        below = Path(parent).relative_to(root)
        files += [(below / file).as_posix() for file in readable]
    files = sorted(file for file in files if (root / file).is_file())  # a link may lead nowhere
    if not files:
        wanted, there = ", ".join(source.suffixes), ", ".join(sorted(others)[:12]) or "none"
        raise UserError(f"{folder}: empty dataset, no file with suffix {wanted} (data.suffixes, data.format); there are: {there}")
    if source.splits:
        named = folder.relative_to(root)  # by the user: its own name is not looked at
        inner = hub_splits.choose(name, [Path(file).relative_to(named).as_posix() for file in files], source.splits)
        files = [(named / file).as_posix() for file in inner]
    return Dataset(name, root, tuple(files))


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _raise(error: OSError) -> None:
    raise error  # a folder that may not be read is not an empty one
