"""Trains a speculator for a base model, both together, or a base alone: the story of a run, from top to bottom.

torchrun -m spectitan.train --job.config_file train_configs/quickstart.toml
python -m spectitan.train --job.config_file train_configs/quickstart.toml      # one process

What a run is built of is in spectitan/run/, what it is built with in the packages beside it.
"""

import contextlib
import logging
import os
import signal
import time
from pathlib import Path

from torch import Tensor

from spectitan import heartbeat, program
from spectitan.config.tables import Config
from spectitan.distributed import utils
from spectitan.distributed.fsdp import resolve_compute_dtype, set_all_reduce, set_gradient_sync
from spectitan.distributed.mesh import Distributed, init_distributed
from spectitan.distributed.watchdog import Watchdog
from spectitan.errors import UserError
from spectitan.exporting import export_run
from spectitan.planning.show import show_plan
from spectitan.run.agreement import Agreement, agree
from spectitan.run.data import build_data
from spectitan.run.evaluating import Evaluator
from spectitan.run.finishing import finish_run
from spectitan.run.inputs import find_inputs
from spectitan.run.model import build_model
from spectitan.run.reports import build_reporter
from spectitan.run.state_sources import RunStates
from spectitan.signals import StopSignal
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.trained import open_checkpoint
from spectitan.training.allocator import trim_heap
from spectitan.training.checkpoint import saves_beside_training
from spectitan.training.intervals import is_due, next_due
from spectitan.training.optimizer import peak_learning_rates, step_if_finite
from spectitan.training.process import prepare_process
from spectitan.training.run_folder import RunFolder
from spectitan.training.schedule import learning_rate_multiplier
from spectitan.types import to_device

logger = logging.getLogger(__name__)


