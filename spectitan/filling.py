"""Fills a cache of hidden states ahead of training: what a run of the same keys reads with states.source = offline or hybrid."""

import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from spectitan.config.tables import Config
from spectitan.data.loader import Loader, build_loader
from spectitan.data.progress import Progress
from spectitan.data.tokenizer import load_tokenizer
from spectitan.data.validation import check_seq_length, read_held_out
from spectitan.distributed import utils
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.distributed.mesh import Distributed, init_distributed
from spectitan.distributed.tensor_parallel import check_tensor_parallel
from spectitan.errors import UserError
from spectitan.models.decoder import DecoderConfig
from spectitan.models.families import arch_of
from spectitan.models.registry import choose_config, fill_model, get_model
from spectitan.models.weights import fingerprint, resolve_base_path
from spectitan.run.model import parallelize
from spectitan.states.cache import FINAL, StatesCache, open_cache
from spectitan.states.cached import CachedStates
from spectitan.states.document_files import find_format
from spectitan.states.online import OnlineStates
from spectitan.states.sources import hidden_states_folder
from spectitan.trained import speculator_shape
from spectitan.training.intervals import steps_of_run
from spectitan.training.run_folder import check_can_be_written
from spectitan.types import TokenBatch

logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """What is to be filled."""

    base_path: Path
    base_config: DecoderConfig
    taps: tuple[int, ...]  # layer ids that the run's speculator reads
    store: StatesCache


def open_states(config: Config) -> Opened:
    """All that can be found wrong before the text is read.

    Raises:
        UserError: keys or files that do not fit; a folder that may not be written, or has other files.
    """
    base_path = resolve_base_path(config.base.path)
    base_config = choose_config(config.base.arch, config.base.variant, base_path)
    check_tensor_parallel(arch_of(base_config), base_config, config.parallelism.tp_size)
    check_seq_length(config.data, base_config.max_position_embeddings)
    taps, folder = speculator_shape(config, base_config).taps, hidden_states_folder(config.states, config.job.dump_folder)
    check_can_be_written("states.hidden_states_path", str(folder))
    format = find_format(folder)
    if format != "cache":
        raise UserError(
            f"states.hidden_states_path = {str(folder)!r} has files of states.format = {format}, to which nothing is added; allowed: "
            "another folder"
        )
    store = open_cache(
        folder, base=fingerprint(base_path, base_config), layers=taps, hidden_size=base_config.hidden_size, dtype=config.states.dtype,
        make=True, allow_other=config.base.allow_other,
    )  # fmt: skip
    return Opened(base_path, base_config, taps, store)


def fill_states(config: Config, opened: Opened) -> None:
    """Computes the states of all samples that a run of these keys reads, and of its held-out samples, but for those that are there.

    What was stopped goes on. Any number of processes, of torchrun or not, may fill one folder.

    Raises:
        UserError: as the run would; the disk is too small, or full.
    """
    parallelism = config.parallelism
    world = init_distributed(parallelism.sharding_strategy, tp_size=parallelism.tp_size, dp_replicate=parallelism.dp_replicate)
    try:
        _fill(config, opened, world)
    finally:
        world.close()


def _fill(config: Config, opened: Opened, world: Distributed) -> None:
    base_path, base_config, taps, store = opened
    tokenizer, micro_batch_size = load_tokenizer(base_path, base_config.vocab_size), config.training.micro_batch_size
    loader = build_loader(
        config.data, tokenizer, seed=config.job.seed, global_batch_size=world.world_size * micro_batch_size,
        micro_batch_size=micro_batch_size, rank=world.rank, world_size=world.world_size,
    )  # fmt: skip
    held_out = read_held_out(config.data, tokenizer, config.eval.loss_samples, micro_batch_size)
    samples = _samples(config, loader)
    there = sum(store.count(dataset) for dataset in loader.samples if dataset is not None)
    _check_space(store, _to_add(samples, loader.samples_per_epoch, there) * config.data.seq_length)

    dtype = resolve_compute_dtype(config.training.compute_dtype, world.device)
    base = _base(config, dtype, world)
    online = OnlineStates(base, tuple(column for column in store.columns if column != FINAL), frozen=True)

    def source(of: list, keep: bool) -> CachedStates:
        return CachedStates(store, of, taps, base.readout, dtype, world.device, online=online, keep=keep)

    of_text, batches = source(loader.samples, keep=True), -(-samples // (world.world_size * micro_batch_size))
    with Progress(f"hidden states of {config.data.path}", samples, "samples", 1) as progress:
        fill_all(of_text, itertools.islice(loader, batches), lambda: progress.update(min(samples, loader.position)))
    fill_all(source(held_out.samples, keep=world.rank == 0), held_out.batches)  # all ranks run all of them
    counts = of_text.take_counts()
    if world.rank == 0:
        size = _size(store.folder) / 1e9
        print(f"{store.folder}: {counts['kept']:,} samples added, {counts['cached']:,} were there; {size:.3g} GB")


def fill_all(source: CachedStates, batches: Iterable[TokenBatch], after_each: Callable[[], None] = lambda: None) -> None:
    """Adds what the store misses of the batches, until it is on the disk, and closes the source. All ranks call it together.

    Raises:
        UserError: on all ranks, if one of them could not write all.
    """
    with contextlib.closing(source):
        for batch in batches:
            source.fill(batch)
            utils.together(lambda: _check_kept(source))
            after_each()
        utils.together(source.drain)
        utils.together(lambda: _check_kept(source))
        utils.together(source.close)


def _samples(config: Config, loader: Loader) -> int:
    """How many of the global order's first samples a run reads; each once, where datasets have the shares of their sizes."""
    training, epoch = config.training, loader.samples_per_epoch
    if training.global_batch_size == -1:  # then it reads an epoch, or more
        return epoch
    steps = training.num_steps
    if steps == -1:
        steps = steps_of_run(max(training.epochs, 0) or 1, epoch, training.global_batch_size)
    samples = steps * training.global_batch_size
    return samples if config.data.weights else min(samples, epoch)


def _to_add(samples: int, distinct: int, there: int) -> int:
    """At most so many are not there yet: with weights, a dataset's samples come again."""
    return max(0, min(samples, distinct) - there)


def _check_space(store: StatesCache, tokens: int) -> None:
    existing = next(path for path in (store.folder, *store.folder.absolute().parents) if path.exists())
    needed, free = tokens * store.token_bytes, shutil.disk_usage(existing).free
    logger.info("hidden states of %s tokens take up to %.3g GB; %.3g GB are free", f"{tokens:,}", needed / 1e9, free / 1e9)
    if needed > free:
        raise UserError(
            f"{store.folder}: {needed / 1e9:.3g} GB of hidden states do not fit into the {free / 1e9:.3g} GB that are free; allowed: "
            "another states.hidden_states_path, states.dtype = int8, or a shorter training.num_steps"
        )


def _check_kept(source: CachedStates) -> None:
    failure = source.adder.failure if source.adder is not None else None
    if failure is not None:
        raise UserError(f"{source.store.folder}: {failure.strerror}; what was written stays, and the same command goes on")


def _size(folder: Path) -> int:
    """Bytes in it; another process may rename and remove files meanwhile."""
    size = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def _base(config: Config, dtype: torch.dtype, world: Distributed) -> nn.Module:
    base = get_model(config.base.arch, config.base.variant, config.base.path, dtype=dtype, device="meta")
    base.readout.drop_head()
    parallelize(config, base, None, world, dtype, freeze_base=True)
    fill_model(base, config.base.path)
    return base.eval()
