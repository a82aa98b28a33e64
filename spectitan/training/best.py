"""The best of a run's checkpoints by its evaluations, and `best`, the name in their folder that leads to it."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path

from spectitan.training.checkpoint_files import step_folders, step_of

logger = logging.getLogger(__name__)

# checkpoint.save_best -> what evaluations call it, and the sign that makes more of it better.
_MEASURES = {"acceptance": ("acceptance_length", 1), "loss": ("heldout_loss", -1)}


class Best:
    """Takes in evaluations, one by one.

    Args:
        save_best: acceptance or loss.
        folder: of the step folders.
        evaluations: those of the run so far, as evaluations.jsonl has them.

    Attributes:
        checkpoint: of the best evaluation, the earlier of two that are equal; None without one whose checkpoint is there.
    """

    def __init__(self, save_best: str, folder: Path, evaluations: Iterable[dict] = ()):
        self._name, self._sign = _MEASURES[save_best]
        self._folder, self._value, self.checkpoint = folder, -math.inf, None
        saved = {step_of(path): path for path in step_folders(folder)}
        for record in evaluations:
            if record["step"] in saved:
                self._take(saved[record["step"]], record)

    def offer(self, checkpoint: Path, values: dict[str, float], writes: bool) -> None:
        """An evaluation of a checkpoint that is in the folder.

        Args:
            writes: of all ranks, this one makes `best` lead to it, if it is the best so far.
        """
        if self._take(checkpoint, values) and writes:
            logger.info("%s is the best checkpoint so far: %s %.4g", checkpoint, self._name, values[self._name])
            try:
                temporary = self._folder / ".best"
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(checkpoint.name)
                temporary.replace(self._folder / "best")
            except (OSError, NotImplementedError) as error:
                logger.warning("%s/best could not be made to lead there: %s", self._folder, error)

    def _take(self, checkpoint: Path, values: dict) -> bool:
        value = values.get(self._name)
        better = isinstance(value, float) and math.isfinite(value) and self._sign * value > self._value
        if better:
            self._value, self.checkpoint = self._sign * value, checkpoint
        return better
