"""Stage 2's text written ahead of training, once for any number of runs: JSON lines {"input": prompt ids, "output": sampled ids}.

As ArcticTraining's data generation makes it; the data reader takes such files, and supervises the output alone.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from spectitan.data.progress import Progress
from spectitan.errors import UserError
from spectitan.files import naming, sync, write_whole
from spectitan.states.continued import ContinuedStates
from spectitan.types import TokenBatch

logger = logging.getLogger(__name__)


def write_generated(
    path: Path, settings: dict, samples: int, batches: Iterator[TokenBatch], make_source: Callable[[], ContinuedStates]
) -> None:
    """Writes `path`, and beside it `path`.json with its settings.

    Lines are collected in `path`.partial, which takes its name when it is whole. What was stopped goes on after the last batch
    that is whole there.

    Args:
        settings: everything that decides the bytes.
        samples: of the text that prompts are cut from.
        batches: of the text, from the first of these samples on.
        make_source: gives what cuts and samples, with first_sample = 0; not called if the file is there.

    Raises:
        UserError: the file, or its part, was written with other settings, or is being written; no prompt fits into the text.
    """
    description, partial = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_settings(path, partial, description, settings)
    if path.exists():
        logger.info("%s is there already, and whole", path)
        return
    with naming(partial), partial.open("a+b") as file:
        _lock(file, path)
        write_whole(description, json.dumps(settings, indent=2) + "\n")
        _write_lines(file, path, samples, batches, make_source())
        if not file.tell():
            length = settings["stage2.prompt_length"]
            raise UserError(f"stage2.prompt_length = {length}: the text gives no prompt of so many tokens")
        file.flush()
        sync(partial)
        partial.replace(path)


def _check_settings(path: Path, partial: Path, description: Path, settings: dict) -> None:
    if not path.exists() and not (partial.exists() and partial.stat().st_size):
        return
    try:
        written = json.loads(description.read_text(encoding="utf-8"))
        differing = next((name for name in settings if written.get(name) != settings[name]), None)
    except (OSError, ValueError, AttributeError):  # AttributeError: JSON, but no object
        raise UserError(
            f"prepare.generate = {str(path)!r} exists, and {description.name} does not say how it was made; remove it"
        ) from None
    if differing:
        raise UserError(
            f"prepare.generate = {str(path)!r} was written with {differing} = {written.get(differing)!r}, and it is {settings[differing]!r} "
            "now; allowed: a new file, or the same settings"
        )


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"prepare.generate = {str(path)!r}: another process is writing it; allowed: a file for each process") from None
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s)", path, error.strerror)


def _write_lines(file: BinaryIO, path: Path, samples: int, batches: Iterator[TokenBatch], source: ContinuedStates) -> None:
    done, continuing, length = 0, True, source.config.prompt_length
    file.seek(0)
    with Progress(f"generating {path.name}", samples, "samples", 1) as progress:
        while done < samples:
            batch = _first_rows(next(batches), samples - done)
            continuing = continuing and _skip(file, int(source.cut(batch)[2].sum()))
            if not continuing:
                text = source.begin(batch)
                usable = text.loss_mask.any(1).tolist()
                rows = [row for row, use in zip(text.tokens.tolist(), usable) if use]
                file.write("".join(json.dumps({"input": row[:length], "output": row[length:]}) + "\n" for row in rows).encode())
                file.flush()
            done += len(batch.tokens)
            progress.update(done)


def _first_rows(batch: TokenBatch, count: int) -> TokenBatch:
    return TokenBatch(*(tensor if tensor is None else tensor[:count] for tensor in batch))


def _skip(file: BinaryIO, lines: int) -> bool:
    """Goes on past so many lines. If they are not there, whole, the file is cut off where it stands, and False is returned."""
    start = file.tell()
    if all(file.readline().endswith(b"\n") for _ in range(lines)):
        return True
    file.seek(start)
    file.truncate()
    return False
