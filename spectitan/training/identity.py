"""Whether a checkpoint belongs to the run that wants to go on from it."""

import dataclasses
import json
import logging

from spectitan.errors import UserError

logger = logging.getLogger(__name__)

# Keys that decide what is trained on what, and in which order; a trailing dot means a whole table.
MUST_MATCH = (
    "speculator.",
    "base.arch",
    "base.config.",  # what config.json says of the function
    "base.freeze",
    "base.identity",  # the weights' fingerprint, or "random"
    "base.tokenizer",  # its fingerprint
    "data.path",
    "data.datasets",
    "data.weights",
    "data.seq_length",
    "data.packing",
    "data.overlong",
    "training.global_batch_size",
    "stage2.batch_size",  # these five between runs that both have a second stage; when it begins may change
    "stage2.prompt_length",
    "stage2.seq_length",
    "stage2.temperature",
    "stage2.top_k",
    "job.seed",
    "optimizer.name",
)
_BEFORE_THE_KEY = {"data.packing": "concat", "data.overlong": "split"}  # what runs did before there were these keys
_SHOWN = {"speculator.d2t": "the draft vocabulary (speculator.draft_vocab_size, token_freq_path, d2t_path; by its hash)"}  # no keys
_BASE = ("base.identity", "base.config.")  # what makes it another base; beginnings of keys


def run_identity(config, base_config: dict[str, object], base_weights: str, tokenizer: str) -> dict[str, object]:
    """Every key of a run, `section.key` -> value, and what its base is.

    Args:
        config: a dataclass of tables; where it lies and what it starts from are left out.
        base_config: what config.json says of the base's function.
        base_weights, tokenizer: fingerprints.
    """
    tables = dataclasses.asdict(config)
    keys = {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}
    del keys["job.config_file"], keys["speculator.path"]
    keys |= {f"base.config.{name}": value for name, value in base_config.items()}
    return keys | {"base.identity": base_weights, "base.tokenizer": tokenizer}


def check_identity(saved: dict[str, object], current: dict[str, object]) -> None:
    """Refuses to continue a run whose meaning has changed; logs every other key that has.

    A key that the checkpoint does not know is new since the version that wrote it, and only logged. So is another base under
    base.allow_other; its shapes are compared with the tensors.

    Args:
        saved: `section.key` -> JSON value, of the checkpoint.
        current: the same of this run.

    Raises:
        UserError: names the first key of MUST_MATCH that differs, what it was and what it is.
    """
    if -1 in (values.get("stage2.start_step", -1) for values in (saved, current)):
        saved, current = _without_stage2(saved), _without_stage2(current)
    saved = {key: value for key, value in _BEFORE_THE_KEY.items() if key in current} | saved
    absent = object()
    changed = []
    allowed = _BASE if current.get("base.allow_other") else ()
    for key in sorted(saved.keys() | current.keys()):
        was, now = (_plain(values[key]) if key in values else absent for values in (saved, current))
        if was == now:
            continue
        was, now = ("absent" if value is absent else repr(value) for value in (was, now))
        known = key in saved and not key.startswith(allowed)
        if known and (key in MUST_MATCH or any(table.endswith(".") and key.startswith(table) for table in MUST_MATCH)):
            raise UserError(
                f"{_SHOWN.get(key, key)} was {was} in the checkpoint and is {now} now: set it back, use another job.dump_folder, "
                f"checkpoint.resume = never{', or base.allow_other = true' if key.startswith(_BASE) else ''}"
            )
        changed.append(f"{key}: {was} -> {now}")
    if changed:
        logger.info("changed since the checkpoint: %s", "; ".join(changed))


def warn_of_other_text(saved: dict[str, str], current: dict[str, str]) -> None:
    """Says which datasets are not what they were when the checkpoint was written: the run goes on, its order of samples does not.

    Args:
        saved: dataset -> fingerprint of its samples, of the checkpoint.
        current: the same of this run.
    """
    changed = [name for name in current if saved.get(name, current[name]) != current[name]]
    if changed:
        logger.warning(
            "the text of %s, or how it is packed, is not what it was when the checkpoint was written: samples may come twice, or never",
            ", ".join(changed),
        )


def _without_stage2(values: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if key == "stage2.start_step" or not key.startswith("stage2.")}


def _plain(value: object) -> object:
    """As JSON would give it back: tuples become lists."""
    return json.loads(json.dumps(value))
