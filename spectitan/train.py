"""Trains a speculator for a base model, both together, or a base alone: the loop, readable from top to bottom.

torchrun -m spectitan.train --job.config_file train_configs/quickstart.toml
python -m spectitan.train --job.config_file train_configs/quickstart.toml      # one process
"""

import contextlib
import copy
import logging
import os
import signal
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from spectitan import heartbeat, program
from spectitan.config.manager import Config
from spectitan.config.run_name import fill_run_name
from spectitan.data.loader import SAMPLE_BITS, build_loader, sample_place
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import load_tokenizer
from spectitan.data.validation import check_seq_length, read_held_out
from spectitan.decoding.acceptance import draft_length, select_prompts, tree_settings
from spectitan.decoding.heldout import heldout_report, heldout_sums
from spectitan.distributed import utils
from spectitan.distributed.fsdp import apply_fsdp, master_dtype, resolve_compute_dtype, set_all_reduce, set_gradient_sync
from spectitan.distributed.mesh import Distributed, init_distributed
from spectitan.distributed.tensor_parallel import apply_tp, check_tensor_parallel
from spectitan.distributed.watchdog import Watchdog
from spectitan.errors import UserError
from spectitan.evaluation import checkpoint_acceptance
from spectitan.exporting import export_run
from spectitan.finishing import check_export, finish_run, folders_to_write, paths_to_read
from spectitan.keyed_random import hash_keys
from spectitan.models.decoder import DecoderConfig
from spectitan.models.families import arch_of
from spectitan.models.registry import choose_config, fill_model, get_model
from spectitan.models.weights import fingerprint, resolve_base_path
from spectitan.objectives.mixture_pass import compile_mixtures
from spectitan.planning.plan import plan_run
from spectitan.planning.report import check_fits, describe
from spectitan.signals import StopSignal
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import SPECULATOR_CONFIGS, build_objective, new_speculator
from spectitan.speculators.serving import choose_format, has_weights
from spectitan.states.cache import FINAL
from spectitan.states.cached import CachedStates, Store
from spectitan.states.continued import ContinuedStates, prompts_per_sample
from spectitan.states.document_files import DocumentFiles
from spectitan.states.noisy import NoisyStates
from spectitan.states.online import OnlineStates
from spectitan.states.sources import check_complete, hidden_states_folder, open_store, samples_of_run
from spectitan.trained import check_base, family_keys, find_trained, open_checkpoint, read_speculator
from spectitan.training.activation_checkpointing import apply_activation_checkpointing
from spectitan.training.allocator import use_huge_pages
from spectitan.training.batch_layout import batch_layout
from spectitan.training.best import Best
from spectitan.training.checkpoint import Checkpointer, check_is_new, checkpoints_folder, find_checkpoint, module_tensors, read_state
from spectitan.training.compile import apply_compile
from spectitan.training.identity import check_identity, run_identity, warn_of_other_text
from spectitan.training.intervals import is_due, next_due, steps_of, steps_of_run
from spectitan.training.loggers import check_loggers
from spectitan.training.metrics import MetricsLogger
from spectitan.training.optimizer import build_optimizer, optimizer_tensors, peak_learning_rates, step_if_finite
from spectitan.training.reporter import Reporter
from spectitan.training.run_folder import RunFolder, check_can_be_moved, check_can_be_written
from spectitan.training.schedule import learning_rate_multiplier
from spectitan.types import to_device

logger = logging.getLogger(__name__)


