"""Measures a speculator, or a base alone: acceptance by drafting and verifying, speed, held-out loss. Writes report.json.

python -m spectitan.evaluate --job.config_file train_configs/quickstart.toml
python -m spectitan.evaluate --base.path BASE --speculator.path FOLDER_OR_CHECKPOINT
"""

import sys

import torch

from spectitan import program
from spectitan.config.tables import Config
from spectitan.evaluation import evaluate_run
from spectitan.signals import StopSignal
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.trained import find_trained
from spectitan.training.run_folder import check_can_be_written


def evaluate(config: Config, stop: StopSignal) -> None:
    """The program's work."""
    if config.job.threads > 0:
        torch.set_num_threads(config.job.threads)
    check_can_be_written("job.dump_folder", config.job.dump_folder)
    evaluate_run(config, find_trained(config))


def main(argv: list[str] | None = None) -> int:
    """The program: returns the exit status."""
    return program.run("evaluate", evaluate, argv, SPECULATOR_CONFIGS)


if __name__ == "__main__":
    sys.exit(main())
