"""JSON lines: one object a line."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from spectitan.data.documents.rows import Kind, Row


def rows(path: Path, kinds: list[Kind]) -> Iterator[Row]:
    """Every line that is not blank, still to be decoded."""
    position = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            position += len(line)
            if line.strip():
                yield Row(number, position, partial(_decoded, line, number == 1))


def _decoded(line: bytes, first: bool) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; allowed: an object")  # noqa: TRY004
    return row
