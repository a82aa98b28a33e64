"""Parquet files, read by pyarrow."""

from collections.abc import Iterator
from pathlib import Path

from spectitan.data.documents.columnar import ROWS, import_pyarrow, kind_of_file, rows_of
from spectitan.data.documents.damage import damage_of
from spectitan.data.documents.rows import Kind, Row

_READ_BYTES = 2**20  # of a column at once: without it, pyarrow would hold a row group's whole columns


def rows(path: Path, kinds: list[Kind]) -> Iterator[Row]:
    """Every row, with the columns of its kind only. Memory holds a few pages of these columns, however long the row groups are.

    Raises:
        UserError: pyarrow is not there; the columns are of no kind.
        ValueError: the file is damaged.
    """
    pyarrow, size, number = import_pyarrow(path), path.stat().st_size, 0
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as stream:
        with damage_of("Parquet", pyarrow.ArrowException):
            file = ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BYTES)
        kind = kind_of_file(path, file.schema_arrow.names, kinds)
        with damage_of("Parquet", pyarrow.ArrowException):
            # One thread: those of pyarrow would be missing in processes that are forked later.
            for batch in file.iter_batches(ROWS, columns=kind.columns_in(file.schema_arrow.names), use_threads=False):
                for row in rows_of(batch):
                    number += 1
                    yield Row(number, size * number // file.metadata.num_rows, lambda row=row: row)
