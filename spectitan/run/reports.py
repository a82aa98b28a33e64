"""What a run's reports are made of."""

from pathlib import Path

import torch

from spectitan.config.run_name import fill_run_name
from spectitan.config.tables import Config
from spectitan.distributed.fsdp import master_dtype
from spectitan.distributed.mesh import Distributed
from spectitan.run.data import RunData
from spectitan.run.inputs import Inputs
from spectitan.run.model import Model
from spectitan.run.state_sources import RunStates
from spectitan.training.metrics import MetricsLogger
from spectitan.training.reporter import Reporter


def build_reporter(
    config: Config, inputs: Inputs, data: RunData, model: Model, states: RunStates, folder: Path, world: Distributed,
    compute_dtype: torch.dtype,
) -> Reporter:  # fmt: skip
    """Opens the loggers, and goes on with the report that the run's checkpoint has begun."""
    run_name = fill_run_name(config.job.run_name, speculator=config.speculator.type, base=Path(config.base.path).name, seed=config.job.seed)
    step = inputs.saved["step"]
    metrics = MetricsLogger(config.metrics, folder, total_steps=data.total_steps, start_step=step, run_name=run_name, about=inputs.identity)

    def flops(first_step: int, last_step: int, targets_per_step: list[int], tokens: int) -> int:
        return states.flops(first_step, last_step, tokens) + model.objective.flops(targets_per_step, tokens)

    reporter = Reporter(
        metrics, model.objective.rows, model.objective.metrics, data.loader.datasets, data.loader.reasons, flops,
        master_dtype(compute_dtype), world.device, step, state_counts=states.state_counts,
    )  # fmt: skip
    if "report" in inputs.saved:
        reporter.sums.load(inputs.saved["report"])
    return reporter
