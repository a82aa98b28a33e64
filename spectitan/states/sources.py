"""[states] of a configuration: which folder, which store, and what of a run's samples is in it."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from spectitan.config.sections import States
from spectitan.data.order import Place, SampleOrder
from spectitan.data.packing import PackedDataset
from spectitan.errors import UserError
from spectitan.states.cache import FINAL, StatesCache, open_cache
from spectitan.states.document_files import DocumentFiles, find_format
from spectitan.states.store import Store, allowed_if_missing

logger = logging.getLogger(__name__)

_CHECKED = 100_000  # samples of a run that are looked for before it begins


def hidden_states_folder(config: States, dump_folder: str) -> Path:
    """states.hidden_states_path, or hidden_states in the run's folder."""
    return Path(config.hidden_states_path).expanduser() if config.hidden_states_path else Path(dump_folder) / "hidden_states"


def on_missing(config: States) -> str:
    """What becomes of samples without states and without a base: skip, warn or raise."""
    return "raise" if config.on_missing == "auto" else config.on_missing


def open_store(
    config: States, folder: Path, *, base: str, taps: tuple[int, ...], num_layers: int, hidden_size: int, allow_other: bool
) -> StatesCache | DocumentFiles:
    """The files that states.source = offline or hybrid reads.

    Args:
        base: the base's fingerprint.
        taps: layer ids that the speculator reads.
        num_layers, hidden_size: of the base.

    Raises:
        UserError: as `open_cache` and `DocumentFiles`; hybrid with files of other systems.
    """
    format = find_format(folder) if config.format == "auto" else config.format
    if format == "cache":
        _refuse_final(config, format)
        cache = open_cache(
            folder, base=base, layers=taps, hidden_size=hidden_size, dtype=config.dtype, make=config.source == "hybrid",
            allow_other=allow_other,
        )  # fmt: skip
        layers, dtype = [column for column in cache.columns if column != FINAL], str(cache.dtype).removeprefix("torch.")
        logger.info("hidden states: %s, %s samples of layers %s and the final state, %s", folder, f"{len(cache):,}", layers, dtype)
        return cache
    if config.source == "hybrid":
        raise UserError(
            f"states.source = hybrid: {folder} has files of states.format = {format}, to which nothing is added; allowed: offline, or "
            "another states.hidden_states_path"
        )
    files = DocumentFiles(folder, format, config.final, taps, num_layers, hidden_size)
    when = "after" if files.normed else "before"
    logger.info(
        "hidden states: %s, %s documents (states.format = %s), the final state %s the norm", folder, f"{len(files):,}", format, when
    )
    return files


def _refuse_final(config: States, format: str) -> None:
    if config.final != "auto":
        raise UserError(f"states.final = {config.final} with states.format = {format}, which says it itself; allowed: auto")


def check_complete(
    store: Store, datasets: Sequence[PackedDataset | None], samples: Sequence[Place], names: Sequence[str], on_missing: str
) -> None:
    """Without a base: says which samples have no states, before any work.

    Args:
        samples: that will be read.
        names: of the datasets.
        on_missing: skip, warn or raise.

    Raises:
        UserError: under "raise" if some are missing; always if all are: then it is the wrong folder.
    """
    missing = [sample for sample in samples if store.find(datasets[sample.dataset], sample.sample) is None]
    if not missing:
        return
    first, here = missing[0], datasets[missing[0].dataset].identity
    count = f"{len(missing):,} of {len(samples):,} samples"
    if len(missing) == len(samples):
        other = f"; there: {_differing(store.texts, here)}" if store.texts else ""
        raise UserError(f"{store.folder} has no hidden states of this run's samples{other}; allowed: {store.remedy}")
    where = f"{store.folder} has no hidden states of {count}, first of sample {first.sample} of {names[first.dataset]}"
    if on_missing == "raise":
        raise UserError(f"states.on_missing = raise: {where}; {allowed_if_missing(store)}")
    logger.warning("%s: they are skipped", where)


def samples_of_run(order: SampleOrder, first: int, stop: int) -> list[Place]:
    """The samples at places first .. stop - 1 of the global order, each once; of a long run the first of them."""
    return list(dict.fromkeys(order[i] for i in itertools.islice(range(first, stop), _CHECKED)))


def _differing(there: Sequence[dict], here: dict) -> str:
    """How the text that is most like this run's differs from it; each as PackedDataset.identity has it."""
    differing = min(({name: text.get(name) for name in here if text.get(name) != here[name]} for text in there), key=len)
    words = {"text": "another text, or one chosen or tokenised otherwise"}
    return ", ".join(words.get(name) or f"{name} {value}, here {here[name]}" for name, value in differing.items())
