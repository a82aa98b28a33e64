"""Where the numbers of a run go beside its own files: TensorBoard, Weights & Biases, Trackio, MLflow. All of rank 0 alone.

loggers.json in the dump_folder knows what a run is called there, so that one that goes on is the same run.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from spectitan.config.sections import Metrics
from spectitan.errors import UserError
from spectitan.files import write_whole


class Logger(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


@dataclass
class Run:
    """What the loggers are told of a run.

    Attributes:
        name: with its placeholders filled in.
        folder: its dump_folder.
        config: section.key -> value.
        start_step: steps done before this process.
        known: logger -> what it calls this run, of an earlier start.
    """

    name: str
    folder: Path
    config: dict[str, object]
    start_step: int
    known: dict[str, str] = field(default_factory=dict)

    @property
    def shown_name(self) -> str:
        return self.name or self.folder.resolve().name


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError for the first one whose package is not installed. Nothing is imported yet."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without origin: a mere folder of that name, as wandb leaves one where it runs
            package = name if name == "tensorboard" else f'"spectitan[{name}]"'
            raise UserError(f"metrics.loggers has {name}, which is not installed: pip install {package}, or leave it out")


def open_loggers(metrics: Metrics, run: Run) -> list[Logger]:
    makers = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}
    return [makers[name](metrics, run) for name in metrics.loggers]


def read_names(folder: Path) -> dict[str, str]:
    """What loggers.json knows; nothing if there is none, or if it is damaged."""
    try:
        names = json.loads((folder / "loggers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return names if isinstance(names, dict) else {}


def write_names(folder: Path, names: dict[str, str]) -> None:
    write_whole(folder / "loggers.json", json.dumps(names, indent=1))


class TensorBoard:
    def __init__(self, metrics: Metrics, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(metrics.dir or run.folder / "tensorboard") / run.name
        self._writer = SummaryWriter(str(folder), purge_step=run.start_step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """On resume, steps that come again are left as they are there: wandb takes in ascending steps only."""

    def __init__(self, metrics: Metrics, run: Run):
        import wandb

        self._run = wandb.init(
            project=metrics.project, name=run.shown_name, id=run.known.get("wandb"), resume="allow", dir=metrics.dir or str(run.folder),
            config=run.config,
        )  # fmt: skip
        run.known["wandb"] = self._run.id

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """It keeps its files in a folder of its own, which TRACKIO_DIR names."""

    def __init__(self, metrics: Metrics, run: Run):
        import trackio

        name = run.known.get("trackio")
        self._run = trackio.init(
            project=metrics.project, name=name or run.shown_name, config=run.config, resume="allow" if name else "never"
        )
        self._finish = trackio.finish
        run.known["trackio"] = self._run.name

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._finish()


class MLflow:
    """MLFLOW_TRACKING_URI wins over the folder. On resume, steps that come again are there twice."""

    def __init__(self, metrics: Metrics, run: Run):
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{Path(metrics.dir or run.folder).resolve() / 'mlflow.db'}")
        mlflow.set_experiment(metrics.project)
        known = run.known.get("mlflow")
        active = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=run.shown_name)
        if not known:
            mlflow.log_params({name: str(value)[:500] for name, value in run.config.items()})  # longer ones are refused there
        run.known["mlflow"] = active.info.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()
