"""The process that runs a chat template: requests are lines of JSON on its input, replies are lines of JSON on its output."""

import json
import resource
import signal
import sys

from spectitan.chats.conversation import Renderer
from spectitan.chats.template import ChatTemplate
from spectitan.errors import UserError


def main() -> None:
    """Reads the template and its limits, then batches of requests; a reply to each as soon as it is there.

    A request that takes more time than the limit ends the process, by a signal that is not handled: one that Python handles
    would wait for a single long multiplication.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the program ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    template, seconds, num_bytes = json.loads(sys.stdin.buffer.readline())
    _limit_memory(num_bytes)
    source, tokens, ends, place, tool_source = template
    renderer = Renderer(ChatTemplate(source, tokens, tuple(ends), place, tool_source))
    for line in sys.stdin.buffer:
        for request in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: a machine that is busy or stopped is no fault
            reply = answer(renderer, *request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.buffer.write(reply)
            sys.stdout.buffer.flush()


def answer(renderer: Renderer, kind: str, *arguments) -> bytes:
    """One line: [the kind of reply, its values...]."""
    try:
        if kind == "prompt":
            reply = [kind, renderer.prompt(*arguments)]
        else:
            reply = [kind, *renderer.conversation(*arguments)]
        return json.dumps(reply).encode() + b"\n"
    except UserError as error:
        reply = ["no template", str(error)]
    except ValueError as error:
        reply = ["refused", str(error)]
    except MemoryError:
        reply = ["memory"]
    return json.dumps(reply).encode() + b"\n"


def _limit_memory(num_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    except (OSError, ValueError):  # a system without this limit
        pass
