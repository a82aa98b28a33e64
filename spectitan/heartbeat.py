"""Signs of life of this process: long work beats as it goes on, so that who watches can tell it from work that hangs."""

from collections.abc import Iterator
from contextlib import contextmanager

_beats = _covered = 0


def beat() -> None:
    """A piece of work is done. For any thread, as often as wanted: one addition."""
    global _beats
    _beats += 1


def beats() -> int:
    """A number that has changed whenever the process has shown a sign of life since the last call."""
    if _covered:
        beat()
    return _beats


def is_covered() -> bool:
    """Whether the process shows signs of life all the time, as within `covered`."""
    return _covered > 0


@contextmanager
def covered() -> Iterator[None]:
    """As long as the block lasts the process shows signs of life: for work of others that tells nothing of how far it is."""
    begin_covered()
    try:
        yield
    finally:
        end_covered()


def begin_covered(*args) -> None:
    """As `covered`, for callbacks; arguments are ignored."""
    global _covered
    _covered += 1


def end_covered(*args) -> None:
    global _covered
    _covered -= 1
