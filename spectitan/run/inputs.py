"""What a run starts from, found before any work: mistakes in keys and files show here."""

import logging
from pathlib import Path
from typing import NamedTuple

from spectitan.config.tables import Config
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import Tokenizer, load_tokenizer
from spectitan.data.validation import check_seq_length, check_steps_fit
from spectitan.decoding.acceptance import draft_length, select_prompts, tree_settings
from spectitan.distributed import utils
from spectitan.distributed.mesh import Distributed
from spectitan.distributed.tensor_parallel import check_tensor_parallel
from spectitan.errors import UserError
from spectitan.models.decoder import DecoderConfig
from spectitan.models.families import arch_of
from spectitan.models.hf_config import hf_class
from spectitan.models.registry import choose_config
from spectitan.models.weights import fingerprint, resolve_base_path
from spectitan.run.folders import check_export, folders_to_write, paths_to_read
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import new_speculator
from spectitan.speculators.serving import choose_format, has_weights
from spectitan.states.continued import prompts_per_sample
from spectitan.states.sources import hidden_states_folder, open_store
from spectitan.states.store import Store
from spectitan.trained import check_base, family_keys, find_trained, open_checkpoint, read_speculator
from spectitan.training.batch_layout import batch_layout, check_batch_fits
from spectitan.training.checkpoint import Checkpointer, check_is_new, checkpoints_folder
from spectitan.training.checkpoint_reading import find_checkpoint, read_state
from spectitan.training.identity import check_identity, run_identity
from spectitan.training.loggers import check_loggers
from spectitan.training.run_folder import RunFolder, check_can_be_moved, check_can_be_written

logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """Of one run; the speculator is whole, on the CPU."""

    global_batch_size: int  # samples in an optimizer step over all ranks
    accumulation: int  # micro-batches of a rank in it
    prompts_per_sample: int  # of stage 2
    base_path: Path
    base_config: DecoderConfig
    base_weights: str  # their fingerprint, or "random"
    tokenizer: Tokenizer
    speculator: Speculator
    fine_tunes: bool  # the speculator has its weights already
    store: Store | None  # of hidden states
    prompts: list[list[int]]  # that acceptance is measured on
    checkpointer: Checkpointer
    checkpoint: Path | None  # to go on from
    saved: dict  # its state
    identity: dict[str, object]  # of the run: every key, and what its base is


def find_inputs(config: Config, world: Distributed, run_folder: RunFolder) -> Inputs:
    """All that can be found and refused without work: the layout of a batch, the base's files, the checkpoint to go on from.

    Locks the run's folder, if there is one. With speculator.path, `config` takes the keys of the speculator that is there.

    Raises:
        UserError: keys or files that do not fit together.
    """
    global_batch_size, accumulation = batch_layout(config.training, world.world_size)
    utils.on_main(lambda: check_loggers(config.metrics.loggers))
    base_path = resolve_base_path(config.base.path)
    base_config = choose_config(config.base.arch, config.base.variant, base_path)
    check_tensor_parallel(arch_of(base_config), base_config, config.parallelism.tp_size)
    tokenizer = load_tokenizer(base_path, base_config.vocab_size)
    check_seq_length(config.data, base_config.max_position_embeddings)
    checkpointer = _open_folders(config, base_path, run_folder)
    checkpoint = _starting_point(config, checkpointer)
    saved = read_state(checkpoint) if checkpoint else {"step": 0, "position": 0}
    base_weights = "random" if config.base.init == "random" else fingerprint(base_path, base_config)
    speculator, fine_tunes = _make_speculator(config, base_config, base_weights, checkpoint)
    speculator.check_device(world.device)
    check_steps_fit(config.data, speculator.steps)
    store = _open_store(config, base_config, base_weights, speculator.taps)
    if config.export.format not in ("hf", "none") and config.speculator.type != "none":
        choose_format(speculator, config.export.format)
        hf_class(base_path)  # which the export names: base.variant may have made its config.json unnecessary until then
    prompts_of_each, sample_tokens = 1, config.data.seq_length
    if config.stage2.start_step >= 0:
        prompts_of_each = prompts_per_sample(
            config.stage2, global_batch_size, config.data.seq_length, base_config.max_position_embeddings, speculator.steps
        )
        sample_tokens = max(sample_tokens, prompts_of_each * (config.stage2.prompt_length + config.stage2.seq_length))
    check_batch_fits(global_batch_size, world.world_size, sample_tokens, speculator.steps)
    prompts = _prompts(config, tokenizer, base_config, speculator)
    identity = run_identity(config, base_config.identity(), base_weights, tokenizer.fingerprint) | speculator.identity()
    identity |= {"base.arch": arch_of(base_config), "training.global_batch_size": global_batch_size}
    identity["stage2.batch_size"] = global_batch_size * prompts_of_each
    if checkpoint:
        check_identity(saved["identity"], identity)
    return Inputs(
        global_batch_size, accumulation, prompts_of_each, base_path, base_config, base_weights, tokenizer, speculator, fine_tunes, store,
        prompts, checkpointer, checkpoint, saved, identity,
    )  # fmt: skip


