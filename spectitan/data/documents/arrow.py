"""Arrow IPC files, of the file format (fms-fsdp's shards) and of the stream format (what Hugging Face's `datasets` saves)."""

import mmap
from collections.abc import Iterator
from pathlib import Path

from spectitan.data.documents.columnar import ROWS, import_pyarrow, kind_of_file, rows_of
from spectitan.data.documents.damage import damage_of
from spectitan.data.documents.rows import Kind, Row

_FILE_FORMAT = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_RELEASE_BYTES = 2**25  # of a mapped file are read, then given back


def rows(path: Path, kinds: list[Kind]) -> Iterator[Row]:
    """Every row, with the columns of its kind only; where these hold single numbers, every record batch, as fms-fsdp has its documents.

    The file is memory-mapped, and what has been read of it is given back: memory does not grow with it, nor with its batches,
    unless they are compressed.

    Raises:
        UserError: pyarrow is not there; the columns are of no kind.
        ValueError: the file is damaged, or ends before its end.
    """
    pyarrow, number, released = import_pyarrow(path), 0, 0
    with path.open("rb") as file, damage_of("Arrow", pyarrow.ArrowException, EOFError):
        mapped = _mapped(file)
        schema, batches = _opened(pyarrow, mapped)
        kind = kind_of_file(path, schema.names, kinds)
        names = kind.columns_in(schema.names)
        flat = all(pyarrow.types.is_integer(schema.field(name).type) for name in names)
        for batch, position in batches:
            batch = batch.select(names)
            batch.validate(full=True)  # an offset beyond its buffer would read other memory
            for part in [batch] if flat else (batch.slice(first, ROWS) for first in range(0, batch.num_rows, ROWS)):
                for row in [_one_row(part)] if flat else rows_of(part):
                    number += 1
                    yield Row(number, position, lambda row=row: row)
                released += part.nbytes
                if released > _RELEASE_BYTES:
                    mapped.madvise(mmap.MADV_DONTNEED)  # what is still in use is mapped again from the system's cache
                    released = 0


def _mapped(file) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise EOFError("it is empty") from None


def _opened(pyarrow, mapped: mmap.mmap) -> tuple:
    """The schema, and an iterator of record batches with the byte of the file that they are at."""
    options = pyarrow.ipc.IpcReadOptions(use_threads=False)  # they would be missing in processes that are forked later
    if mapped[: len(_FILE_FORMAT)] == _FILE_FORMAT:
        if mapped[-len(_FILE_FORMAT) :] != _FILE_FORMAT:
            raise EOFError("it ends before its footer")
        reader = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped), options=options)
        count = reader.num_record_batches
        return reader.schema, ((reader.get_batch(i), len(mapped) * (i + 1) // count) for i in range(count))
    stream = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
    reader = pyarrow.ipc.open_stream(stream, options=options)
    if mapped[-len(_END_OF_STREAM) :] != _END_OF_STREAM:  # pyarrow would take what is there for all there is
        raise EOFError("it ends before its end-of-stream mark")
    return reader.schema, ((batch, stream.tell()) for batch in reader)


def _one_row(batch) -> dict:
    return {name: column.to_numpy(zero_copy_only=False) for name, column in zip(batch.schema.names, batch.columns)}
