"""What the loggers are told, and that one whose package is missing is named before any work. Their packages are played by doubles."""

import importlib.machinery
import json
import re
import sys
import types

import pytest

from spectitan.config.run_name import check_run_name, fill_run_name
from spectitan.config.sections import Metrics
from spectitan.errors import UserError
from spectitan.training.loggers import check_loggers
from spectitan.training.metrics import MetricsLogger
from tests.unit.test_metrics import report

ABOUT = {"optimizer.lr": 0.01, "speculator.type": "mlp"}


class Recorded:
    """Notes every call of any of its attributes, as (name, arguments, keywords), and gives back itself."""

    def __init__(self, **attributes):
        self.calls, self.attributes = [], attributes

    def __getattr__(self, name):
        if name in self.attributes:
            return self.attributes[name]

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.fixture
def package(monkeypatch):
    def put(name: str, recorded: Recorded) -> Recorded:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__getattr__ = lambda attribute: getattr(recorded, attribute)
        monkeypatch.setitem(sys.modules, name, module)
        return recorded

    return put


def two_starts(folder, name: str, **keys) -> None:
    """A run of two reports and an evaluation that is stopped, and goes on from step 10 under another template of its name."""
    for start, run_name in ((0, "first"), (10, "second")):
        metrics = Metrics(loggers=[name], **keys)
        logger = MetricsLogger(metrics, folder, total_steps=40, start_step=start, run_name=run_name, about=ABOUT)
        logger.report(**report(start + 10))
        logger.evaluation(start + 10, {"acceptance_length": 1.5})
        logger.close()


def values_at(step: int, calls) -> list[dict]:
    return [args[0] for name, args, kwargs in calls if name in ("log", "log_metrics") and kwargs == {"step": step}]


def check_values(calls) -> None:
    for step in (10, 20):
        numbers, evaluation = values_at(step, calls)
        assert evaluation == {"evaluation/acceptance_length": 1.5}
        assert numbers["loss/head_0"] == 2.0 and numbers["loss/head_1"] == 3.0 and numbers["accuracy/head_1"] == 0.125
        assert numbers["lr"] == 1e-3 and numbers["tokens_per_second"] == 1234.5 and numbers["grad_norm"] == 0.5
        assert all(isinstance(value, int | float) for value in numbers.values())


def calls_of(recorded: Recorded, name: str) -> list[dict]:
    return [kwargs | dict(enumerate(args)) for called, args, kwargs in recorded.calls if called == name]


def test_wandb(tmp_path, package):
    wandb = package("wandb", Recorded(id="abc"))
    two_starts(tmp_path, "wandb", project="mine", dir=str(tmp_path / "logs"))
    begun = {"project": "mine", "name": "first", "resume": "allow", "dir": str(tmp_path / "logs"), "config": ABOUT}
    assert calls_of(wandb, "init") == [begun | {"id": None}, begun | {"id": "abc"}]
    assert len(calls_of(wandb, "finish")) == 2
    check_values(wandb.calls)


def test_trackio(tmp_path, package):
    trackio = package("trackio", Recorded(name="first-1"))
    two_starts(tmp_path, "trackio")
    begun = {"project": "spectitan", "config": ABOUT}
    assert calls_of(trackio, "init") == [begun | {"name": "first", "resume": "never"}, begun | {"name": "first-1", "resume": "allow"}]
    assert len(calls_of(trackio, "finish")) == 2
    check_values(trackio.calls)


@pytest.mark.parametrize("uri", [None, "http://somewhere"])
def test_mlflow(tmp_path, package, monkeypatch, uri):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow = package("mlflow", Recorded(info=types.SimpleNamespace(run_id="77")))
    two_starts(tmp_path, "mlflow")
    assert calls_of(mlflow, "set_tracking_uri") == ([] if uri else [{0: f"sqlite:///{tmp_path}/mlflow.db"}] * 2)
    assert calls_of(mlflow, "set_experiment") == [{0: "spectitan"}] * 2
    assert calls_of(mlflow, "start_run") == [{"run_name": "first"}, {"run_id": "77"}]
    assert calls_of(mlflow, "log_params") == [{0: {"optimizer.lr": "0.01", "speculator.type": "mlp"}}]
    assert len(calls_of(mlflow, "end_run")) == 2
    check_values(mlflow.calls)


def test_several_at_once_and_a_new_run_in_an_old_folder(tmp_path, package):
    doubles = [package("wandb", Recorded(id="abc")), package("trackio", Recorded(name="t"))]
    for _ in range(2):
        logger = MetricsLogger(Metrics(loggers=["trackio", "wandb"]), tmp_path, total_steps=40, start_step=0)
        logger.report(**report(10))
        logger.close()
    for double in doubles:
        assert len(values_at(10, double.calls)) == 2
        assert [call["name"] for call in calls_of(double, "init")] == [tmp_path.name] * 2
    assert [call["id"] for call in calls_of(doubles[0], "init")] == [None, None]
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"name": "", "trackio": "t", "wandb": "abc"}


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named(monkeypatch, name):
    found = types.SimpleNamespace(origin="somewhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == name else found)
    check_loggers(["tensorboard"])
    with pytest.raises(
        UserError, match=rf'^metrics.loggers has {name}, which is not installed: pip install "spectitan\[{name}\]", or leave'
    ):
        check_loggers(["tensorboard", name])


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "runs_of_old").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="metrics.loggers has runs_of_old, which is not installed"):
        check_loggers(["runs_of_old"])


def test_run_names():
    filled = fill_run_name("{speculator}-{base}_{seed}.{rank}{local_rank} {time}+{utc_time}", speculator="mlp", base="pystdlib", seed=7)
    time = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"
    assert re.fullmatch(rf"mlp-pystdlib_7\.00 {time}\+{time}", filled)
    for plain in ("", "plain", "{}".strip("{}")):
        assert fill_run_name(plain, speculator="mlp", base="b", seed=1) == plain
    for template, unknown in (("a-{model}", "model"), ("{}", ""), ("{time!r}", "time!r"), ("{seed}{Time}", "Time")):
        with pytest.raises(UserError, match=re.escape(f"no placeholder {{{unknown}}}; allowed: {{time}}, ")):
            check_run_name(template)
