"""Writes what was trained as a folder for servers (a speculator) or for Hugging Face transformers (a base).

python -m spectitan.export --job.config_file train_configs/quickstart.toml
python -m spectitan.export --base.path BASE --speculator.path CHECKPOINT_OR_FOLDER --export.path OUT
"""

import sys

from spectitan import program
from spectitan.config.tables import Config
from spectitan.exporting import export_folder, export_run
from spectitan.signals import StopSignal
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.trained import find_trained
from spectitan.training.run_folder import check_can_be_written


def export(config: Config, stop: StopSignal) -> None:
    """The program's work."""
    check_can_be_written("export.path", str(export_folder(config)))
    export_run(config, find_trained(config))


def main(argv: list[str] | None = None) -> int:
    """The program: returns the exit status."""
    return program.run("export", export, argv, SPECULATOR_CONFIGS)


if __name__ == "__main__":
    sys.exit(main())
