"""Ends a job in which a rank hangs, and says which: all others would wait for it in a collective, in silence."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from spectitan import heartbeat
from spectitan.distributed import utils

EXIT_STATUS = 124  # as timeout(1)
_LOOKS = 60  # in the time limit
_ENOUGH = 0.85  # of the limit: to end everything takes a moment too
_LATE = 4  # looks without news of a process after which it counts as silent
_COLLECTIVES = os.path.join("torch", "distributed")
_BUSY = 0.1  # of a core: so much use of the processor is a sign of life


@dataclass
class _Record:
    """What a process tells the others."""

    number: int = 0  # of the record: while it grows the process runs
    beats: int = 0  # signs of life of its work
    marks: int = 0  # places of the training loop that it has passed
    place: str = "while preparing"
    waits: bool = False  # in a collective, for others
    compiles: bool = False  # or is in other work that nobody can tell the end of
    verdict: str = ""  # the line with which the job ends
    author: int = -1  # rank that found it
    machine: str = ""
    pid: int = 0


class _Clocks:
    """Seconds, of those in which this process ran.

    Attributes:
        step: since the beginning of an optimizer step that is timed, less those in which a rank compiled.
        quiet: elsewhere, since the last sign of life of any rank's work.
        silence: for each rank, since something was heard of its process; it stands while the store does not answer.
        store_silence: since the store answered.
    """

    def __init__(self, ranks: int, look: float):
        self._look = look
        self.step = self.quiet = self.store_silence = 0.0
        self.silence = [0.0] * ranks
        self._seen: list = [None, None, None]
        self._numbers = [0] * ranks

    def advance(self, seconds: float, step: int | None, beats: int, records: list[_Record], exchanges: int, compiles: bool = False) -> None:
        """`seconds` have passed. Args: step: None: none that is timed; beats, compiles: of this process; exchanges: with the store, so far."""
        step_before, signs_before, exchanges_before = self._seen
        signs = [beats, *(record.beats for record in records)]
        if step is None or step != step_before:
            self.step = 0.0
        elif not (compiles or any(record.compiles for record in records)):
            self.step += seconds
        self.quiet = self.quiet + seconds if step is None and signs == signs_before else 0.0
        self.store_silence += seconds
        if exchanges != exchanges_before:
            elapsed = min(self.store_silence, _LATE * self._look)  # longer, and others could tell it nothing either
            for rank, record in enumerate(records):
                self.silence[rank] = self.silence[rank] + elapsed if record.number == self._numbers[rank] else 0.0
            self._numbers, self.store_silence = [record.number for record in records], 0.0
        elif len(records) == 1:
            self.store_silence = 0.0
        self._seen = [step, signs, exchanges]


class Watchdog:
    """Watches over a job while it is entered, from threads of every process. All ranks call all methods alike.

    It ends every process, with EXIT_STATUS and one line of one of them that names rank and step, when
    - a process is silent for `timeout`: it is stopped, or its machine is gone;
    - an optimizer step takes `timeout` from its start, compiling aside: a base whose states come from disk is compiled when the first
      sample is missing there;
    - elsewhere no rank shows a sign of life for `timeout` (heartbeat.py).
    A process that is stopped cannot end itself: those on its machine kill it. Time in which the watching process did not run
    itself, because the whole job was suspended, does not count.

    Args:
        timeout: in seconds; 0: nothing is watched.
        program: how the line begins.
        gpu: the work is done there: a process that waits for it uses the processor all the same.
    """

    def __init__(self, timeout: float, program: str, gpu: bool = False):
        self._timeout, self._program, self._gpu = timeout, program, gpu
        self._rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Ranks tell each other through the store of the process group. It may lie in rank 0's process, and fail with it.
        self._store_fails_with_rank_0 = self._rank > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._look, self._limit = max(0.02, timeout / _LOOKS), _ENOUGH * timeout
        self._own = _Record(machine=_machine(), pid=os.getpid())
        self._records, self._exchanges = [_Record() for _ in range(ranks)], 0
        self._step, self._timed_step, self._use_counts = 0, None, True
        self._clocks = _Clocks(ranks, self._look)
        self._left, self._news, self._threads, self._worker = threading.Event(), threading.Event(), [], threading.get_ident()

    # ---- the training loop ----

    def phase(self, doing: str, no_collectives: bool = False) -> None:
        """From here on signs of life count. The use of the processor is one, unless it may be a wait for the GPUs of other ranks.

        Args:
            doing: "saving", for instance.
            no_collectives: on GPUs.
        """
        self._timed_step, self._use_counts = None, no_collectives or not self._gpu
        self._own.place = f"while {doing}" + (f" after step {self._step}" if self._step else "")
        self.mark()
        self._news.set()

    def step(self, number: int, timed: bool) -> None:
        """An optimizer step begins. One that is not timed, since it may compile, is like a phase."""
        self._step, self._own.place = number, f"at step {number}"
        self._timed_step, self._use_counts = number if timed else None, not self._gpu
        self.mark()
        self._news.set()

    def mark(self) -> None:
        """All ranks pass the same places: those that have passed the fewest are the ones that the others wait for."""
        self._own.marks += 1
        heartbeat.beat()

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            if len(self._records) > 1:
                # A connection of its own: the main thread may wait for an answer on the other.
                store = dist.PrefixStore("spectitan/watchdog", dist.distributed_c10d._get_default_store().clone())
                store.set(str(self._rank), json.dumps(asdict(self._own)))
                utils.any_rank(False)  # all have told something
                self._start(self._exchange, store)
            self._start(self._watch)
        return self

    def __exit__(self, *exception) -> None:
        while self._own.verdict:  # what failed here did so because others have ended
            time.sleep(1)
        together = len(self._records) > 1 and exception[0] is None
        if together:
            utils.any_rank(False)
        self._left.set()
        self._news.set()
        for thread in self._threads:
            # Where the store is gone it may never return. Elsewhere it has to: Python ends such a thread inside C++, which aborts.
            thread.join(60 if together else 1)
        if together:
            utils.any_rank(False)  # nobody ends while others might still ask the store in its process

    # ---- threads ----

    def _start(self, work: Callable, *args) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True, name="watchdog"))
        self._threads[-1].start()

    def _exchange(self, store: dist.Store) -> None:
        """Tells the others, at once where this process is, and hears of them."""
        keys, heard = [str(rank) for rank in range(len(self._records))], 0.0
        while not self._left.is_set():
            news = self._news.wait(0.02 if self._own.verdict else self._look)
            self._news.clear()
            self._own.number += 1
            self._own.beats, self._own.waits, self._own.compiles = heartbeat.beats(), self._worker_waits(), heartbeat.is_covered()
            try:
                store.set(str(self._rank), json.dumps(asdict(self._own)))
                if not news or time.monotonic() > heard + self._look:
                    self._records = [_Record(**json.loads(record)) for record in store.multi_get(keys)]  # may wait for ever
                    self._exchanges, heard = self._exchanges + 1, time.monotonic()
            except RuntimeError:  # the process with the store has ended
                self._left.wait(self._look)

    def _worker_waits(self) -> bool:
        """Whether the thread that trains is in torch.distributed: in its innermost frames, which wait there for other ranks."""
        frame = sys._current_frames().get(self._worker)
        for _ in range(3):
            if frame is not None and _COLLECTIVES in frame.f_code.co_filename:
                return True
            frame = frame and frame.f_back
        return False

    def _watch(self) -> None:
        before, use = time.monotonic(), time.process_time()
        while not self._left.wait(self._look):
            now, used = time.monotonic(), time.process_time()
            if self._use_counts and used - use > _BUSY * (now - before):
                heartbeat.beat()
            ran, before, use = min(now - before, 2 * self._look), now, used
            self._clocks.advance(ran, self._timed_step, heartbeat.beats(), self._records, self._exchanges, heartbeat.is_covered())
            verdict = next((record for record in self._records if record.verdict), None) or self._judge()
            if verdict and not self._left.is_set():
                self._end(verdict)

    def _judge(self) -> _Record | None:
        clocks, verdict = self._clocks, ""
        if silent := self._silent(self._limit):
            verdict = self._line(silent, "no answer")
        elif clocks.step >= self._limit or clocks.quiet >= self._limit:
            longest = max(clocks.silence)  # on a loaded machine others may be late too
            silent = self._silent(max(_LATE * self._look, longest / 2))
            verdict = self._line(silent, "no answer") if silent else self._line(self._behind(), "no progress")
        return _Record(verdict=verdict, author=self._rank) if verdict else None

    def _silent(self, seconds: float) -> list[int]:
        """The other ranks of which nothing has been heard for so long."""
        if self._store_fails_with_rank_0 and self._clocks.store_silence >= seconds:
            return [0]
        return [rank for rank, silence in enumerate(self._clocks.silence) if silence >= seconds and rank != self._rank]

    def _behind(self) -> list[int]:
        """The ranks that have come least far, if possible only those that do not wait for others."""
        self._own.waits = self._worker_waits()
        records = [self._own if rank == self._rank else record for rank, record in enumerate(self._records)]
        least = min(record.marks for record in records)
        behind = [rank for rank, record in enumerate(records) if record.marks == least]
        return [rank for rank in behind if not records[rank].waits] or behind

    def _line(self, ranks: list[int], what: str) -> str:
        those = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        advice = "; if that may take longer, set it higher" if what == "no progress" else ""
        known = not (self._store_fails_with_rank_0 and ranks == [0])  # its last news may not have come through
        record = self._records[ranks[0]] if known and self._rank not in ranks else self._own
        return f"{self._program}: {those} hung {record.place}: {what} within job.timeout = {self._timeout:g} s{advice}"

    def _end(self, verdict: _Record) -> None:
        """Ends this process, once all that answer know why: the broken connections that they see next would say nothing."""
        silent = self._silent(_LATE * self._look)
        answering = [rank for rank in range(len(self._records)) if rank not in silent]
        self._own.author, self._own.verdict = verdict.author, verdict.verdict
        self._news.set()
        end = time.monotonic() + _LATE * self._look
        while time.monotonic() < end and not all(self._records[rank].verdict for rank in answering):
            time.sleep(0.01)
        authors = [record.author for record in self._records if record.verdict]
        speaker = min(authors, default=min(answering))  # where the store is gone each has found out by itself
        if self._rank == speaker:
            print(self._own.verdict, file=sys.stderr, flush=True)
        for rank in silent:
            if self._records[rank].machine == self._own.machine:
                _kill_if_stopped(self._records[rank].pid)
        os._exit(EXIT_STATUS)


def _machine() -> str:
    """Where process numbers mean the same; "" if the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _kill_if_stopped(pid: int) -> None:
    """A process that has been stopped sees no other signal; any other one ends by itself."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] in "Tt":
                os.kill(pid, signal.SIGKILL)
    except OSError:  # it has ended, or there is no /proc
        pass
