"""Fills a cache of hidden states ahead of training: what a run of the same keys reads with states.source = offline or hybrid."""

import contextlib
import itertools
import logging
import shutil

import torch
from torch import nn

from spectitan.config.manager import Config
from spectitan.data.loader import Loader, build_loader
from spectitan.data.progress import Progress
from spectitan.data.tokenizer import load_tokenizer
from spectitan.data.validation import check_seq_length, read_held_out
from spectitan.distributed.fsdp import apply_fsdp, resolve_compute_dtype
from spectitan.distributed.mesh import Distributed, init_distributed
from spectitan.distributed.tensor_parallel import apply_tp, check_tensor_parallel
from spectitan.errors import UserError
from spectitan.models.decoder import DecoderConfig
from spectitan.models.families import arch_of
from spectitan.models.registry import choose_config, fill_model, get_model
from spectitan.models.weights import fingerprint, resolve_base_path
from spectitan.speculators.registry import new_speculator
from spectitan.states.cache import FINAL, StatesCache, open_cache
from spectitan.states.cached import CachedStates
from spectitan.states.online import OnlineStates
from spectitan.states.sources import hidden_states_folder
from spectitan.trained import family_keys, find_trained
from spectitan.training.compile import apply_compile

logger = logging.getLogger(__name__)


def fill_states(config: Config) -> None:
    """Computes the states of all samples that a run of these keys reads, and of its held-out samples, but for those that are there.

    What was stopped goes on. Any number of processes, of torchrun or not, may fill one folder.

    Raises:
        UserError: as the run would; the disk is too small, or full.
    """
    parallelism = config.parallelism
    world = init_distributed(parallelism.sharding_strategy, tp_size=parallelism.tp_size, dp_replicate=parallelism.dp_replicate)
    try:
        _fill(config, world)
    finally:
        world.close()


def _fill(config: Config, world: Distributed) -> None:
    base_path = resolve_base_path(config.base.path)
    base_config = choose_config(config.base.arch, config.base.variant, base_path)
    check_tensor_parallel(arch_of(base_config), base_config, config.parallelism.tp_size)
    check_seq_length(config.data, base_config.max_position_embeddings)
    taps, folder = _taps(config, base_config), hidden_states_folder(config.states, config.job.dump_folder)
    store = open_cache(
        folder, base=fingerprint(base_path, base_config), layers=taps, hidden_size=base_config.hidden_size, dtype=config.states.dtype,
        make=True, allow_other=config.base.allow_other,
    )  # fmt: skip
    tokenizer, micro_batch_size = load_tokenizer(base_path, base_config.vocab_size), config.training.micro_batch_size
    loader = build_loader(
        config.data, tokenizer, seed=config.job.seed, global_batch_size=world.world_size * micro_batch_size,
        micro_batch_size=micro_batch_size, rank=world.rank, world_size=world.world_size,
    )  # fmt: skip
    held_out = read_held_out(config.data, tokenizer, config.eval.loss_samples, micro_batch_size)
    samples = _samples(config, loader, world.world_size)
    _check_space(store, samples * config.data.seq_length)

    dtype = resolve_compute_dtype(config.training.compute_dtype, world.device)
    base = _base(config, base_config, dtype, world)
    online = OnlineStates(base, tuple(column for column in store.columns if column != FINAL), frozen=True)

    def source(of: list, keep: bool) -> CachedStates:
        return CachedStates(store, of, taps, base.readout, dtype, world.device, online=online, keep=keep)

    with contextlib.closing(source(loader.samples, keep=True)) as of_text:
        with Progress(f"hidden states of {config.data.path}", samples, "samples", 1) as progress:
            for batch in itertools.islice(loader, -(-samples // (world.world_size * micro_batch_size))):
                of_text.fill(batch)
                _check_kept(of_text, store)
                progress.update(min(samples, loader.position))
    with contextlib.closing(source(held_out.samples, keep=world.rank == 0)) as of_held_out:  # all ranks run all of them
        for batch in held_out.batches:
            of_held_out.fill(batch)
            if world.rank == 0:
                _check_kept(of_held_out, store)
    counts = of_text.take_counts()
    if world.rank == 0:
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {counts['kept']:,} samples added, {counts['cached']:,} were there; {size / 1e9:.3g} GB")


def _taps(config: Config, base_config: DecoderConfig) -> tuple[int, ...]:
    """Layer ids that the run's speculator reads."""
    if config.speculator.path:
        trained = find_trained(config)
        config.adopt_speculator(*family_keys(trained), source=str(trained.path))
    with torch.device("meta"):
        return new_speculator(config.speculator.type, config.speculator, base_config, config.objective).taps


def _samples(config: Config, loader: Loader, ranks: int) -> int:
    """How many of the global order's first samples a run reads; each once, where datasets have the shares of their sizes."""
    training, samples = config.training, loader.samples_per_epoch
    if training.num_steps > 0:
        samples = training.num_steps * max(training.global_batch_size, training.micro_batch_size * ranks)
    elif training.epochs > 0 and config.data.weights:
        samples = round(training.epochs * samples)
    return samples if config.data.weights else min(samples, loader.samples_per_epoch)


def _check_space(store: StatesCache, tokens: int) -> None:
    existing = next(path for path in (store.folder, *store.folder.absolute().parents) if path.exists())
    needed, free = tokens * store.token_bytes, shutil.disk_usage(existing).free
    logger.info("hidden states of %s tokens take up to %.3g GB; %.3g GB are free", f"{tokens:,}", needed / 1e9, free / 1e9)
    if needed > free and not len(store):
        raise UserError(
            f"{store.folder}: {needed / 1e9:.3g} GB of hidden states do not fit into the {free / 1e9:.3g} GB that are free; allowed: "
            "another states.hidden_states_path, states.dtype = int8, or a shorter training.num_steps"
        )


def _check_kept(source: CachedStates, store: StatesCache) -> None:
    if not source.keep:
        raise UserError(f"{store.folder}: the disk is full; what was written stays, and the same command goes on")


def _base(config: Config, base_config: DecoderConfig, dtype: torch.dtype, world: Distributed) -> nn.Module:
    base = get_model(config.base.arch, config.base.variant, config.base.path, dtype=dtype, device="meta")
    base.readout.drop_head()
    if world.tp_mesh is not None:
        apply_tp(base, arch_of(base_config), world.tp_mesh)
    apply_compile(config.compile.enabled, world.device, base.layers)
    apply_fsdp(base, nn.Module(), world.mesh, dtype, freeze_base=True)
    base.to_empty(device=world.device)
    fill_model(base, config.base.path)
    return base.eval()