def _open_folders(config: Config, base_path: Path, run_folder: RunFolder) -> Checkpointer:
    """Checks every folder that is to be written or moved, and locks the run's own."""
    for key, path in folders_to_write(config).items():
        check_can_be_written(key, path)
    check_export(config, base_path)
    anew = config.checkpoint.resume == "never"
    if anew:
        check_can_be_moved(run_folder.path, paths_to_read(config))
    run_folder.lock()
    checkpoints = checkpoints_folder(config.checkpoint, run_folder.path)
    if anew and config.checkpoint.folder:
        check_is_new(checkpoints)
    return Checkpointer(checkpoints, config.checkpoint.keep_latest_k)


def _starting_point(config: Config, checkpointer: Checkpointer) -> Path | None:
    """The checkpoint to go on from: this run's newest valid one, else checkpoint.load_path's, else none."""
    own = checkpointer.newest_valid() if config.checkpoint.resume == "auto" else None
    if own or not config.checkpoint.load_path:
        return own
    # Another run may still save there: ranks that looked each for itself could go on from different steps.
    return utils.on_main(lambda: find_checkpoint(config.checkpoint.load_path))


def _make_speculator(config: Config, base_config: DecoderConfig, base_weights: str, checkpoint: Path | None) -> tuple[Speculator, bool]:
    """A new one, or with speculator.path the one there, whose keys it takes; and whether it has its weights.

    A run that goes on has its keys in its checkpoint.
    """
    if config.speculator.path:
        trained = open_checkpoint(checkpoint) if checkpoint else find_trained(config)
        if trained.keys:  # no folder, but perhaps the newest of a run that has saved another since
            trained = utils.broadcast(trained)
        config.adopt_speculator(*family_keys(trained), source=str(trained.path))
        if not checkpoint:
            check_base(config, trained, base_weights)
        if trained.keys or has_weights(trained.path):
            if not checkpoint:
                logger.info("starting from the speculator in %s, with a new optimizer", trained.path)
            speculator = read_speculator(trained, base_config, config.objective, config.speculator)
            speculator.check_given(config.speculator, config.given_in("speculator"))
            return speculator, True
        logger.info("%s has no weights: a new speculator of the shape in its config.json", trained.path)
    return new_speculator(config.speculator.type, config.speculator, base_config, config.objective), False


def _open_store(config: Config, base_config: DecoderConfig, base_weights: str, taps: tuple[int, ...]) -> Store | None:
    """What states.source = offline or hybrid reads; refuses it if it is of another base or other layers."""
    if config.states.noise_std and not taps:
        given = f"states.noise_std = {config.states.noise_std:g}"
        raise UserError(f"{given}: {config.speculator.type} reads the final state alone, which is left as it is; allowed: 0")
    if config.states.source == "online":
        return None
    folder = hidden_states_folder(config.states, config.job.dump_folder)
    return open_store(
        config.states, folder, base=base_weights, taps=taps, num_layers=base_config.num_layers, hidden_size=base_config.hidden_size,
        allow_other=config.base.allow_other,
    )  # fmt: skip


def _prompts(config: Config, tokenizer: Tokenizer, base_config: DecoderConfig, speculator: Speculator) -> list[list[int]]:
    if config.eval.prompts == "none" or config.speculator.type == "none":
        return []
    prompts = load_prompts(config.eval.prompts, tokenizer)
    select_prompts(prompts, config.eval, base_config)
    draft_length(speculator, config.eval)
    tree_settings(speculator, config.eval, base_config.vocab_size)
    return prompts
