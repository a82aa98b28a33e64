"""Where text comes from: trees of text files, JSON lines, and Python's standard library; and which part of it is held out."""

import difflib
import hashlib
import itertools
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from spectitan.config.sections import Data
from spectitan.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
STDLIB = "python:stdlib"
STDLIB_WITH_TESTS = "python:stdlib+tests"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TESTS = frozenset({"test", "tests"})
_EXCLUDED = {STDLIB: (_NOT_STDLIB | _TESTS, (".py",)), STDLIB_WITH_TESTS: (_NOT_STDLIB, (".py",))}  # folders, and suffixes to read

TRAINING, HELD_OUT = "training", "held-out"


class Document(NamedTuple):
    text: str
    source: str  # file, or file:line
    bytes_read: int  # of its dataset's files so far, for progress


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


@dataclass
class Found:
    """What reading the documents of one part (training or held-out) met; complete when the iterator has ended."""

    documents: int = 0  # of this part, those dropped as well
    other_part: int = 0  # documents that belong to the other part
    dropped: Counter = field(default_factory=Counter)  # reason -> documents
    skipped_names: list[str] = field(default_factory=list)  # files, or file:line, that could not be decoded: the first 100

    def skip(self, name: str, reason: str) -> None:
        self.dropped[reason] += 1
        if len(self.skipped_names) < 100:
            self.skipped_names.append(name)


def find_datasets(data: Data) -> list[Dataset]:
    """The datasets that data.path and data.datasets name, without reading them.

    Raises:
        UserError: no such path, a dataset that is not there (the nearest is named), no file of the right suffix, weights that
            do not match.
    """
    if data.path.startswith("python:"):
        if data.path not in _EXCLUDED:
            raise UserError(f"data.path = {data.path}: unknown corpus; allowed: {', '.join(_EXCLUDED)}, or a file or folder")
        root = Path(sysconfig.get_path("stdlib"))
    else:
        root = Path(data.path).expanduser()
        if not data.path or not root.exists():
            raise UserError(f"data.path = {data.path!r}: no such file or folder")
    if data.weights and len(data.weights) != len(data.datasets):
        raise UserError(f"data.weights has {len(data.weights)} numbers for {len(data.datasets)} data.datasets; allowed: one for each")
    if data.weights and not sum(data.weights) > 0:
        raise UserError("data.weights are all 0; allowed: at least one above 0")
    excluded, suffixes = _EXCLUDED.get(data.path, (frozenset(), _suffixes(data)))
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
    return [_dataset(data.val_path, path, path, _suffixes(data))]


def read_documents(dataset: Dataset, data: Data, part: str | None, found: Found) -> Iterator[Document]:
    """The documents of one part, in the order of files and lines; `found` is filled on the way.

    Args:
        part: TRAINING or HELD_OUT, by hash of the path below the root (text) or of path and line (JSONL); None: all.

    Raises:
        UserError: undecodable text under data.on_invalid = "error"; names file and line.
    """
    read_before = 0
    for file in dataset.files:
        path = dataset.root / file
        jsonl = _is_jsonl(data, path)
        if jsonl or _belongs(os.fsencode(file), data.holdout, part):
            for text, name, position in _json_lines(path, file, data, part, found) if jsonl else _whole_file(path, data, found):
                yield Document(text, name, read_before + position)
        else:
            found.other_part += 1
        read_before += path.stat().st_size


def _whole_file(path: Path, data: Data, found: Found) -> Iterator[tuple[str, str, int]]:
    content = path.read_bytes()
    found.documents += 1
    try:
        yield content.decode("utf-8-sig"), str(path), len(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        _invalid(f"{path}:{line}", "invalid UTF-8", f"byte 0x{content[error.start]:02x} is not UTF-8", data, found)


def _json_lines(path: Path, file: str, data: Data, part: str | None, found: Found) -> Iterator[tuple[str, str, int]]:
    position = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            position += len(line)
            if not line.strip():
                continue
            if not _belongs(b"%s\n%d" % (os.fsencode(file), number), data.holdout, part):
                found.other_part += 1
                continue
            found.documents += 1
            name = f"{path}:{number}"
            try:
                text = _text_of(line.decode("utf-8-sig" if number == 1 else "utf-8"), data.text_column)
            except UnicodeDecodeError as error:
                _invalid(name, "invalid UTF-8", f"byte 0x{line[error.start]:02x} is not UTF-8", data, found)
            except (ValueError, RecursionError) as error:
                _invalid(name, "broken JSON", str(error), data, found)
            else:
                yield text, name, position


def _text_of(line: str, column: str) -> str:
    """The document of a JSON line; ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; allowed: an object with the key {column!r} (data.text_column)")
    if column not in row:
        raise ValueError(f"no key {column!r} (data.text_column); its keys: {', '.join(map(repr, list(row)[:8])) or 'none'}")
    if not isinstance(row[column], str):
        raise ValueError(f"{column!r} is a {type(row[column]).__name__}; allowed: a string")
    try:
        row[column].encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column!r} has half of a surrogate pair, which is no character") from None
    return row[column]


def _invalid(name: str, reason: str, problem: str, data: Data, found: Found) -> None:
    if data.on_invalid == "error":
        raise UserError(f'{name}: {problem}; mend the file, or set data.on_invalid = "skip"')
    found.skip(name, reason)


def _belongs(key: bytes, holdout: float, part: str | None) -> bool:
    if part is None:
        return True
    held_out = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < holdout * 2**64
    return held_out == (part == HELD_OUT)


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


def _suffixes(data: Data) -> tuple[str, ...]:
    text = () if data.format == "jsonl" else tuple(data.suffixes)
    return text + (() if data.format == "text" else JSONL_SUFFIXES)


def _is_jsonl(data: Data, path: Path) -> bool:
    return data.format == "jsonl" or (data.format == "auto" and path.name.endswith(JSONL_SUFFIXES))
