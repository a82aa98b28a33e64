"""Progress as a user sees it: a line on a terminal, log lines where stderr is none; and counts in words."""

import logging
import sys
import time

from spectitan import heartbeat

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 0.2
_BAR_WIDTH = 24


class Progress:
    """Shows how much of `total` is done. Used as a context; the end of the block ends the line.

    Args:
        total: bytes, or what `unit` says.
        unit: that numbers are shown in; one is `size` of what is counted.
    """

    def __init__(self, title: str, total: int, unit: str = "MB", size: float = 1e6):
        self._title, self._total, self._unit, self._size = title, max(1, total), unit, size
        self._terminal = sys.stderr.isatty()
        self._done, self._start, self._shown = 0, time.monotonic(), 0.0

    def __enter__(self) -> "Progress":
        if not self._terminal:
            logger.info("%s: %.1f %s", self._title, self._total / self._size, self._unit)
        return self

    def update(self, done: int) -> None:
        """`done` of the total, not an increment."""
        self._done = done
        heartbeat.beat()
        now = time.monotonic()
        if self._terminal and now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            self._show()

    def __exit__(self, *exception) -> None:
        seconds = time.monotonic() - self._start
        if self._terminal:
            self._show()
            print(file=sys.stderr)
        elif exception[0] is None:
            logger.info("%s: done in %.1f s", self._title, seconds)

    def _show(self) -> None:
        share = min(1.0, self._done / self._total)
        seconds = time.monotonic() - self._start
        rate = self._done / max(seconds, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        bar = "#" * round(share * _BAR_WIDTH)
        line = f"{self._title} [{bar:<{_BAR_WIDTH}}] {share:4.0%}  {rate / self._size:.1f} {self._unit}/s  {left:.0f} s left"
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def counted(count: int, what: str) -> str:
    """ "1 file", "1,024 files"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
