"""What libraries raise over a damaged file, told from what the operating system says of a whole one."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def damage_of(format: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns `errors` and the OSErrors of a library into a ValueError of one line.

    An OSError of the system has a number (no permission, the file is gone, the disk fails): it says nothing of the content and stays
    as it is.
    """
    try:
        yield
    except (*errors, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"damaged {format} file: {' '.join(str(error).split())}") from None
