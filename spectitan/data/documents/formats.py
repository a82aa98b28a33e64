"""File formats: by data.format, or by suffix where that is auto. What is no table is text, one document a file."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from spectitan.config.sections import Data
from spectitan.data.documents import arrow, compressed, jsonl, parquet, pt
from spectitan.data.documents.rows import Kind, Row


class Table(NamedTuple):
    """A format whose files hold rows."""

    name: str
    suffixes: tuple[str, ...]
    rows: Callable[[Path, list[Kind]], Iterator[Row]]


# A .json file by itself is rarely data; packed, it is how corpora ship their JSON lines.
_PACKED_JSONL = tuple(name + packed for name in (".jsonl", ".ndjson", ".json") for packed in compressed.SUFFIXES)
TABLES = {
    "jsonl": Table("JSON lines", (".jsonl", ".ndjson", *_PACKED_JSONL), jsonl.rows),
    "parquet": Table("Parquet", (".parquet",), parquet.rows),
    "arrow": Table("Arrow", (".arrow",), arrow.rows),
    "pt": Table("PyTorch", (".pt",), pt.rows),
}
# A .pt file by itself may be anything.
_BY_SUFFIX = [table for name, table in TABLES.items() if name != "pt"]


def table_of(data: Data, file: str) -> Table | None:
    """The format of a file of the data; None for text."""
    if data.format != "auto":
        return TABLES.get(data.format)
    return next((table for table in _BY_SUFFIX if file.endswith(table.suffixes)), None)


def readable_suffixes(data: Data) -> tuple[str, ...]:
    """Suffixes of the files that are read in a folder."""
    if data.format in TABLES:
        return TABLES[data.format].suffixes
    text = tuple(data.suffixes)
    return text if data.format == "text" else text + sum((table.suffixes for table in _BY_SUFFIX), ())


def format_name(table: Table | None, file: str) -> str:
    """How the log calls the format of a file."""
    packed = next((f" ({suffix})" for suffix in compressed.SUFFIXES if table and file.endswith(suffix)), "")
    return f"{table.name if table else 'text'}{packed}"
