"""Runs a chat template in a process of its own: one that does not end, or takes all memory, ends that process only."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from spectitan.chats.template import ChatTemplate, Conversation
from spectitan.errors import UserError

LIMIT_SECONDS = 10.0  # of the processor, for one chat; templates take less than a millisecond
LIMIT_BYTES = 2 * 2**30  # of address space
# So many chats may exceed a limit before it is the template that is refused; in large data one in a thousand, 10 ms a chat.
_TOLERATED, _TOLERATED_SHARE = 3, 1e-3

Request = tuple  # ("prompt", text), or ("conversation", messages, tools)


class LimitExceeded(ValueError):
    """A chat took more than it may."""


class RenderingProcess:
    """Renderer's methods, called in a process; one at a time, and those of the next batch while this process does other work.

    The process is started when it is needed, and again when a chat has ended it. It ends when its input does, as when this one ends.

    Args:
        seconds: of the processor, for one request.
        stop_at_failure: what comes after a request that fails is not wanted.
    """

    def __init__(self, template: ChatTemplate, seconds: float | None = None, stop_at_failure: bool = False):
        self._template, self._seconds = template, LIMIT_SECONDS if seconds is None else seconds
        self._stop_at_failure = stop_at_failure
        self._process: subprocess.Popen | None = None
        self._sent: Sequence[Request] = ()
        self._answered = self._exceeded = 0

    def send(self, requests: Sequence[Request]) -> None:
        """Begins with these; the replies to those before have been taken."""
        self._sent = requests
        if requests:
            self._write(requests)

    def replies(self) -> list[str | Conversation | ValueError]:
        """The results of what was sent, in order, as soon as all are there; a ValueError where the template fails, which may be the last.

        Raises:
            UserError: the template is none, or it exceeds its limits again and again.
        """
        replies = []
        while len(replies) < len(self._sent):
            if replies and self._stop_at_failure and isinstance(replies[-1], ValueError):
                self.close()
                break
            line = self._process.stdout.readline()
            if line.endswith(b"\n"):
                replies.append(self._reply(*json.loads(line)))
                continue
            replies.append(self._why_ended())
            if len(replies) < len(self._sent) and not self._stop_at_failure:
                self._write(self._sent[len(replies) :])
        self._sent = ()
        return replies

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _write(self, requests: Sequence[Request]) -> None:
        if self._process is None:
            path = [*sys.path, str(Path(__file__).parents[2])]
            code = f"import sys; sys.path[:] = {path!r}; from spectitan.chats.worker import main; main()"
            self._process = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._process.stdin.write(json.dumps([self._template, self._seconds, LIMIT_BYTES]).encode() + b"\n")
        # One line, read as a whole before the first reply is written: nobody waits for the other with a full pipe.
        with contextlib.suppress(BrokenPipeError):  # it has ended: there will be no reply
            self._process.stdin.write(json.dumps(requests, default=str).encode() + b"\n")
            self._process.stdin.flush()

    def _reply(self, kind: str, *values) -> str | Conversation | ValueError:
        self._answered += 1
        if kind == "prompt":
            return values[0]
        if kind == "conversation":
            text, spans, unplaced, shortened = values
            return Conversation(text, tuple(map(tuple, spans)), unplaced, shortened)
        if kind == "no template":
            raise UserError(values[0])
        if kind == "memory":
            return self._limit_exceeded(f"it needs more than {LIMIT_BYTES / 2**30:g} GB of memory")
        return ValueError(f"chat template {self._template.place}: {values[0]}")

    def _why_ended(self) -> ValueError:
        status = self._process.wait()
        self.close()
        if status >= 0:
            raise RuntimeError(f"the process that runs the chat template ended with status {status}")
        if status == -signal.SIGPROF:
            return self._limit_exceeded(f"it has not ended within {self._seconds:g} s")
        return ValueError(f"chat template {self._template.place}: it ended its process with signal {-status}")

    def _limit_exceeded(self, problem: str) -> LimitExceeded:
        self._exceeded += 1
        if self._exceeded >= _TOLERATED and self._exceeded > _TOLERATED_SHARE * self._answered:
            raise UserError(f"chat template {self._template.place}: {problem}, in {self._exceeded} chats; mend the template")
        return LimitExceeded(f"chat template {self._template.place}: {problem}")
