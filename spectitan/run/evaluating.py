"""Evaluations of a run's checkpoints while it trains: held-out loss and accuracy per head, acceptance by drafting and verifying."""

from pathlib import Path

from spectitan.config.tables import Config
from spectitan.decoding.heldout import heldout_report, heldout_sums
from spectitan.distributed import utils
from spectitan.distributed.mesh import Distributed
from spectitan.evaluation import checkpoint_acceptance
from spectitan.run.data import RunData
from spectitan.run.inputs import Inputs
from spectitan.run.model import Model
from spectitan.trained import open_checkpoint
from spectitan.training.best import Best
from spectitan.training.intervals import is_due
from spectitan.training.metrics import MetricsLogger
from spectitan.types import StateSource


class Evaluator:
    """Measures a run's model, and keeps the best of its checkpoints if checkpoint.save_best asks for that.

    Args:
        source: of held-out text.
        metrics: has the evaluations so far, and takes new ones.
    """

    def __init__(
        self, config: Config, inputs: Inputs, data: RunData, model: Model, source: StateSource, metrics: MetricsLogger, world: Distributed
    ):
        self.config, self.tokenizer, self.prompts, self.checkpointer = config, inputs.tokenizer, inputs.prompts, inputs.checkpointer
        self.data, self.model, self.source, self.metrics, self.world = data, model, source, metrics, world
        self.best = None
        if config.checkpoint.save_best != "none":
            self.best = Best(config.checkpoint.save_best, self.checkpointer.folder, metrics.evaluations)
            self.checkpointer.protected = self.best.checkpoint

    @property
    def measurable(self) -> bool:
        """There are prompts or held-out text."""
        return bool(self.prompts or self.data.held_out.batches)

    def is_due(self, step: int, checkpoint: Path | None) -> bool:
        """Whether the checkpoint of this run's newest step is due for evaluation and has none, perhaps because a stop cut it short.

        The last is measured for the report, which comes from elsewhere; here only to be compared with the others.
        """
        if checkpoint is None or step == 0 or checkpoint.parent != self.checkpointer.folder:
            return False
        due = is_due(step, self.data.eval_interval) if step < self.data.total_steps else self.best is not None
        return due and all(record["step"] != step for record in self.metrics.evaluations)

    def evaluate(self, step: int, checkpoint: Path) -> None:
        """Of the model as it is, whose checkpoint has just been saved. All ranks call it together."""
        values = self._held_out() if self.data.held_out.batches else {}
        if self.prompts:
            values["acceptance_length"] = utils.on_main(lambda: self._acceptance_length(checkpoint))
        if values:
            self.metrics.evaluation(step, values)
        if self.best is not None:
            self.best.offer(checkpoint, values, writes=self.world.rank == 0)
            self.checkpointer.protected = self.best.checkpoint

    def _held_out(self) -> dict[str, float]:
        """Every rank runs all of these few samples: sharded parameters are gathered by all ranks together."""
        model, values = self.model, {}
        sums, counts = heldout_sums(model.objective, self.source, self.data.held_out.batches, model.base.readout)
        report = heldout_report(model.objective.metrics, sums, counts)
        joint = len(model.trained) == 2
        if joint:
            values |= {f"base_{name}": report[name][0] for name in ("heldout_loss", "heldout_accuracy")}
        by_head = {name: rows[joint:] for name, rows in report.items() if isinstance(rows, list) and name != "heldout_reached"}
        weights = model.speculator.step_weight().tolist()
        values["heldout_loss"] = sum(weight * loss for weight, loss in zip(weights, by_head["heldout_loss"]))
        return values | {f"{name}/head_{head}": value for name, heads in by_head.items() for head, value in enumerate(heads)}

    def _acceptance_length(self, checkpoint: Path) -> float:
        return checkpoint_acceptance(self.config, open_checkpoint(checkpoint), self.tokenizer, self.prompts, self.world.device)