class Trainer:
    """One training run. Builds everything in the order of cost, so that mistakes show before expensive work."""

    def __init__(self, config: Config, world: Distributed, run_folder: RunFolder, watchdog: Watchdog):
        self.config, self.world, self.device, self.watchdog = config, world, world.device, watchdog
        self.folder = run_folder.path
        self.compute_dtype = resolve_compute_dtype(config.training.compute_dtype, self.device)

        # What is checked without work: the layout of a batch, the base's files, the checkpoint to go on from.
        ranks, micro_batch_size = world.world_size, config.training.micro_batch_size
        self.global_batch_size, self.accumulation = batch_layout(config.training, ranks)
        utils.on_main(lambda: check_loggers(config.metrics.loggers))
        self.base_path = resolve_base_path(config.base.path)
        base_config = choose_config(config.base.arch, config.base.variant, self.base_path)
        check_tensor_parallel(arch_of(base_config), base_config, config.parallelism.tp_size)
        self.tokenizer = load_tokenizer(self.base_path, base_config.vocab_size)
        check_seq_length(config.data, base_config.max_position_embeddings)
        for key, path in folders_to_write(config).items():
            check_can_be_written(key, path)
        check_export(config, self.base_path)
        if config.checkpoint.resume == "never":
            check_can_be_moved(self.folder, paths_to_read(config))
        run_folder.lock()
        checkpoints = checkpoints_folder(config.checkpoint, self.folder)
        if config.checkpoint.resume == "never" and config.checkpoint.folder:
            check_is_new(checkpoints)
        self.checkpointer = Checkpointer(checkpoints, config.checkpoint.keep_latest_k)
        self.checkpoint = self._starting_point()  # the newest of this run
        saved = read_state(self.checkpoint) if self.checkpoint else {"step": 0, "position": 0}
        base_weights = "random" if config.base.init == "random" else fingerprint(self.base_path, base_config)
        self.speculator = self._make_speculator(base_config, base_weights)
        self.speculator.check_device(self.device)
        self.store = self._open_store(base_config, base_weights)
        if config.export.format not in ("hf", "none") and config.speculator.type != "none":
            choose_format(self.speculator, config.export.format)
        self.prompts_per_sample = 1
        if config.stage2.start_step >= 0:
            self.prompts_per_sample = prompts_per_sample(
                config.stage2, self.global_batch_size, config.data.seq_length, base_config.max_position_embeddings, self.speculator.steps
            )
        self.prompts = []
        if config.eval.prompts != "none" and config.speculator.type != "none":
            self.prompts = load_prompts(config.eval.prompts, self.tokenizer)
            select_prompts(self.prompts, config.eval, base_config)
            draft_length(self.speculator, config.eval)
            tree_settings(self.speculator, config.eval, base_config.vocab_size)
        self.identity = self._identity(base_config, base_weights)
        if self.checkpoint:
            check_identity(saved["identity"], self.identity)
        self.step = self.first_step = saved["step"]

        # What costs: tokenising, then the model. The folder of an earlier run is touched when all that has gone well.
        self.loader = build_loader(
            config.data, self.tokenizer, seed=config.job.seed, global_batch_size=self.global_batch_size,
            micro_batch_size=micro_batch_size, rank=world.rank, world_size=ranks, position=saved["position"],
        )  # fmt: skip
        warn_of_other_text(saved.get("data", {}), self.loader.fingerprints)
        self.batches = iter(self.loader)
        self.total_steps = config.training.num_steps
        if self.total_steps == -1:
            self.total_steps = steps_of_run(config.training.epochs, self.loader.samples_per_epoch, self.global_batch_size)
        if config.stage2.start_step >= self.total_steps:
            raise UserError(f"stage2.start_step = {config.stage2.start_step}; allowed: below the run's {self.total_steps} steps")
        by_epochs = [
            None if table.interval_epochs == -1 else self._steps_of(table.interval_epochs) for table in (config.checkpoint, config.eval)
        ]
        self.save_interval = by_epochs[0] or config.checkpoint.interval
        self.eval_interval = by_epochs[1] or config.eval.interval or self.total_steps
        held_out = read_held_out(config.data, self.tokenizer, config.eval.loss_samples, micro_batch_size)
        self.validation, self.held_out_samples = held_out.batches, held_out.samples
        if config.states.source == "offline":
            self._check_store(saved["position"])

        self._build_model()
        if self.checkpoint:
            self.checkpointer.load(self.checkpoint, self._tensors())
            finished = ", the last: this run is finished" if self.step >= self.total_steps else f" of {self.total_steps}"
            logger.info("resumed from %s at step %d%s", self.checkpoint, self.step, finished)
        run_folder.begin(config.to_toml(), config.checkpoint.resume)
        if world.rank == 0:
            self.speculator.write_files(self.folder)
        self.metrics = MetricsLogger(
            config.metrics, self.folder, total_steps=self.total_steps, start_step=self.step, about=self.identity,
            run_name=fill_run_name(
                config.job.run_name, speculator=config.speculator.type, base=Path(config.base.path).name, seed=config.job.seed
            ),
        )  # fmt: skip
        self.best = None
        if config.checkpoint.save_best != "none":
            self.best = Best(config.checkpoint.save_best, self.checkpointer.folder, self.metrics.evaluations)
            self.checkpointer.protected = self.best.checkpoint
        self.reporter = Reporter(
            self.metrics, self.objective.rows, self.objective.metrics, self.loader.datasets, self.loader.reasons,
            self._work, master_dtype(self.compute_dtype), self.device, self.step,
            state_counts=self.states_of_text.take_counts if self.store is not None else None,
        )  # fmt: skip
        if "report" in saved:
            self.reporter.sums.load(saved["report"])

    def _steps_of(self, epochs: float) -> Fraction:
        return steps_of(epochs, self.loader.samples_per_epoch, self.global_batch_size)

    def _starting_point(self) -> Path | None:
        """The checkpoint to go on from: this run's newest valid one, else checkpoint.load_path's, else none."""
        config = self.config.checkpoint
        own = self.checkpointer.newest_valid() if config.resume == "auto" else None
        return own if own or not config.load_path else find_checkpoint(config.load_path)

    def _identity(self, base_config: DecoderConfig, base_weights: str) -> dict[str, object]:
        identity = run_identity(self.config, base_config.identity(), base_weights, self.tokenizer.fingerprint)
        identity |= self.speculator.identity()
        identity["base.arch"] = arch_of(base_config)
        prompts = self.global_batch_size * self.prompts_per_sample
        return identity | {"training.global_batch_size": self.global_batch_size, "stage2.batch_size": prompts}

    def _make_speculator(self, base_config: DecoderConfig, base_weights: str) -> Speculator:
        """A new one, or with speculator.path the one there, whose keys it takes. A run that goes on has its keys in its checkpoint."""
        config, self.fine_tunes = self.config, False
        if config.speculator.path:
            trained = open_checkpoint(self.checkpoint) if self.checkpoint else find_trained(config)
            config.adopt_speculator(*family_keys(trained), source=str(trained.path))
            if not self.checkpoint:
                check_base(config, trained, base_weights)
                if not trained.keys and not has_weights(trained.path):
                    logger.info("%s has no weights: a new speculator of the shape in its config.json", trained.path)
                    return new_speculator(config.speculator.type, config.speculator, base_config, config.objective)
                logger.info("starting from the speculator in %s, with a new optimizer", trained.path)
                self.fine_tunes = True
                return read_speculator(trained, base_config, config.objective, config.speculator)
        return new_speculator(config.speculator.type, config.speculator, base_config, config.objective)

    def _open_store(self, base_config: DecoderConfig, base_weights: str) -> Store | None:
        """What states.source = offline or hybrid reads; refuses it if it is of another base or other layers."""
        config, taps = self.config, self.speculator.taps
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

    def _check_store(self, position: int) -> None:
        """Without a base: says which samples of the run have no states, before the work begins."""
        loader, on_missing = self.loader, self.config.states.on_missing
        on_missing = "raise" if on_missing == "auto" else on_missing
        if isinstance(self.store, DocumentFiles) and len(loader.samples) == 1:
            self.store.rows_of = loader.samples[0]
        samples = samples_of_run(loader.order, position, self.total_steps * self.global_batch_size)
        check_complete(self.store, loader.samples, samples, loader.datasets, on_missing)
        if self.eval_interval < self.total_steps or self.config.checkpoint.save_best != "none":
            ids = torch.cat([batch.sample_ids for batch in self.validation]).tolist() if self.validation else []
            names = ["held-out text"] * len(self.held_out_samples)
            check_complete(self.store, self.held_out_samples, [sample_place(each) for each in ids], names, on_missing)

    def _build_model(self) -> None:
        config = self.config
        dtype = self.compute_dtype if config.base.freeze else master_dtype(self.compute_dtype)
        self.base = get_model(config.base.arch, config.base.variant, self.base_path, init=config.base.init, dtype=dtype, device="meta")
        if self.speculator.needs_base_head and not self.base.readout.plain_head:
            raise UserError(
                f"{self.base_path}: this base scales, caps or biases its logits, and the speculator or its loss asks for the head alone; "
                'allowed: speculator.type = mlp or lstm with objective.loss = "ce"'
            )
        if config.base.freeze and config.stage2.start_step < 0 and not self.speculator.needs_base_head:
            self.base.readout.drop_head()
        if config.states.source == "offline":
            self.base.drop_layers()
        if config.speculator.type != "none" and not self.fine_tunes:
            self.speculator.init_weights(torch.Generator().manual_seed(config.job.seed))
        self.speculator.to(self.device)
        if self.world.tp_mesh is not None:
            apply_tp(self.base, arch_of(self.base.config), self.world.tp_mesh)
        if config.base.activation_checkpointing:
            apply_activation_checkpointing(self.base.layers)
        # transformers' own code runs as it is. A base that is split and trained, too: compiled, its gradients are wrong (torch 2.13).
        eager = config.base.arch == "hf" or (self.world.tp_mesh is not None and not config.base.freeze)
        blocks = [] if eager else self.base.layers
        compile_mixtures(apply_compile(config.compile.enabled, self.device, blocks, self.speculator.backbone()))
        apply_fsdp(
            self.base, self.speculator, self.world.mesh, self.compute_dtype,
            freeze_base=config.base.freeze, speculator_mesh=self.world.speculator_mesh,
        )  # fmt: skip
        self.base.to_empty(device=self.device)  # from here on a rank holds its share, and reads no more than that
        fill_model(self.base, self.base_path, config.base.init, config.job.seed)
        if not self.fine_tunes:
            self.speculator.init_from_base(self.base.readout)
        self._build_sources()
        self.trained = nn.ModuleDict({"speculator": self.speculator} if config.speculator.type != "none" else {})
        if not config.base.freeze:
            self.trained["base"] = self.base
        self.objective = build_objective(self.speculator, self.base.config, config.objective, config.training, config.base.freeze)
        self.optimizer = build_optimizer(
            self.trained, config.optimizer, {f"speculator.{name}" for name in self.speculator.inner_matrices()}
        )

    def _build_sources(self) -> None:
        """Where states come from: of the text, of held-out text, and of what is trained on, with stage 2's own text and with noise."""
        config, layers = self.config, self.speculator.taps
        if isinstance(self.store, DocumentFiles):
            self.store.check_norm(self.base.readout.norm)
        if self.store is not None:
            layers = tuple(column for column in self.store.columns if column != FINAL)
        online = OnlineStates(self.base, layers, config.base.freeze)
        self.states_of_text = self.states_of_held_out = online
        if self.store is not None:
            self.states_of_text = self._cached_states(online, self.loader.samples, keep=True)
            self.states_of_held_out = self._cached_states(online, self.held_out_samples, keep=self.world.rank == 0)  # all run all of them
        self.source, self.stage2 = self.states_of_text, None
        if config.stage2.start_step >= 0:
            self.source = self.stage2 = ContinuedStates(
                self.states_of_text, config.stage2, first_sample=config.stage2.start_step * self.global_batch_size,
                prompts=self.prompts_per_sample, steps=self.speculator.steps, seed=config.job.seed,
                online=OnlineStates(self.base, self.speculator.taps, frozen=True),
            )  # fmt: skip
        if config.states.noise_std:
            self.source = NoisyStates(self.source, config.states.noise_std, config.job.seed)

    def _cached_states(self, online: OnlineStates, samples: list, keep: bool) -> CachedStates:
        states = self.config.states
        return CachedStates(
            self.store, samples, self.speculator.taps, self.base.readout, self.compute_dtype, self.device,
            online=online if states.source == "hybrid" else None,
            keep=keep and states.source == "hybrid" and states.on_generate == "cache",
            on_missing="raise" if states.on_missing == "auto" else states.on_missing,
        )  # fmt: skip

    def close(self) -> None:
        """Makes durable what was cached."""
        for source in (self.states_of_text, self.states_of_held_out):
            if isinstance(source, CachedStates):
                try:
                    source.close()
                except OSError as error:
                    logger.warning("what was cached last is not sure to be on the disk: %s: %s", source.store.folder, error.strerror)

    def _tensors(self) -> dict[str, Tensor]:
        return module_tensors(self.trained) | {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}

    # ---- the loop ----

    def train(self, stop: StopSignal) -> None:
        """Trains to the last step, with checkpoints, reports and evaluations on the way.

        A stop signal lets the step in hand end, saves, and raises StopRequested. An evaluation may be cut short by it, and
        therefore comes after a checkpoint.
        """
        while True:
            if self._to_evaluate():
                self.evaluate()
            if self.step >= self.total_steps:
                break
            with stop.deferred():
                self._train_until(min(self.total_steps, next_due(self.step, self.eval_interval)), stop)

    def _to_evaluate(self) -> bool:
        """Whether the checkpoint of this run's newest step is due for evaluation and has none, perhaps because a stop cut it short.

        The last is measured for the report, which comes from elsewhere; here only to be compared with the others.
        """
        if self.checkpoint is None or self.step == 0 or self.checkpoint.parent != self.checkpointer.folder:
            return False
        due = is_due(self.step, self.eval_interval) if self.step < self.total_steps else self.best is not None
        return due and all(record["step"] != self.step for record in self.metrics.evaluations)

    def _train_until(self, last_step: int, stop: StopSignal) -> None:
        saved_at = self.step
        while self.step < last_step:
            # The first step compiles, and so does the first of the second stage.
            self.watchdog.step(self.step + 1, timed=self.step not in (self.first_step, self.config.stage2.start_step))
            waited = time.perf_counter()
            samples = [next(self.batches) for _ in range(self.accumulation)]
            self.reporter.seconds_waiting += time.perf_counter() - waited
            batches = [self.source.begin(sample) for sample in samples]
            targets = [self.objective.align(batch) for batch in batches]
            denominators, stopping, saving, written = self._agree(samples, batches, targets, stop)
            if stopping:
                stop.requested = stop.requested or signal.SIGTERM  # another rank's: all end together
                break
            self._train_step(batches, targets, denominators)
            self.step += 1
            self.watchdog.phase("reporting")
            self.metrics.advance(self.step)
            if written:
                self._finish_save()
            if self.step % self.config.metrics.report_interval == 0 or self.step == self.total_steps:
                self._report()
            if saving or is_due(self.step, self.save_interval):
                self._save()
                saved_at = self.step
        if self.step != saved_at:
            self._save()
        self._finish_save()

    def _agree(self, samples: list, batches: list, targets: list, stop: StopSignal) -> tuple[Tensor, bool, bool, bool]:
        """One sum over ranks, on the host: the global count of each step's targets, whether anyone was asked to stop or save,
        whether all have written their part of a checkpoint, and what this step's report says of the data."""
        counts = sum(target.counts for target in targets)
        sample_hash = sum(hash_keys(0, sample.index, sample.sample_ids).sum() for sample in samples)
        datasets = torch.cat([(batch.sample_ids >> SAMPLE_BITS).repeat_interleave(batch.loss_mask.sum(1)) for batch in batches])
        by_dataset = torch.bincount(datasets, minlength=len(self.loader.datasets))
        tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches)
        # Cleared before it is acted on: a signal that arrives in between counts for the next step.
        save_requested, stop.save_requested = stop.save_requested, False
        flags = torch.tensor([stop.requested is not None, save_requested, not self.checkpointer.written, sample_hash, tokens])
        self.watchdog.mark()
        summed = utils.sum_over_ranks(torch.cat([flags, counts, by_dataset]))
        self.watchdog.mark()
        (stopping, saving, writing, sample_hash, tokens), summed = summed[:5].tolist(), summed[5:]
        counts, by_dataset = summed[: len(counts)], summed[len(counts) :]
        if not stopping:
            self.reporter.sums.add_samples(counts, by_dataset, tokens=tokens, sample_hash=sample_hash)
        return counts, bool(stopping), bool(saving), not writing

    def _train_step(self, batches: list, targets: list, denominators: Tensor) -> None:
        self.optimizer.zero_grad()
        denominators = to_device(denominators, self.device)
        for i, (batch, target) in enumerate(zip(batches, targets)):
            set_gradient_sync([self.speculator], enabled=i == len(batches) - 1)
            set_all_reduce(self.base, self.base.readout, enabled=i == len(batches) - 1)
            heartbeat.beat()
            batch, target = batch.to(self.device), target.to(self.device)
            states = self.source.states(batch)
            loss = self.objective(batch, states, target, denominators, self.base.readout)
            utils.backward(loss.total)
            self.reporter.sums.add_losses(loss.sums, self.step + 1)
        max_norm = self.config.training.max_grad_norm
        self.grad_norms = {name: utils.clip_grad_norm(part.parameters(), max_norm) for name, part in self.trained.items()}
        multiplier = learning_rate_multiplier(self.step, self.total_steps, self.config.lr_scheduler, self.config.stage2.start_step)
        self.learning_rates = {name: multiplier * peak for name, peak in peak_learning_rates(self.trained, self.config.optimizer).items()}
        self.reporter.sums.add_step(step_if_finite(self.optimizer, multiplier, *self.grad_norms.values()))

    # ---- checkpoints and evaluation ----

    def _work(self, first_step: int, last_step: int, targets_per_step: list[int], tokens: int) -> int:
        """Useful floating-point operations of the steps first_step .. last_step - 1 on so many tokens, padding left out; a trained
        base counts three times, for its backward."""
        start, continued_tokens, flops = self.config.stage2.start_step, 0, 0
        continued = last_step - min(max(start, first_step), last_step) if start >= 0 else 0
        if continued:
            continued_tokens, flops = self.stage2.work(continued * self.global_batch_size)
        of_text = self.base.flops(tokens - continued_tokens, self.config.data.seq_length)
        if self.store is not None:
            of_text = int(of_text * self.states_of_text.base_share())
        return flops + (1 if self.config.base.freeze else 3) * of_text + self.objective.flops(targets_per_step, tokens)

    def _report(self) -> None:
        try:
            self.reporter.report(self.step, self.learning_rates, self.grad_norms)
        except (UserError, OSError):  # of all ranks
            self._finish_save()
            raise

    def _save(self) -> None:
        self._finish_save()
        self.watchdog.phase("saving")
        self.reporter.refuse_bad()
        state = {"position": self.step * self.global_batch_size, "identity": self.identity, "data": self.loader.fingerprints}
        state["report"] = self.reporter.sums.state()
        if self.config.checkpoint.async_mode == "async":
            self.checkpointer.begin(self.step, self._tensors(), state)
        else:
            self._saved(self.checkpointer.save(self.step, self._tensors(), state))

    def _finish_save(self) -> None:
        """Waits for a checkpoint that is being written, if there is one."""
        if self.checkpointer.under_way:
            self.watchdog.phase("saving")
            self._saved(self.checkpointer.finish())

    def _saved(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        logger.info("saved %s", checkpoint)

    def evaluate(self) -> None:
        """Held-out loss and accuracy per head, and acceptance by drafting and verifying, of the checkpoint just saved."""
        self.watchdog.phase("evaluating")
        values = {}
        if self.validation:
            # Every rank runs all of these few samples: sharded parameters are gathered by all ranks together.
            sums, counts = heldout_sums(self.objective, self.states_of_held_out, self.validation, self.base.readout)
            report = heldout_report(self.objective.metrics, sums, counts)
            joint = len(self.trained) == 2
            if joint:
                values |= {f"base_{name}": report[name][0] for name in ("heldout_loss", "heldout_accuracy")}
            by_head = {name: rows[joint:] for name, rows in report.items() if isinstance(rows, list) and name != "heldout_reached"}
            values["heldout_loss"] = sum(
                weight * loss for weight, loss in zip(self.speculator.step_weight().tolist(), by_head["heldout_loss"])
            )
            values |= {f"{name}/head_{head}": value for name, heads in by_head.items() for head, value in enumerate(heads)}
        if self.prompts:
            values["acceptance_length"] = utils.on_main(self._acceptance_length)
        if values:
            self.metrics.evaluation(self.step, values)
        if self.best is not None:
            self.best.offer(self.checkpoint, values, writes=self.world.rank == 0)
            self.checkpointer.protected = self.best.checkpoint

    def _acceptance_length(self) -> float:
        return checkpoint_acceptance(self._config_of_last_checkpoint(), self.tokenizer, self.prompts, self.device)

    def finish(self) -> None:
        """Evaluates and exports, unless an earlier start of this run has done so."""
        self.watchdog.phase("evaluating and exporting", no_collectives=True)
        measurable = bool(self.prompts or self.validation)
        utils.on_main(lambda: finish_run(self._config_of_last_checkpoint(), self.checkpoint, self.step, measurable))

    def export_untrained(self) -> None:
        """`job.init_only`: the run's first checkpoint, of step 0, and its export."""
        if self.checkpoint is None:
            self._save()
            self._finish_save()
        utils.on_main(lambda: export_run(self._config_of_last_checkpoint()))

    def _config_of_last_checkpoint(self) -> Config:
        config = copy.deepcopy(self.config)
        config.speculator.path = str(self.checkpoint)
        return config


def show_plan(config: Config) -> None:
    """`job.plan`: nothing is read but config.json, and that only where base.variant names no size."""
    if config.speculator.path:
        trained = find_trained(config)
        config.adopt_speculator(*family_keys(trained), source=str(trained.path))
    named = config.base.variant != "auto" and not Path(config.base.path).is_dir()
    base_config = choose_config(config.base.arch, config.base.variant, "" if named else config.base.path)
    with torch.device("meta"):
        speculator = new_speculator(config.speculator.type, config.speculator, base_config, config.objective)
    plan = plan_run(config, base_config, speculator)
    print(describe(plan, config.plan))
    check_fits(plan, config.plan)


def train(config: Config, stop: StopSignal) -> None:
    if config.job.plan:
        return show_plan(config) if os.environ.get("RANK", "0") == "0" else None
    use_huge_pages()
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if config.job.threads > 0:
        torch.set_num_threads(config.job.threads)
    if config.job.deterministic:  # cuBLAS reads the variable when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.job.deterministic)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # of tp; nothing works on it in place
    parallelism = config.parallelism
    world = init_distributed(
        parallelism.sharding_strategy, tp_size=parallelism.tp_size,
        dp_replicate=parallelism.dp_replicate, shard_speculator=parallelism.shard_speculator,
    )  # fmt: skip
    try:
        with contextlib.closing(RunFolder(Path(config.job.dump_folder))) as run_folder:
            with Watchdog(config.job.timeout, "spectitan.train", gpu=world.device.type == "cuda") as watchdog:
                trainer = Trainer(config, world, run_folder, watchdog)
                with contextlib.closing(trainer.metrics), contextlib.closing(trainer):
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
    sys.exit(main())
