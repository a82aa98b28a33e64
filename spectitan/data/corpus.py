"""Datasets tokenised once: documents -> shards, on all cores, kept in a cache that outlives the run."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from spectitan.config.sections import Data
from spectitan.data.cached_folder import open_or_make
from spectitan.data.documents import HELD_OUT, TRAINING, Dataset, Document, Found, find_datasets, read_documents, validation_datasets
from spectitan.data.documents.formats import table_of
from spectitan.data.documents.reading import check_first_rows
from spectitan.data.encoding import Encoded, encoded
from spectitan.data.meta import BrokenFolder
from spectitan.data.overlap import PromptWindows
from spectitan.data.progress import Progress, counted
from spectitan.data.prompts import load_prompts
from spectitan.data.rendering import rendered, texts_of
from spectitan.data.shards import FORMAT_VERSION, Shards, ShardWriter
from spectitan.data.source_hash import Memory, SourceHash, content_hash, names_and_sizes
from spectitan.data.tokenizer import Tokenizer
from spectitan.errors import UserError

logger = logging.getLogger(__name__)


class EmptyDataset(UserError):
    """No document to train or evaluate on."""


class TokenisedDataset(NamedTuple):
    """One dataset as shards; `shards` is None where its weight is 0."""

    name: str
    shards: Shards | None


def tokenise_training(data: Data, tokenizer: Tokenizer) -> list[TokenisedDataset]:
    """The training part of every dataset, in the order of data.datasets: from the cache, or tokenised now.

    Before one is tokenised all are looked at, that of data.val_path as well.

    Raises:
        UserError: what find_datasets, load_prompts and read_documents raise; a dataset without documents.
    """
    datasets = find_datasets(data)
    used = [dataset for dataset, weight in zip(datasets, data.weights or [1.0] * len(datasets), strict=True) if weight > 0]
    prompts = load_prompts(data.drop_overlap, tokenizer) if data.drop_overlap else []
    others = validation_datasets(data) if data.val_path else []
    check = functools.cache(lambda: check_first_rows([*used, *others], data))
    tokenised = [
        TokenisedDataset(dataset.name, _tokenised(dataset, data, TRAINING, tokenizer, prompts, check) if dataset in used else None)
        for dataset in datasets
    ]
    for name, shards in tokenised:
        if shards is not None:
            logger.info("data %s: %s", name, describe(shards))
    return tokenised


def describe(shards: Shards) -> str:
    """One line: what files and rows were recognised as, documents, tokens, what was dropped and held out."""
    meta = shards.meta
    parts = [f"{counted(count, 'file')} of {format}" for format, count in sorted(meta.get("formats", {}).items())]
    parts += [counted(meta["documents"], "document"), counted(meta["tokens"], "token")]
    parts += [f"{meta['supervised']:,} of them supervised"] if shards.masked else []
    parts += [f"{meta['bytes'] / meta['tokens']:.2f} bytes a token"] if meta["bytes"] else []
    parts += [f"{counted(count, 'row')} of {kind}" for kind, count in sorted(meta.get("kinds", {}).items())]
    parts += [f"{count:,} dropped: {reason}" for reason, count in sorted(meta["dropped"].items())]
    parts += [f"{count:,} {reason}" for reason, count in sorted(meta.get("noted", {}).items())]
    parts += [f"{meta['held_out']:,} held out"] if meta.get("held_out") else []
    return ", ".join(parts)


def tokenise_held_out(data: Data, tokenizer: Tokenizer) -> list[TokenisedDataset]:
    """The evaluation text: all of data.val_path, else the held-out part of the datasets; none where data.holdout is 0.

    A dataset in which nothing happens to be held out is left out.

    Raises:
        UserError: as tokenise_training; nothing at all is held out.
    """
    if not data.val_path and data.holdout == 0:
        return []
    part = None if data.val_path else HELD_OUT
    tokenised, empty, datasets = [], [], validation_datasets(data)
    check = functools.cache(lambda: check_first_rows(datasets, data))
    for dataset in datasets:
        try:
            tokenised.append(TokenisedDataset(dataset.name, _tokenised(dataset, data, part, tokenizer, [], check)))
        except EmptyDataset as error:
            empty.append(error)
    if not tokenised:
        raise empty[0]
    return tokenised


def _tokenised(
    dataset: Dataset, data: Data, part: str | None, tokenizer: Tokenizer, prompts: list[list[int]], check: Callable[[], None]
) -> Shards:
    """The shards in the cache, written now if they are not there, after a call of `check`.

    Their folder is named after all that decides their bytes: how they are made and the files' names and sizes, then the files'
    content. Where there is no folder of the same names and sizes the content is hashed while it is tokenised.
    """
    cache = cache_folder(data)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir = {str(cache)!r}: {error.strerror}; allowed: a folder, or where one can be made") from None
    made_from = _made_from(dataset, data, part, tokenizer, prompts)

    def find() -> Path | None:
        if not any(cache.glob(f"{made_from}-*")):
            return None
        memory = Memory(dataset, cache)
        content = memory.recall() if data.verify == "stat" else None
        if content is None:
            content = content_hash(dataset)
            memory.keep(content)
        return cache / f"{made_from}-{content}"

    def write(temporary: Path) -> Path:
        check()
        memory, source = Memory(dataset, cache), SourceHash(dataset)
        _write_shards(temporary, dataset, data, part, tokenizer, PromptWindows(prompts), source)
        content = source.finish()
        memory.keep(content)
        return cache / f"{made_from}-{content}"

    open_folder = functools.partial(_open, check_content=data.verify == "content")
    return open_or_make(cache / f"{made_from}.lock", f"data {dataset.name}: tokenising", find, open_folder, write)


def cache_folder(data: Data) -> Path:
    """data.cache_dir, else $SPECTITAN_CACHE, else ~/.cache/spectitan."""
    return Path(data.cache_dir or os.environ.get("SPECTITAN_CACHE") or "~/.cache/spectitan").expanduser()


def _made_from(dataset: Dataset, data: Data, part: str | None, tokenizer: Tokenizer, prompts: list[list[int]]) -> str:
    """Everything that decides the shards' bytes but the files' content: their names and sizes, the tokenizer, keys that choose documents."""
    decides = {
        "format": FORMAT_VERSION,
        "files": [[os.fsencode(file).hex(), size] for file, size in names_and_sizes(dataset)],
        "tokenizer": [tokenizer.fingerprint, tokenizer.vocab_size],
        "part": [part, data.holdout if part else 0.0],
        "reading": [data.format, data.text_column, data.on_invalid, *_reading_of_tables(dataset, data, tokenizer)],
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]


def _reading_of_tables(dataset: Dataset, data: Data, tokenizer: Tokenizer) -> list:
    """What decides how rows are read; nothing for text."""
    if not any(table_of(data, file) for file in dataset.files):
        return []
    keys = [data.prompt_key, data.prompt_dict_keys, data.response_key, data.response_dict_keys, data.messages_key]
    keys += [data.tools_key, data.tokens_column, data.input_ids_column, data.loss_mask_column]
    return [*keys, tokenizer.chat_template and tokenizer.chat_template.fingerprint]


def _open(folder: Path, check_content: bool) -> Shards | None:
    if not folder.exists():
        return None
    try:
        return Shards(folder, check_content)
    except BrokenFolder as error:
        logger.warning("tokenised data is broken and is made again: %s", error)
        return None


def _write_shards(
    folder: Path, dataset: Dataset, data: Data, part: str | None, tokenizer: Tokenizer, windows: PromptWindows, source: SourceHash
) -> None:
    """`source` follows what is read."""
    found, num_bytes, frame = Found(), 0, len(tokenizer.document([]))
    writer = ShardWriter(folder, tokenizer.vocab_size)
    title = f"tokenising {dataset.name}" + (f" ({part})" if part == HELD_OUT else "")
    try:
        with Progress(title, dataset.num_bytes()) as progress:
            documents = rendered(read_documents(dataset, data, part, found), tokenizer, data, found, dataset.name)
            with closing(encoded(documents, tokenizer, data.tokenizer_threads, found.noted)) as results:
                for document, result in results:
                    progress.update(document.bytes_read)
                    source.advance(document.bytes_read)
                    reason = _why_dropped(document, result, frame, windows)
                    if reason:
                        found.dropped[reason] += 1
                        continue
                    writer.add(*result)
                    num_bytes += sum(len(text.encode()) for text in texts_of(document.content))
        for name in found.skipped_names:
            logger.warning("data %s: skipped %s, which cannot be read", dataset.name, name)
        if writer.documents == 0:
            raise EmptyDataset(_why_empty(dataset, data, part, found))
        counts = {"dropped": found.dropped, "noted": found.noted, "skipped": found.skipped_names}
        counts |= {"formats": found.formats, "kinds": found.kinds}
        writer.finish({"bytes": num_bytes} | counts | ({"held_out": found.other_part} if part == TRAINING else {}))
    finally:
        writer.close()


def _why_dropped(document: Document, result: Encoded, frame: int, windows: PromptWindows) -> str | None:
    """`frame`: how many tokens are put around a text."""
    ids, mask = result
    if mask is None:  # a text, or ids of one
        length = len(ids) - frame
        if length < 2:
            return "one token" if length else "empty"
    elif not mask[1:].any():
        return "no supervised token"
    return "prompt overlap" if windows.overlap(ids) else None


def _why_empty(dataset: Dataset, data: Data, part: str | None, found: Found) -> str:
    reasons = [f"{count} {reason}" for reason, count in found.dropped.items()]
    if found.other_part:
        reasons.append(f"{found.other_part} {'held out' if part == TRAINING else 'not held out'} (data.holdout = {data.holdout})")
    return f"data {dataset.name}: empty dataset, no {part or 'evaluation'} document in it; its documents: {', '.join(reasons) or 'none'}"
