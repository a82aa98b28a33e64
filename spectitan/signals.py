"""Stopping and saving on a signal: SIGTERM and SIGINT (Ctrl-C) end a program, SIGUSR1 asks for a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from spectitan.errors import StopRequested

# torchrun repeats to its workers the Ctrl-C that the terminal has already sent them: within this time it is the same request.
REPEATED_WITHIN_SECONDS = 5.0


class StopSignal:
    """Handles the signals while it is entered; before and after, the process's own handlers hold.

    SIGTERM and SIGINT raise StopRequested in the main thread. Within `deferred` they only set `requested`: the work in hand is
    finished and saved first. The same signal once more, later than REPEATED_WITHIN_SECONDS, raises there too.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        requested: number of the signal that asked for the end, or None.
        save_requested: SIGUSR1 arrived; who saves sets it back to False.
    """

    def __init__(self):
        self.requested: int | None = None
        self.save_requested = False
        self._deferring = False
        self._arrived: dict[int, float] = {}  # time of the first signal of each kind
        self._process = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._save}
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal only sets `requested`; StopRequested is raised when the block is left. Not to be nested."""
        self._deferring = True
        try:
            yield
        except BaseException:
            self.requested = None  # the work in hand was not finished: who asked for the end is not to hear that it was
            raise
        finally:
            self._deferring = False
        if self.requested is not None:
            raise StopRequested(self.requested)

    def _stop(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a forked worker has inherited the handler: it ends as if it had none
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        repeated = now - self._arrived.setdefault(number, now) > REPEATED_WITHIN_SECONDS
        self.requested = number
        if repeated or not self._deferring:
            raise StopRequested(number)

    def _save(self, number: int, frame) -> None:
        self.save_requested = True
