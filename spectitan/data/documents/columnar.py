"""What Parquet and Arrow files share: the package pyarrow, which is an extra, and rows made of columns."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from spectitan.data.documents.rows import Kind, kind_of
from spectitan.errors import UserError

ROWS = 256  # decoded together


def import_pyarrow(path: Path):
    """The package.

    Raises:
        UserError: it is not there.
    """
    try:
        import pyarrow
    except ImportError:
        raise UserError(f'{path}: reading it needs the package pyarrow: pip install "spectitan[parquet]"') from None
    return pyarrow


def kind_of_file(path: Path, names: Sequence[str], kinds: list[Kind]) -> Kind:
    """What a file's rows say, by the names of its columns.

    Raises:
        UserError: they are of no kind, or of several.
    """
    try:
        return kind_of(names, kinds)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def rows_of(batch) -> Iterator[dict]:
    """The rows of a RecordBatch. A list of numbers is an array, anything else what to_pylist makes of it."""
    for values in zip(*map(_values, batch.columns)):
        yield dict(zip(batch.schema.names, values))


def _values(column) -> list:
    from pyarrow import types

    kind = column.type
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return column.to_pylist()
    if not (types.is_integer(kind.value_type) or types.is_boolean(kind.value_type)):
        return _with_values(column.to_pylist())
    places = column.offsets.to_numpy()
    values = column.values[places[0] : places[-1]].to_numpy(zero_copy_only=False)
    lists = [values[begin:end] for begin, end in zip(places - places[0], places[1:] - places[0])]
    return lists if not column.null_count else [numbers if there else None for numbers, there in zip(lists, column.is_valid().to_pylist())]


def _with_values(value):
    """Without the keys that have no value: a file has every key in every item of its lists, as of messages and their tool calls."""
    if isinstance(value, list):
        return [_with_values(item) for item in value]
    return {key: _with_values(item) for key, item in value.items() if item is not None} if isinstance(value, dict) else value
