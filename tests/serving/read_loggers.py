"""Run by an environment that has wandb, trackio and mlflow: prints as JSON what they hold of the runs of a project.

    python read_loggers.py FOLDER PROJECT        FOLDER is a run's, and TRACKIO_DIR is set

For trackio and mlflow: a list of runs, each a list of [step, loss of head 0, muon_lr]; for wandb: ids of the runs, and which numbers, as
JSON writes them, are in its files.
"""

import json
import sqlite3
import sys
from pathlib import Path

import mlflow
from trackio.utils import TRACKIO_DIR

folder, project = Path(sys.argv[1]), sys.argv[2]
names = ("loss/head_0", "muon_lr")

mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
client, of_mlflow = mlflow.MlflowClient(), []
for run in client.search_runs([client.get_experiment_by_name(project).experiment_id]):
    losses, rates = (client.get_metric_history(run.info.run_id, name) for name in names)
    of_mlflow.append([[loss.step, loss.value, rate.value] for loss, rate in zip(losses, rates)])

of_trackio = {}
for name, step, values in sqlite3.connect(Path(TRACKIO_DIR) / f"{project}.db").execute(
    "select run_name, step, metrics from metrics order by id"
):
    values = json.loads(values)
    if names[0] in values:
        of_trackio.setdefault(name, []).append([step, *(values[name] for name in names)])

files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
numbers = [json.dumps(value) for row in of_mlflow[0] for value in row[1:]]
written = b"".join(file.read_bytes() for file in files)
print(
    json.dumps(
        {
            "mlflow": of_mlflow,
            "trackio": list(of_trackio.values()),
            "wandb": {
                "ids": [file.stem.removeprefix("run-") for file in files],
                "numbers": [number.encode() in written for number in numbers],
            },
        }
    )
)
