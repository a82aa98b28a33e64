"""The documents of a dataset, and which part of it is held out."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from spectitan.config.sections import Data
from spectitan.data.documents.datasets import Dataset
from spectitan.data.documents.formats import Table, format_name, table_of
from spectitan.data.documents.rows import Content, Kind, SkippedRow, kind_of, kinds_of
from spectitan.errors import UserError

TRAINING, HELD_OUT = "training", "held-out"
_NAMES = 100  # of what was skipped, kept


class Document(NamedTuple):
    content: Content
    source: str  # file, or file:row
    bytes_read: int  # of its dataset's files so far, for progress


@dataclass
class Found:
    """What reading the documents of one part (training or held-out) met; complete when the iterator has ended."""

    documents: int = 0  # of this part, those dropped as well
    other_part: int = 0  # documents that belong to the other part
    formats: Counter = field(default_factory=Counter)  # what files were read as -> files, of either part
    kinds: Counter = field(default_factory=Counter)  # what rows of tables were recognised as -> rows
    dropped: Counter = field(default_factory=Counter)  # reason -> documents
    noted: Counter = field(default_factory=Counter)  # what is less than a document: reason -> how often
    skipped_names: list[str] = field(default_factory=list)  # files, or file:row, that could not be read: the first 100

    def invalid(self, name: str, problem: str, data: Data, reason: str) -> None:
        """A file or row that cannot be read: an error, or skipped, named and counted, as data.on_invalid says."""
        name = name.encode(errors="backslashreplace").decode()  # a file's name may be no text
        if data.on_invalid == "error":
            raise UserError(f'{name}: {problem}; mend the file, or set data.on_invalid = "skip"')
        self.dropped[reason] += 1
        if len(self.skipped_names) < _NAMES:
            self.skipped_names.append(name)


def read_documents(dataset: Dataset, data: Data, part: str | None, found: Found) -> Iterator[Document]:
    """The documents of one part, in the order of files and rows; `found` is filled on the way.

    Args:
        part: TRAINING or HELD_OUT, by hash of the path below the root (text) or of path and row (tables); None: all.

    Raises:
        UserError: what cannot be read, under data.on_invalid = "error": names file and line or row; a table without the columns.
        OSError: what the system does not let be read.
    """
    kinds, read_before = kinds_of(data), 0
    for file in dataset.files:
        path, table = dataset.root / file, table_of(data, file)
        found.formats[format_name(table, file)] += 1
        if table or _belongs(os.fsencode(file), data.holdout, part):
            contents = _table(table, path, file, data, kinds, part, found) if table else _whole_file(path, data, found)
            for content, name, position in contents:
                yield Document(content, name, read_before + position)
        else:
            found.other_part += 1
        read_before += path.stat().st_size


def check_first_rows(datasets: Iterable[Dataset], data: Data) -> None:
    """Reads the first row of every table: one without the columns, or cut short, is found before the work on others.

    Raises:
        UserError, OSError: as read_documents.
    """
    kinds = kinds_of(data)
    for dataset in datasets:
        for file in dataset.files:
            table = table_of(data, file)
            if table is not None:
                first = table._replace(rows=lambda path, kinds, rows=table.rows: islice(rows(path, kinds), 1))
                list(_table(first, dataset.root / file, file, data, kinds, None, Found()))


def _whole_file(path: Path, data: Data, found: Found) -> Iterator[tuple[str, str, int]]:
    content = path.read_bytes()
    found.documents += 1
    try:
        yield content.decode("utf-8-sig"), str(path), len(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found.invalid(f"{path}:{line}", f"byte 0x{content[error.start]:02x} is not UTF-8", data, "invalid UTF-8")


def _table(
    table: Table, path: Path, file: str, data: Data, kinds: list[Kind], part: str | None, found: Found
) -> Iterator[tuple[Content, str, int]]:
    rows, names, kind = table.rows(path, kinds), None, None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            found.invalid(str(path), str(error), data, "damaged file")
            return
        if not _belongs(b"%s\n%d" % (os.fsencode(file), row.number), data.holdout, part):
            found.other_part += 1
            continue
        found.documents += 1
        name = f"{path}:{row.number}"
        try:
            columns = row.columns()
            if names != columns.keys():  # mostly they are those of the row before
                names, kind = columns.keys(), kind_of(columns, kinds)
            content = kind.content(columns, data)
        except SkippedRow as reason:
            found.dropped[str(reason)] += 1
        except ValueError as error:
            found.invalid(name, str(error), data, "invalid row")
        else:
            found.kinds[kind.name] += 1
            yield content, name, row.position


def _belongs(key: bytes, holdout: float, part: str | None) -> bool:
    if part is None:
        return True
    held_out = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < holdout * 2**64
    return held_out == (part == HELD_OUT)
