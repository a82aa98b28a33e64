"""JSON lines: one object a line, plain or compressed."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from spectitan.data.documents import compressed
from spectitan.data.documents.rows import Kind, Row


def rows(path: Path, kinds: list[Kind]) -> Iterator[Row]:
    """Every line that is not blank, still to be decoded. Memory holds a line.

    Raises:
        UserError, ValueError: as compressed.opened.
    """
    with compressed.opened(path) as (file, content):
        for number, line in enumerate(content, 1):
            if line.strip():
                yield Row(number, file.tell(), partial(_decoded, line.rstrip(), number == 1))


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
        raise ValueError(f"a JSON {type(row).__name__}; allowed: an object")
    return row