class Trainer:
    """One training run. Builds everything in the order of cost, so that mistakes show before expensive work."""

    def __init__(self, config: Config, world: Distributed, run_folder: RunFolder, watchdog: Watchdog):
        self.config, self.world, self.device, self.watchdog = config, world, world.device, watchdog
        compute_dtype = resolve_compute_dtype(config.training.compute_dtype, self.device)
        inputs = find_inputs(config, world, run_folder)
        self.data = build_data(config, inputs, world)
        self.model = build_model(config, inputs, world, compute_dtype)
        self.base, self.speculator, self.trained, self.objective, self.optimizer = self.model
        self.states = RunStates(config, inputs, self.data, self.model, world, compute_dtype)

        self.global_batch_size, self.accumulation, self.identity = inputs.global_batch_size, inputs.accumulation, inputs.identity
        self.checkpointer, self.checkpoint = inputs.checkpointer, inputs.checkpoint  # the newest of this run
        self.step = self.first_step = inputs.saved["step"]
        self.total_steps = self.data.total_steps
        if self.checkpoint:
            self.checkpointer.load(self.checkpoint, self.model.tensors())
            finished = ", the last: this run is finished" if self.step >= self.total_steps else f" of {self.total_steps}"
            logger.info("resumed from %s at step %d%s", self.checkpoint, self.step, finished)

        # The folder of an earlier run is touched when all that has gone well.
        run_folder.begin(config.to_toml(), config.checkpoint.resume)
        if world.rank == 0:
            self.speculator.write_files(run_folder.path)
        self.reporter = build_reporter(config, inputs, self.data, self.model, self.states, run_folder.path, world, compute_dtype)
        self.metrics = self.reporter.metrics
        self.evaluator = Evaluator(config, inputs, self.data, self.model, self.states.of_held_out, self.metrics, world)

    # ---- the loop ----

    def train(self, stop: StopSignal) -> None:
        """Trains to the last step, with checkpoints, reports and evaluations on the way.

        A stop signal lets the step in hand end, saves, and raises StopRequested. An evaluation may be cut short by it, and
        therefore comes after a checkpoint.
        """
        while True:
            if self.evaluator.is_due(self.step, self.checkpoint):
                self.watchdog.phase("evaluating")
                self.evaluator.evaluate(self.step, self.checkpoint)
            if self.step >= self.total_steps:
                break
            with stop.deferred():
                self._train_until(min(self.total_steps, next_due(self.step, self.data.eval_interval)), stop)

    def _train_until(self, last_step: int, stop: StopSignal) -> None:
        saved_at = self.step
        trim_heap()  # of what building or evaluating has left
        while self.step < last_step:
            compiles = self.step in (self.first_step, self.config.stage2.start_step)
            self.watchdog.step(self.step + 1, timed=not compiles)
            waited = time.perf_counter()
            samples = [next(self.data.loader) for _ in range(self.accumulation)]
            self.reporter.seconds_waiting += time.perf_counter() - waited
            batches = [self.states.trained_on.begin(sample) for sample in samples]
            targets = [self.objective.align(batch) for batch in batches]
            agreed = self._agree(samples, batches, targets, stop)
            if agreed.stopping:
                break
            self.reporter.sums.add_samples(agreed.targets, agreed.tokens_by_dataset, agreed.tokens, agreed.sample_hash)
            self._train_step(batches, targets, agreed.targets)
            self.step += 1
            self.watchdog.phase("reporting")
            self.metrics.advance(self.step)
            if compiles:
                trim_heap()
            if not agreed.writing:
                self._finish_save()
            if self.step % self.config.metrics.report_interval == 0 or self.step == self.total_steps:
                self._report()
            if agreed.saving or is_due(self.step, self.data.save_interval):
                self._save()
                saved_at = self.step
        if self.step != saved_at:
            self._save()
        self._finish_save()
        if utils.any_rank(stop.requested is not None):  # perhaps since the last step began: all end together, or none
            stop.requested = stop.requested or signal.SIGTERM

    def _agree(self, samples: list, batches: list, targets: list, stop: StopSignal) -> Agreement:
        # Cleared before it is acted on: a signal that arrives in between counts for the next step.
        save_requested, stop.save_requested = stop.save_requested, False
        self.watchdog.mark()
        agreed = agree(
            samples, batches, targets, len(self.data.loader.datasets),
            stopping=stop.requested is not None, saving=save_requested, writing=not self.checkpointer.written,
        )  # fmt: skip
        self.watchdog.mark()
        return agreed

    def _train_step(self, batches: list, targets: list, denominators: Tensor) -> None:
        self.optimizer.zero_grad()
        denominators = to_device(denominators, self.device)
        for i, (batch, target) in enumerate(zip(batches, targets)):
            set_gradient_sync([self.speculator], enabled=i == len(batches) - 1)
            set_all_reduce(self.base, self.base.readout, enabled=i == len(batches) - 1)
            heartbeat.beat()
            batch, target = batch.to(self.device), target.to(self.device)
            states = self.states.trained_on.states(batch)
            loss = self.objective(batch, states, target, denominators, self.base.readout)
            utils.backward(loss.total)
            self.reporter.sums.add_losses(loss.sums, self.step + 1)
        max_norm = self.config.training.max_grad_norm
        self.grad_norms = {name: utils.clip_grad_norm(part.parameters(), max_norm) for name, part in self.trained.items()}
        multiplier = learning_rate_multiplier(self.step, self.total_steps, self.config.lr_scheduler, self.config.stage2.start_step)
        self.learning_rates = {name: multiplier * peak for name, peak in peak_learning_rates(self.trained, self.config.optimizer).items()}
        self.reporter.sums.add_step(step_if_finite(self.optimizer, multiplier, *self.grad_norms.values()))

    def _report(self) -> None:
        try:
            self.reporter.report(self.step, self.learning_rates, self.grad_norms)
        except (UserError, OSError):  # of all ranks
            self._finish_save()
            raise

    # ---- checkpoints ----

    def _save(self) -> None:
        self._finish_save()
        self.watchdog.phase("saving")
        self.reporter.refuse_bad()
        state = {"position": self.step * self.global_batch_size, "identity": self.identity, "data": self.data.loader.fingerprints}
        state["report"] = self.reporter.sums.state()
        if saves_beside_training(self.config.checkpoint.async_mode, self.device):
            self.checkpointer.begin(self.step, self.model.tensors(), state)
        else:
            self._saved(self.checkpointer.save(self.step, self.model.tensors(), state))

    def _finish_save(self) -> None:
        """Waits for a checkpoint that is being written, if there is one."""
        if self.checkpointer.under_way:
            self.watchdog.phase("saving")
            self._saved(self.checkpointer.finish())

    def _saved(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        logger.info("saved %s", checkpoint)

    # ---- the end ----

    def finish(self) -> None:
        """Evaluates and exports, unless an earlier start of this run has done so."""
        self.watchdog.phase("evaluating and exporting", no_collectives=True)
        utils.on_main(lambda: finish_run(self.config, self.checkpoint, self.evaluator.measurable))

    def export_untrained(self) -> None:
        """`job.init_only`: the run's first checkpoint, of step 0, and its export."""
        if self.checkpoint is None:
            self._save()
            self._finish_save()
        utils.on_main(lambda: export_run(self.config, open_checkpoint(self.checkpoint)))


def train(config: Config, stop: StopSignal) -> None:
    if config.job.plan:
        return show_plan(config) if os.environ.get("RANK", "0") == "0" else None
    prepare_process(config.job)
    parallelism = config.parallelism
    world = init_distributed(
        parallelism.sharding_strategy, tp_size=parallelism.tp_size,
        dp_replicate=parallelism.dp_replicate, shard_speculator=parallelism.shard_speculator,
    )  # fmt: skip
    try:
        with contextlib.closing(RunFolder(Path(config.job.dump_folder), config.checkpoint.folder)) as run_folder:
            with Watchdog(config.job.timeout, "spectitan.train", gpu=world.device.type == "cuda") as watchdog:
                trainer = Trainer(config, world, run_folder, watchdog)
                with contextlib.closing(trainer.metrics), contextlib.closing(trainer.states):
                    if config.job.init_only:
                        trainer.export_untrained()
                        return
                    trainer.train(stop)
                trainer.finish()
    finally:
        world.close()


def main(argv: list[str] | None = None) -> int:
    return program.run("train", train, argv, SPECULATOR_CONFIGS)


if __name__ == "__main__":
    program.end(main())
