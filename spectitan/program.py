"""What every program does around its work: configuration, signals, and one line for a mistake instead of a traceback."""

import atexit
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from spectitan.config.manager import load
from spectitan.config.tables import Config
from spectitan.errors import StopRequested, UserError
from spectitan.signals import StopSignal

# How long a rank other than 0 waits before it prints a mistake. Where all ranks meet the same one, as they mostly do, rank 0 has
# printed it and torchrun ends the others meanwhile; a mistake that only this rank met is printed after all.
OTHER_RANKS_WAIT_SECONDS = 2.0


def run(program: str, body: Callable[[Config, StopSignal], int | None], argv: list[str] | None, speculator_configs: dict[str, type]) -> int:
    """Loads the configuration, calls `body` with it, and returns the exit status.

    0 or what `body` returns; 2 for a mistake of the user's or of the system's (UserError, OSError), printed as one line on stderr,
    with its traceback under job.traceback or SPECTITAN_TRACEBACK=1; 128 + n after signal n, but 0 after SIGTERM for one of several
    processes. Other exceptions are defects of ours and keep their traceback.

    Args:
        program: train, evaluate, export, generate or prepare.
        body: the program's work; takes the configuration and the signals it may defer.
        argv, speculator_configs: as config.manager.load.
    """
    show_traceback = os.environ.get("SPECTITAN_TRACEBACK", "") not in ("", "0")
    with StopSignal() as stop:
        try:
            config = load(argv, program, speculator_configs)
            show_traceback |= config.job.traceback
            status = body(config, stop) or 0
            sys.stdout.flush()
            return status
        except SystemExit as end:  # --help
            return end.code or 0
        except UserError as error:
            return _report(program, str(error), show_traceback)
        except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
            return 128 + signal.SIGPIPE
        except OSError as error:
            files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            message = f"{files}: {error.strerror}" if files and error.strerror else str(error)
            return _report(program, message, show_traceback)
        except (StopRequested, KeyboardInterrupt) as error:
            return _stopped(program, signal.Signals(error.args[0] if error.args else signal.SIGINT))
        except Exception:
            if stop.requested is None:
                raise
            return _stopped(program, signal.Signals(stop.requested))  # others that were told have ended first, and this one waited for them


def end(status: int) -> NoReturn:
    """Ends this process; one of several after what is registered with atexit, without Python taking itself apart.

    Threads of gloo let go of the tensors of the last collectives when they come to it, as long as anything holds the process group, such
    as a mesh. Python ends a thread that asks for its lock so late inside C++, which aborts: a finished run would count as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


def _stopped(program: str, number: signal.Signals) -> int:
    if _rank() == 0:
        print(f"spectitan.{program}: stopped by {number.name}", file=sys.stderr, flush=True)
    # torchrun and job managers take any other status of a worker for a failure, and would start all anew.
    return 0 if number == signal.SIGTERM and "RANK" in os.environ else 128 + number


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report(program: str, message: str, show_traceback: bool) -> int:
    if _rank() > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, while this rank waits
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    if show_traceback:
        traceback.print_exc()
    place = f"spectitan.{program}" + (f" (rank {_rank()})" if _rank() > 0 else "")
    print(f"{place}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2
