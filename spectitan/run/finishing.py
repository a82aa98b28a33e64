"""The end of a run: its report and its export, unless an earlier start has written them for the same step and keys."""

import dataclasses
import json
from pathlib import Path

from spectitan.config.tables import Config
from spectitan.evaluation import evaluate_run
from spectitan.exporting import export_folder, export_run
from spectitan.trained import open_checkpoint


def finish_run(config: Config, checkpoint: Path, measurable: bool) -> None:
    """Evaluates and exports a run's last checkpoint. Of one process alone.

    Args:
        checkpoint: a step folder that has been verified.
        measurable: there are prompts or held-out text.
    """
    trained = open_checkpoint(checkpoint)
    folder = Path(config.job.dump_folder)
    record = folder / "finished.json"
    done = _read_record(record)
    evaluated, exported = ({"step": trained.step} | dataclasses.asdict(section) for section in (config.eval, config.export))
    if config.eval.at_end and measurable and not (done.get("eval") == evaluated and (folder / "report.json").is_file()):
        evaluate_run(config, trained)
        done["eval"] = evaluated
        record.write_text(json.dumps(done, indent=1))
    if config.export.format != "none" and not (done.get("export") == exported and (export_folder(config) / "config.json").is_file()):
        export_run(config, trained)
        done["export"] = exported
        record.write_text(json.dumps(done, indent=1))


def _read_record(path: Path) -> dict:
    """Of what was written last by which keys, at which step. Without it all is written again."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
