"""Combinations of keys that cannot be, found from the configuration alone, before any work."""

from __future__ import annotations

import typing

from spectitan.errors import UserError

if typing.TYPE_CHECKING:
    from spectitan.config.manager import Config

# -1 works these out, but 0 says nothing.
_NOT_ZERO = (
    "job.threads",
    "data.processes",
    "training.num_steps",
    "training.epochs",
    "training.global_batch_size",
    "objective.chunk_rows",
    "lr_scheduler.stage2_start_step",
    "eval.num_prompts",
    "eval.num_draft_tokens",
)


def check_combinations(config: Config, program: str) -> None:
    """Raises UserError, naming the keys, for what `program` (train, evaluate, export, generate or prepare) could not do."""
    for label in _NOT_ZERO:
        section, _, name = label.partition(".")
        value = getattr(getattr(config, section), name)
        _require(value == -1 or value > 0, f"{label} = {value}; allowed: -1, or above 0")
    _require(config.job.dump_folder, 'job.dump_folder = ""; allowed: a folder')
    _check_data(config)
    if program in ("train", "prepare"):
        _require(config.data.path, f"data.path is missing: {program} needs a file or folder of text, or python:stdlib")
        _require(config.base.path, f"base.path is missing: {program} needs a folder with config.json and tokenizer, or spectitan:NAME")
    else:
        given = config.base.path or config.speculator.path
        _require(given, f"base.path and speculator.path are missing: {program} needs a config file, or these keys")
    if program == "train":
        _check_training(config)
    if program == "generate":
        prompts = [config.generate.prompt, config.generate.prompt_file]
        _require(sum(map(bool, prompts)) == 1, "generate.prompt and generate.prompt_file: give exactly one of them")


def _check_data(config: Config) -> None:
    datasets, weights = config.data.datasets, config.data.weights
    _require(all(datasets), 'data.datasets has an empty name; allowed: sub-folders of data.path')
    _require(len(set(datasets)) == len(datasets), f"data.datasets = {datasets} names one dataset twice")
    if weights:
        _require(len(weights) == len(datasets), f"data.weights has {len(weights)} numbers and data.datasets {len(datasets)} names; allowed: as many")
        _require(any(weights), "data.weights are all 0; allowed: at least one above 0")


def _check_training(config: Config) -> None:
    training, base, scheduler = config.training, config.base, config.lr_scheduler
    none = config.speculator.type == "none"
    _require(
        (training.num_steps == -1) != (training.epochs == -1),
        f"training.num_steps = {training.num_steps} and training.epochs = {training.epochs}; allowed: one of them, the other -1",
    )
    divides = training.global_batch_size % training.micro_batch_size == 0
    _require(
        training.global_batch_size == -1 or divides,
        f"training.global_batch_size = {training.global_batch_size}; allowed: -1, or a multiple of training.micro_batch_size = {training.micro_batch_size}",
    )
    _require(not (none and base.freeze), 'speculator.type = "none" and base.freeze = true leave nothing to train; set base.freeze = false')
    _require(none or base.freeze, f'base.freeze = false; allowed with speculator.type = "none" only, and it is "{config.speculator.type}"')
    _require(not (base.init == "random" and base.freeze), 'base.init = "random" and base.freeze = true would keep random weights; set base.freeze = false')
    _require(not (none and config.objective.loss == "kl_div"), 'objective.loss = "kl_div" with speculator.type = "none": a base has no teacher; allowed: "ce"')
    _require(not (none and config.export.format == "mlp_speculator"), 'export.format = "mlp_speculator" with speculator.type = "none"; allowed: auto, hf, none')
    _require(none or config.export.format != "hf", 'export.format = "hf" writes a trained base, and base.freeze = true; allowed: auto, mlp_speculator, none')
    betas = config.optimizer.betas
    _require(len(betas) == 2 and max(betas) < 1, f"optimizer.betas = {betas}; allowed: two numbers, each at least 0 and below 1")
    start = scheduler.stage2_start_step
    if start != -1:
        _require(scheduler.type == "two_stage", f'lr_scheduler.stage2_start_step = {start} with type = "{scheduler.type}"; allowed with "two_stage" only')
        _require(
            training.num_steps == -1 or start < training.num_steps,
            f"lr_scheduler.stage2_start_step = {start}; allowed: below training.num_steps = {training.num_steps}",
        )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)
