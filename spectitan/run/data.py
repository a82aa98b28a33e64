"""What a run trains on, for how many steps, and the held-out text beside it."""

from fractions import Fraction
from typing import NamedTuple

import torch

from spectitan.config.tables import Config
from spectitan.data.loader import Loader, build_loader, sample_place
from spectitan.data.validation import HeldOut, read_held_out
from spectitan.distributed.mesh import Distributed
from spectitan.errors import UserError
from spectitan.run.inputs import Inputs
from spectitan.states.document_files import DocumentFiles
from spectitan.states.sources import check_complete, on_missing, samples_of_run
from spectitan.states.store import Store
from spectitan.training.identity import warn_of_other_text
from spectitan.training.intervals import steps_of, steps_of_run


class RunData(NamedTuple):
    loader: Loader
    held_out: HeldOut
    total_steps: int
    save_interval: Fraction | int  # steps
    eval_interval: Fraction | int  # steps


def build_data(config: Config, inputs: Inputs, world: Distributed) -> RunData:
    """Tokenises, unless that has been done, and begins where the run's checkpoint ends.

    Raises:
        UserError: text that cannot be read, keys that do not fit it; offline, hidden states that are missing.
    """
    micro_batch_size, position = config.training.micro_batch_size, inputs.saved["position"]
    loader = build_loader(
        config.data, inputs.tokenizer, seed=config.job.seed, global_batch_size=inputs.global_batch_size,
        micro_batch_size=micro_batch_size, rank=world.rank, world_size=world.world_size, position=position,
    )  # fmt: skip
    warn_of_other_text(inputs.saved.get("data", {}), loader.fingerprints)
    epoch = loader.samples_per_epoch, inputs.global_batch_size
    total_steps = config.training.num_steps
    if total_steps == -1:
        total_steps = steps_of_run(config.training.epochs, *epoch)
    if config.stage2.start_step >= total_steps:
        raise UserError(f"stage2.start_step = {config.stage2.start_step}; allowed: below the run's {total_steps} steps")
    save_every, evaluate_every = (
        None if table.interval_epochs == -1 else steps_of(table.interval_epochs, *epoch) for table in (config.checkpoint, config.eval)
    )
    save_interval, eval_interval = save_every or config.checkpoint.interval, evaluate_every or config.eval.interval or total_steps
    data = RunData(
        loader, read_held_out(config.data, inputs.tokenizer, config.eval.loss_samples, micro_batch_size), total_steps,
        save_interval, eval_interval,
    )  # fmt: skip
    if config.states.source == "offline":
        _check_store(config, inputs.store, data, range(position, total_steps * inputs.global_batch_size))
    return data


def _check_store(config: Config, store: Store, data: RunData, places: range) -> None:
    """Without a base: says which samples of the run have no states, before the work begins.

    Args:
        places: in the global order, of the samples still to come.
    """
    loader, held_out = data.loader, data.held_out
    if isinstance(store, DocumentFiles) and len(loader.samples) == 1:
        store.rows_of = loader.samples[0]
    check_complete(
        store, loader.samples, samples_of_run(loader.order, places.start, places.stop), loader.datasets, on_missing(config.states)
    )
    if data.eval_interval < data.total_steps or config.checkpoint.save_best != "none":
        ids = torch.cat([batch.sample_ids for batch in held_out.batches]).tolist() if held_out.batches else []
        names = ["held-out text"] * len(held_out.samples)
        check_complete(store, held_out.samples, [sample_place(each) for each in ids], names, on_missing(config.states))
