"""Measures a speculator, or a base alone: acceptance by drafting and verifying, speed, held-out loss. Writes report.json.

    python -m spectitan.evaluate --job.config_file train_configs/quickstart.toml
    python -m spectitan.evaluate --base.path BASE --speculator.path FOLDER_OR_CHECKPOINT
"""

import sys

import torch

from spectitan import program
from spectitan.config.manager import Config
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import load_tokenizer
from spectitan.data.validation import build_validation
from spectitan.decoding.report import table, write_report
from spectitan.distributed.mesh import choose_device
from spectitan.errors import UserError
from spectitan.evaluation import evaluate_models, training_overlap
from spectitan.signals import StopSignal
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.trained import find_trained, load_base, load_speculator_for


def evaluate(config: Config, stop: StopSignal) -> None:
    """The program's work. Everything is float32: there, greedy text must be that of plain decoding."""
    if config.job.threads > 0:
        torch.set_num_threads(config.job.threads)
    if config.speculator.type != "none" and find_trained(config) is None:
        raise UserError(
            f"speculator.path is empty and job.dump_folder = {config.job.dump_folder!r} has no checkpoint: nothing to evaluate; "
            'speculator.type = "none" evaluates the base alone'
        )
    base, base_path = load_base(config, torch.float32)
    base.to(choose_device())
    speculator = load_speculator_for(config, base)
    tokenizer = load_tokenizer(base_path)
    prompts = [] if config.eval.prompts == "none" or speculator is None else load_prompts(config.eval.prompts, tokenizer)
    validation = build_validation(config.data, tokenizer, config.eval.loss_samples, config.training.micro_batch_size)
    if not prompts and not validation:
        raise UserError("nothing to measure: give eval.prompts (acceptance of a speculator), or data.val_path or data.holdout (loss)")

    overlap = training_overlap(config.data, tokenizer, prompts)
    report = evaluate_models(base, speculator, tokenizer, prompts, validation, config.eval, seed=config.job.seed, overlap=overlap)
    print(table(report))
    print(f"written: {write_report(report, config.job.dump_folder)}")


def main(argv: list[str] | None = None) -> int:
    """The program: returns the exit status."""
    return program.run("evaluate", evaluate, argv, SPECULATOR_CONFIGS)


if __name__ == "__main__":
    sys.exit(main())
