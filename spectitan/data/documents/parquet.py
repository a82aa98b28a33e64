"""Parquet files, read by the package pyarrow, which is an extra."""

from collections.abc import Iterator
from pathlib import Path

from spectitan.data.documents.rows import Kind, Row, kind_of
from spectitan.errors import UserError

_ROWS = 256  # decoded together


def rows(path: Path, kinds: list[Kind]) -> Iterator[Row]:
    """Every row, with the columns of its kind only. Memory holds a row group's pages of these columns.

    Raises:
        UserError: pyarrow is not there; the columns are of no kind.
        ValueError: the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f'{path}: reading it needs the package pyarrow: pip install "spectitan[parquet]"') from None
    size, number = path.stat().st_size, 0
    try:
        with ParquetFile(path, pre_buffer=False) as file:
            try:
                kind = kind_of(file.schema_arrow.names, kinds)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
            # One thread: those of pyarrow would be missing in processes that are forked later.
            for batch in file.iter_batches(_ROWS, columns=list(kind.columns), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(number, size * number // file.metadata.num_rows, lambda row=row: row)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"damaged Parquet file: {' '.join(str(error).split())}") from None
