"""Combinations of keys that cannot be, found from the configuration alone, before any work."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from spectitan.config.keys import toml_value
from spectitan.config.loss_mixture import loss_weights
from spectitan.config.run_name import check_run_name
from spectitan.config.tables import Config
from spectitan.errors import UserError

# -1 works these out, but 0 says nothing.
_NOT_ZERO = (
    "job.threads",
    "data.tokenizer_threads",
    "training.num_steps",
    "training.epochs",
    "training.global_batch_size",
    "checkpoint.interval_epochs",
    "eval.interval_epochs",
    "stage2.batch_size",
    "objective.chunk_rows",
    "optimizer.base_lr",
    "lr_scheduler.total_steps",
    "parallelism.dp_replicate",
    "plan.world_size",
    "eval.num_prompts",
    "eval.speed_prompts",
    "eval.num_draft_tokens",
    "eval.n_candidates",
    "prepare.generate_samples",
)
_MAX_LEAVES = 4096  # each is a row of the drafter's head
_SCHEDULE_KEYS = {  # what each lr_scheduler.type uses
    "linear": ("warmup_steps", "total_steps", "decay_ratio", "min_lr_ratio"),
    "cosine": ("warmup_steps", "total_steps", "decay_ratio", "min_lr_ratio", "num_cosine_cycles"),
    "constant": ("warmup_steps",),
    "two_stage": (),
}

_FROZEN = "with base.freeze = true, which trains no base; allowed: base.freeze = false"


def check_combinations(config: Config, program: str) -> None:
    """Raises UserError, naming the keys, for what `program` (train, evaluate, export, generate or prepare) could not do."""
    for label in _NOT_ZERO:
        section, _, name = label.partition(".")
        value = getattr(getattr(config, section), name)
        _require(value == -1 or value > 0, f"{label} = {value}; allowed: -1, or above 0")
    _require(config.job.dump_folder, 'job.dump_folder = ""; allowed: a folder')
    _require(config.eval.prompts, 'eval.prompts = ""; allowed: a file, spectitan:NAME, or none')
    name = config.job.run_name
    _require(name in ("", Path(name).name) and name != "..", f"job.run_name = {name!r}; allowed: a name without /")
    check_run_name(name)
    loss_weights(config.objective.loss)
    _check_data(config)
    _check_tree(config)
    _check_draft_config(config)
    if program == "train" and config.job.plan:
        pass  # base.variant may be all that it needs
    elif program in ("train", "prepare"):
        _require(config.data.path, f"data.path is missing: {program} needs a file or folder of text, or python:stdlib")
        _require(config.base.path, f"base.path is missing: {program} needs a folder with config.json and tokenizer, or spectitan:NAME")
    else:
        given = config.base.path or config.speculator.path
        _require(given, f"base.path and speculator.path are missing: {program} needs a config file, or these keys")
    if program == "train":
        _check_training(config)
    if program == "prepare":
        size, token_freq = config.prepare.tokenizer_vocab_size, config.prepare.token_freq
        _require(size == 0 or size > 256, f"prepare.tokenizer_vocab_size = {size}; allowed: 0, or above 256: the bytes and an end of text")
        _require(token_freq.endswith(".pt") or not token_freq, f"prepare.token_freq = {token_freq!r}; allowed: a file that ends in .pt")
        samples, start = config.prepare.generate_samples, config.prepare.generate_start
        given = f"prepare.generate_samples = {samples} and prepare.generate_start = {start}"
        prepare, processes = config.prepare, int(os.environ.get("WORLD_SIZE", "1"))
        others = prepare.tokenizer_vocab_size or prepare.num_prompts or prepare.token_freq or prepare.generate
        _require(
            processes == 1 or (prepare.states and not others),
            f"prepare in {processes} processes: only prepare.states = true is divided over them; allowed: that alone, or one process",
        )
        if config.prepare.states:
            family = config.speculator.type
            _require(family != "none", 'prepare.states = true with speculator.type = "none", which reads no states; allowed: a speculator')
            _check_filling(config)
        _require(config.prepare.generate or (samples, start) == (-1, 0), f"{given} without prepare.generate; allowed: with it, or -1 and 0")
    if program == "generate":
        prompts = [config.generate.prompt, config.generate.prompt_file]
        _require(sum(map(bool, prompts)) == 1, "generate.prompt and generate.prompt_file: give exactly one of them")


def _check_filling(config: Config) -> None:
    """prepare.states: the cache is of a run's samples, and of the base's own weights."""
    training, states, given = config.training, config.states, "with prepare.states = true"
    _require(states.format in ("auto", "cache"), f"states.format = {states.format} {given}, which fills a cache; allowed: auto, cache")
    _require(states.final == "auto", f"states.final = {states.final} {given}, which fills a cache; allowed: auto")
    _require(config.base.init == "pretrained", f"base.init = {config.base.init} {given}; allowed: pretrained")
    both = training.num_steps != -1 and training.epochs != -1
    _require(
        not both, f"training.num_steps = {training.num_steps} and training.epochs = {training.epochs}; allowed: one of them, the other -1"
    )
    whole = training.num_steps == -1 and (training.epochs == -1 or training.epochs >= 1) and not config.data.weights
    _require(
        whole or training.global_batch_size != -1,
        f"training.global_batch_size = -1 {given}, which fills what a run of so many steps reads; allowed: the run's number (-1 there "
        "is training.micro_batch_size x its processes)",
    )


def _check_tree(config: Config) -> None:
    top_k, n_candidates = config.eval.top_k_tokens_per_head, config.eval.n_candidates
    given, leaves = f"eval.n_candidates = {n_candidates}", math.prod(top_k)
    _require(top_k or n_candidates == -1, f"{given} without eval.top_k_tokens_per_head; allowed: with it, or -1")
    _require(
        leaves <= _MAX_LEAVES,
        f"eval.top_k_tokens_per_head = {top_k} makes {leaves} candidates to choose from; allowed: up to {_MAX_LEAVES}",
    )
    _require(
        not top_k or n_candidates <= leaves, f"{given}; allowed: -1, or 1 to the {leaves} that eval.top_k_tokens_per_head = {top_k} makes"
    )


def _check_data(config: Config) -> None:
    datasets, weights = config.data.datasets, config.data.weights
    _require(all(datasets), "data.datasets has an empty name; allowed: sub-folders of data.path")
    _require(len(set(datasets)) == len(datasets), f"data.datasets = {datasets} names one dataset twice")
    _require(
        config.data.overlong == "split" or config.data.packing != "concat",
        f"data.overlong = {config.data.overlong} with data.packing = concat, which cuts documents where samples end; "
        "allowed: data.packing = best_fit or document",
    )
    for first, second in (("prompt_key", "response_key"), ("input_ids_column", "loss_mask_column")):
        names, default = (getattr(config.data, first), getattr(config.data, second)), getattr(type(config.data)(), second)
        both = all(names) or not any(names) or names == ("", default)  # the first alone, set to "", says that there is neither
        given = f"data.{first} = {names[0]!r} and data.{second} = {names[1]!r}"
        _require(both, f'{given} are one column of two; allowed: both, or data.{first} = "" for neither')
    if config.data.loader_workers == 0:
        _refuse_unused(config, "data", ["prefetch_factor"], "data.loader_workers = 0")
    if weights:
        as_many = len(weights) == len(datasets)
        _require(as_many, f"data.weights has {len(weights)} numbers and data.datasets {len(datasets)} names; allowed: as many")
        _require(any(weights), "data.weights are all 0; allowed: at least one above 0")


def _check_training(config: Config) -> None:
    _require(
        not config.job.init_only or config.export.format != "none", 'job.init_only = true with export.format = "none"; allowed: a format'
    )
    training, start = config.training, f"speculator.path = {config.speculator.path!r}"
    if config.speculator.path:
        load_path = config.checkpoint.load_path
        _require(config.speculator.type != "none", f'{start} with speculator.type = "none"; allowed: a type, or no path')
        _require(not load_path, f"{start} and checkpoint.load_path = {load_path!r}; allowed: one of them")
    _require(
        (training.num_steps == -1) != (training.epochs == -1),
        f"training.num_steps = {training.num_steps} and training.epochs = {training.epochs}; allowed: one of them, the other -1",
    )
    _require(
        training.global_batch_size == -1 or training.global_batch_size % training.micro_batch_size == 0,
        f"training.global_batch_size = {training.global_batch_size}; allowed: -1, or a multiple of "
        f"training.micro_batch_size = {training.micro_batch_size}",
    )
    strategy, replicate, tp_size = config.parallelism.sharding_strategy, config.parallelism.dp_replicate, config.parallelism.tp_size
    _require(
        strategy != "none" or tp_size == 1,
        f"parallelism.tp_size = {tp_size} with parallelism.sharding_strategy = none; allowed: 1, or tp, fsdp, hsdp",
    )
    _require(strategy != "tp" or tp_size > 1, "parallelism.tp_size = 1 with parallelism.sharding_strategy = tp; allowed: 2 or more")
    _require(
        strategy == "hsdp" or replicate == -1,
        f"parallelism.dp_replicate = {replicate} with parallelism.sharding_strategy = {strategy}; allowed: -1, or hsdp",
    )
    _check_what_is_trained(config)
    _check_states(config)
    _check_schedule(config)
    _check_intervals(config)


def _check_states(config: Config) -> None:
    states, freeze, stage2 = config.states, config.base.freeze, config.stage2.start_step
    source = f"states.source = {states.source}"
    allowed = {"online": ("auto", "generate"), "hybrid": ("auto", "generate"), "offline": ("auto", "skip", "warn", "raise")}[states.source]
    _require(states.on_missing in allowed, f"states.on_missing = {states.on_missing} with {source}; allowed: {', '.join(allowed)}")
    if states.source == "online":
        path = states.hidden_states_path
        _require(not path, f"states.hidden_states_path = {path!r} with {source}, which reads no files; allowed: offline or hybrid")
        _refuse_unused(config, "states", ("on_generate", "format", "final", "dtype"), source)
        return
    _require(states.source == "hybrid" or states.on_generate == "cache", f"states.on_generate = delete with {source}; allowed: hybrid")
    _require(freeze, f"{source} with base.freeze = false, whose states change; allowed: online, or base.freeze = true")
    if states.source == "offline":
        _require(stage2 == -1, f"stage2.start_step = {stage2} with {source}: without a base no text is sampled; allowed: hybrid, or -1")
        split = config.parallelism.tp_size
        _require(split == 1, f"parallelism.tp_size = {split} with {source}, which holds no layers of the base; allowed: 1")


def _check_what_is_trained(config: Config) -> None:
    if config.base.arch == "hf":
        _check_hf(config)
    training, base, family, exported = config.training, config.base, config.speculator.type, config.export.format
    if base.freeze:
        _require(family != "none", 'speculator.type = "none" with base.freeze = true leaves nothing to train; allowed: base.freeze = false')
        _require(base.init != "random", 'base.init = "random" with base.freeze = true keeps random weights; allowed: base.freeze = false')
        _require(exported != "hf", 'export.format = "hf" writes a trained base; allowed with base.freeze = false only')
        _require(not base.activation_checkpointing, f"base.activation_checkpointing = true {_FROZEN}")
        _require(config.optimizer.base_lr == -1, f"optimizer.base_lr = {config.optimizer.base_lr:g} {_FROZEN}")
    if family == "none":
        loss = config.objective.loss
        _require(loss == "ce", f'objective.loss = {loss!r} with speculator.type = "none" has no teacher; allowed: ce')
        others = exported in ("auto", "hf", "none")
        _require(others, f'export.format = "{exported}" with speculator.type = "none"; allowed: auto, hf, none')
    if base.freeze or family == "none":
        only = "base.freeze = false, together with a speculator"
        coefficient, detach = training.speculator_loss_coeff, training.detach_states
        _require(coefficient == 1, f"training.speculator_loss_coeff = {coefficient:g}; allowed: 1, or {only}")
        _require(detach, f"training.detach_states = false; allowed: true, or {only}")


def _check_draft_config(config: Config) -> None:
    draft_config = getattr(config.speculator, "draft_config", "")
    if not draft_config or draft_config.startswith("{"):  # the latter is what a file said, beside the keys that it decides
        return
    decided = ("num_layers", "draft_arch", "draft_hidden_act", "sliding_window", "sliding_window_indices")
    for label in (f"speculator.{name}" for name in decided):
        _require(
            label not in config.given,
            f"speculator.draft_config = {draft_config!r} and {label}, which that file decides; allowed: one of them",
        )
    path = config.speculator.path
    _require(not path, f"speculator.draft_config and speculator.path = {path!r}, which has a decoder already; allowed: one of them")


def _check_hf(config: Config) -> None:
    """What transformers' own models cannot do here."""
    base, given = config.base, 'with base.arch = "hf"'
    parallelism = config.parallelism
    is_split = parallelism.sharding_strategy == "tp" or parallelism.tp_size > 1
    _require(base.variant == "auto", f"base.variant = {base.variant!r} {given}; allowed: auto")
    _require(base.freeze, f"base.freeze = false {given}, which runs a frozen base; allowed: true")
    _require(base.init == "pretrained", f"base.init = {base.init!r} {given}, which runs a frozen base; allowed: pretrained")
    _require(not is_split, f"tensor parallelism {given}; allowed: parallelism.sharding_strategy = none, fsdp or hsdp")
    offline = config.states.source == "offline"
    _require(not offline, f"states.source = offline {given}, which loads the whole model; allowed: online, hybrid")
    _require(config.compile.enabled != "true", f"compile.enabled = true {given}, whose blocks are not compiled; allowed: auto, false")


