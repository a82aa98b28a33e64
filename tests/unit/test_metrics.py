import errno
import json
import logging
import math

import pytest

from spectitan.config.sections import Metrics
from spectitan.training import metrics
from spectitan.training.metrics import MetricsLogger, ProgressBar, truncate_after


def report(step: int, loss: float = 2.0) -> dict:
    return dict(
        step=step,
        lr=1e-3,
        loss=[loss, 3.0],
        accuracy=[0.25, 0.125],
        grad_norm=0.5,
        beside={},
        skipped_steps=0,
        unsupervised_steps=0,
        supervised_tokens=100,
        tokens_by_dataset={"a": 60, "b": 40},
        sample_hash="00ff",
        data_counts={"documents split": 3, "dropped: empty": 1},
        tokens_per_second=1234.5,
        waiting=0.01,
        flops_per_second=1e11,
    )


def test_every_step_appears_once_after_a_resume(tmp_path):
    first = MetricsLogger(Metrics(loggers=[]), tmp_path, total_steps=40, start_step=0)
    for step in (10, 20, 30):
        first.report(**report(step, loss=1.0))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while it wrote
    second = MetricsLogger(Metrics(loggers=[]), tmp_path, total_steps=40, start_step=20)
    for step in (30, 40):
        second.report(**report(step))
    second.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20, 30, 40]
    assert [record["loss"][0] for record in records] == [1.0, 1.0, 2.0, 2.0]
    assert records[0]["tokens_by_dataset"] == {"a": 60, "b": 40} and records[0]["sample_hash"] == "00ff"
    assert all(record["data_counts"] == {"documents split": 3, "dropped: empty": 1} for record in records)


def test_what_a_logger_cannot_write_fails_on_every_rank(tmp_path, monkeypatch):
    """All that rank 0 alone does, its error is told to the others."""
    told, on_main = [], metrics.utils.on_main

    def telling(work):
        try:
            return on_main(work)
        except OSError as error:
            told.append(error.strerror)
            raise

    class Full:
        def log(self, values, step):
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(metrics.utils, "on_main", telling)
    to = MetricsLogger(Metrics(loggers=[]), tmp_path, total_steps=40, start_step=0)
    to.loggers.append(Full())
    for number, write in enumerate((lambda: to.report(**report(10)), lambda: to.evaluation(10, {"heldout_loss": 2.0})), 1):
        with pytest.raises(OSError, match="full"):
            write()
        assert told == ["full"] * number


def test_evaluations_are_kept_and_appear_once_after_a_resume(tmp_path):
    first = MetricsLogger(Metrics(loggers=[]), tmp_path, total_steps=40, start_step=0)
    first.evaluation(10, {"heldout_loss/head_0": 2.5, "acceptance_length": 1.5})
    first.evaluation(20, {"heldout_loss/head_0": 2.25})
    first.close()
    second = MetricsLogger(Metrics(loggers=[]), tmp_path, total_steps=40, start_step=10)
    second.evaluation(20, {"heldout_loss/head_0": math.inf})
    second.close()
    records = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert records == [
        {"step": 10, "heldout_loss/head_0": 2.5, "acceptance_length": 1.5},
        {"step": 20, "heldout_loss/head_0": None},
    ]


def test_truncate_after_leaves_a_good_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_after(path, 5)  # no file yet
    path.write_text('{"step": 1}\n{"step": 5}\n')
    before = path.stat().st_mtime_ns, path.stat().st_ino
    truncate_after(path, 5)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    path.write_text('{"step": 1}\nnot json\n[]\n{"step": "x"}\n{"step": 7}\n{"step": 5}')
    truncate_after(path, 6)
    assert path.read_text() == '{"step": 1}\n'


def test_console_line_is_readable_and_a_skipped_step_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        logger = MetricsLogger(Metrics(loggers=[]), tmp_path, total_steps=40, start_step=0)
        logger.report(**report(10))
        base = {"base_loss": 1.5, "base_accuracy": 0.5, "base_grad_norm": 0.25, "base_lr": 1e-4}
        logger.report(**report(20) | {"grad_norm": math.nan, "skipped_steps": 3, "beside": base | {"muon_lr": 0.0125}})
        logger.close()
    formula, good, bad = (record.getMessage() for record in caplog.records)
    assert "useful FLOP/s =" in formula
    for part in ("step 10/40", "loss 2.000 3.000", "accuracy 0.250 0.125", "grad norm 0.5", "lr 1.00e-03 |"):
        assert part in good
    assert "lr 1.00e-03, Muon's 1.25e-02 |" in bad
    for part in ("1,234 tokens/s", "data 1.0%", "GB", "0.1 TFLOP/s"):
        assert part in good
    assert "\n" not in good and "skipped" not in good and "base" not in good
    assert "grad norm nan" in bad and "3 steps skipped" in bad and "base: loss 1.500, accuracy 0.500, grad norm 0.25" in bad
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert record["grad_norm"] is None and record["skipped_steps"] == 3 and record.items() >= base.items()  # JSON has no NaN
    assert record["muon_lr"] == 0.0125


def test_tensorboard_has_every_number_and_none_twice_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    for start, steps in ((0, (10, 20)), (10, (20, 30))):
        logger = MetricsLogger(Metrics(), tmp_path, total_steps=30, start_step=start, run_name="mine")
        for step in steps:
            logger.report(**report(step, loss=float(step + start)))
        logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "mine"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/head_0")] == [(10, 10.0), (20, 30.0), (30, 40.0)]
    assert {"lr", "grad_norm", "tokens_per_second", "accuracy/head_1", "peak_memory"} <= set(events.Tags()["scalars"])


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.utils, "rank", lambda: 1)
    logger = MetricsLogger(Metrics(), tmp_path, total_steps=40, start_step=0)
    logger.report(**report(10))
    logger.evaluation(10, {"loss": 1.0})
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_says_the_time_left(capsys, monkeypatch):
    clock = iter([100.0, 102.0, 102.1, 4000.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    bar = ProgressBar(total=1000, start=100)
    bar.draw(101)  # 2 s for the one step done here, 899 to go
    bar.draw(102)  # too soon to draw again
    bar.draw(1000)
    first, last = capsys.readouterr().err.split("\x1b[K\r")[:2]
    assert "101/1000  2.00 s/step  0:29:58 left" in first and first.count("#") == 3
    assert "1000/1000" in last and last.count("#") == 30


def test_peak_memory_is_that_of_this_process():
    block = bytearray(50_000_000)
    assert len(block) < metrics.peak_memory() < 100e9
