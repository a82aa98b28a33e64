"""The frame of every program: exit status, one line for a mistake, stop signals (in processes of their own)."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from spectitan import program as program_module
from spectitan.errors import StopRequested, UserError
from spectitan.program import run
from spectitan.signals import StopSignal

ROOT = Path(__file__).parents[2]
LONG = 300  # seconds, of a machine that is slow and busy
FLAGS = ["--base.path", "b", "--speculator.type", "none"]


def raising(error: BaseException):
    def body(config, stop):
        raise error

    return body


def test_status_is_that_of_the_body():
    assert run("evaluate", lambda config, stop: None, FLAGS, {}) == 0
    assert run("evaluate", lambda config, stop: 3, FLAGS, {}) == 3
    assert run("evaluate", lambda config, stop: 0, ["--help"], {}) == 0


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("data.path = x: no such\nfile"), "data.path = x: no such file"),
        (FileNotFoundError(2, "No such file or directory", "a/b.txt"), "a/b.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", "a", None, "b"), "a -> b: Permission denied"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (OSError("header\nof a file"), "header of a file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(error, line, capsys):
    assert run("evaluate", raising(error), FLAGS, {}) == 2
    assert capsys.readouterr().err == f"spectitan.evaluate: {line}\n"


def test_a_mistake_in_the_configuration(capsys):
    assert run("train", raising(AssertionError("not reached")), [*FLAGS, "--training.num_step", "3"], {}) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("spectitan.train: command line: unknown key") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_traceback_only_when_asked(capsys, monkeypatch):
    assert run("evaluate", raising(UserError("mine")), [*FLAGS, "--job.traceback"], {}) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("\nspectitan.evaluate: mine\n")
    monkeypatch.setenv("SPECTITAN_TRACEBACK", "1")
    assert run("evaluate", raising(UserError("mine")), ["--nonsense"], {}) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run("evaluate", lambda config, stop: 1 // 0, FLAGS, {})


def test_other_ranks_wait_and_name_themselves(capsys, monkeypatch):
    monkeypatch.setattr(program_module, "OTHER_RANKS_WAIT_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "3")
    assert run("evaluate", raising(UserError("mine")), FLAGS, {}) == 2
    assert capsys.readouterr().err == "spectitan.evaluate (rank 3): mine\n"
    assert run("evaluate", raising(StopRequested(signal.SIGINT)), FLAGS, {}) == 130
    assert run("evaluate", raising(StopRequested(signal.SIGTERM)), FLAGS, {}) == 0  # or torchrun would start all anew
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error, name, status", [(StopRequested(signal.SIGTERM), "SIGTERM", 143), (KeyboardInterrupt(), "SIGINT", 130)])
def test_a_stop_is_one_line(error, name, status, capsys):
    assert run("evaluate", raising(error), FLAGS, {}) == status
    assert capsys.readouterr().err == f"spectitan.evaluate: stopped by {name}\n"


def test_handlers_are_put_back():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignal():
        assert all(signal.getsignal(number) != handler for number, handler in zip(numbers, before))
    assert [signal.getsignal(number) for number in numbers] == before


def test_outside_the_main_thread():
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(run("evaluate", lambda config, stop: 5, FLAGS, {})))
    thread.start()
    thread.join()
    assert statuses == [5]


def start(body: str, **environment: str) -> subprocess.Popen:
    """A process whose program has this body and has printed "ready"."""
    script = "\n".join(
        [
            "import sys, time, multiprocessing, spectitan.signals",
            "from spectitan.program import run",
            "def body(config, stop):",
            "    def ready(): print('ready', flush=True)",
            textwrap.indent(textwrap.dedent(body), "    "),
            f"sys.exit(run('evaluate', body, {FLAGS}, {{}}))",
        ]
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_any_work(number):
    process = start("ready(); time.sleep(10_000)")
    process.send_signal(number)
    out, error = process.communicate(timeout=LONG)
    assert (process.returncode, out, error) == (128 + number, "", f"spectitan.evaluate: stopped by {number.name}\n")


def test_deferred_signal_lets_the_work_be_saved():
    process = start(
        """
        spectitan.signals.REPEATED_WITHIN_SECONDS = 10_000
        with stop.deferred():
            ready()
            while stop.requested is None:
                time.sleep(0.01)
            print("requested", flush=True)
            sys.stdin.readline()  # the same signal again, at once, is one request
            print("saved", flush=True)
        print("not reached", flush=True)
        """
    )
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "requested\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate("\n", timeout=LONG)
    assert (process.returncode, out, error) == (130, "saved\n", "spectitan.evaluate: stopped by SIGINT\n")


def test_repeated_signal_ends_deferred_work():
    process = start(
        """
        spectitan.signals.REPEATED_WITHIN_SECONDS = 0.2
        with stop.deferred():
            ready()
            while stop.requested is None:
                time.sleep(0.01)
            print("requested", flush=True)
            time.sleep(10_000)
        """
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "requested\n"
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=LONG)
    assert (process.returncode, error) == (143, "spectitan.evaluate: stopped by SIGTERM\n")


def test_usr1_asks_for_a_checkpoint_each_time():
    process = start(
        """
        ready()
        for _ in range(2):
            while not stop.save_requested:
                time.sleep(0.01)
            stop.save_requested = False
            print("saved", flush=True)
        """
    )
    for _ in range(2):
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "saved\n"
    assert process.wait(LONG) == 0


def test_forked_worker_ends_silently():
    process = start(
        """
        context = multiprocessing.get_context("fork")
        running = context.Event()
        worker = context.Process(target=lambda: (running.set(), time.sleep(10_000)))
        worker.start()
        running.wait()
        worker.terminate()
        worker.join()
        ready()
        return -worker.exitcode
        """
    )
    _, error = process.communicate(timeout=LONG)
    assert (process.returncode, error) == (signal.SIGTERM, "")


def test_reader_of_the_output_may_leave():
    code = f"import sys; from spectitan.program import run; sys.exit(run('evaluate', lambda c, s: print('x' * 10**6), {FLAGS}, {{}}))"
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout.read(1) == b"x"
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(LONG) == 128 + signal.SIGPIPE


KEPT_MESH = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from spectitan import program
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
for _ in range(3):
    flag = torch.tensor([0])
    dist.all_reduce(flag)
dist.destroy_process_group()
program.end(3)
"""


def test_the_end_does_not_wait_for_threads_of_gloo(tmp_path):
    """They let go of the last collective's tensor while Python ends, which it does not bear: of pairs that end by sys.exit, half abort."""
    environment = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    pairs = [(str(tmp_path / str(pair)), str(rank)) for pair in range(4) for rank in range(2)]
    ranks = [subprocess.Popen([sys.executable, "-c", KEPT_MESH, *arguments], env=environment) for arguments in pairs]
    assert [rank.wait(LONG) for rank in ranks] == [3] * len(ranks)