def _check_schedule(config: Config) -> None:
    start, num_steps, betas = config.stage2.start_step, config.training.num_steps, config.optimizer.betas
    if start >= 0:
        given, frozen = f"stage2.start_step = {start}", config.base.freeze
        _require(frozen, f"{given} with base.freeze = false would train the base on its own text; allowed: -1, or base.freeze = true")
        _require(num_steps == -1 or start < num_steps, f"{given}; allowed: -1, or below training.num_steps = {num_steps}")
    scheduler = config.lr_scheduler
    unused = [name for name in vars(scheduler) if name not in ("type", *_SCHEDULE_KEYS[scheduler.type])]
    _refuse_unused(config, "lr_scheduler", unused, f'lr_scheduler.type = "{scheduler.type}"')
    _check_optimizer(config)
    _require(len(betas) == 2 and max(betas) < 1, f"optimizer.betas = {betas}; allowed: two numbers, each at least 0 and below 1")


def _check_intervals(config: Config) -> None:
    for table in ("checkpoint", "eval"):
        epochs = getattr(config, table).interval_epochs
        if epochs != -1:
            _refuse_unused(config, table, ["interval"], f"{table}.interval_epochs = {epochs:g}")
    given, evaluation = f'checkpoint.save_best = "{config.checkpoint.save_best}"', config.eval
    if config.checkpoint.save_best == "none":
        return
    often = evaluation.interval > 0 or evaluation.interval_epochs > 0
    _require(often, f"{given} without eval.interval or eval.interval_epochs: only the last checkpoint would be measured")
    if config.checkpoint.save_best == "acceptance":
        measured = evaluation.prompts != "none" and config.speculator.type != "none"
        _require(measured, f"{given} without acceptance; allowed: with eval.prompts and a speculator, or loss")
    else:
        measured = evaluation.loss_samples > 0 and (config.data.val_path or config.data.holdout)
        _require(measured, f"{given} without a held-out loss; allowed: with eval.loss_samples and data.val_path or data.holdout")


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.name == "muon":
        given = 'optimizer.name = "muon" with speculator.type = "none"'
        _require(config.speculator.type != "none", f"{given}: Muon trains a speculator's matrices; allowed: adamw")
        _require(optimizer.muon_momentum < 1, "optimizer.muon_momentum = 1.0 takes in no gradient; allowed: at least 0 and below 1")
    else:
        muon = [name for name in vars(optimizer) if name.startswith("muon_")]
        _refuse_unused(config, "optimizer", muon, f'optimizer.name = "{optimizer.name}"')


def _refuse_unused(config: Config, table: str, names: Iterable[str], given: str) -> None:
    """Keys that mean nothing beside what is `given` must be left at their defaults."""
    section = getattr(config, table)
    for name in names:
        default, value = getattr(type(section)(), name), getattr(section, name)
        _require(
            value == default, f"{table}.{name} = {toml_value(value)} with {given}, which does not use it; allowed: {toml_value(default)}"
        )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)
