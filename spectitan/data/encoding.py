"""Tokenising on all cores, in order, with bounded memory."""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from spectitan.data.documents import Document, Ids
from spectitan.data.rendering import Rendered, mask_of, texts_of
from spectitan.data.splitting import TORN, pieces
from spectitan.data.tokenizer import Tokenizer

CHUNK_CHARACTERS = 2**18  # texts handed to a thread together


class Encoded(NamedTuple):
    ids: np.ndarray  # uint32 [n], with what begins and ends a document
    mask: np.ndarray | None = None  # bool [n], which may be targets; None: all


class _Part(NamedTuple):
    """A document, or a piece of one: ids as Python's integers take twenty times the memory of their text, so a long text is not tokenised
    in one call."""

    document: Document
    content: str | tuple  # of the document; a piece of a long text
    is_first: bool = True
    is_last: bool = True
    torn: bool = False


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, threads: int, noted: Counter | None = None
) -> Iterator[tuple[Document, Encoded]]:
    """Documents, as `rendered` gives them, with their ids, in order. To be closed.

    Tokenizers release the interpreter while they work, so threads use all cores and copy no text between processes.

    Args:
        threads: -1: one a core.
        noted: gets the number of cuts at which ids may differ from those of the whole text, under splitting.TORN.
    """
    threads = threads if threads > 0 else os.cpu_count() or 1
    with _one_thread_a_call(), ThreadPoolExecutor(threads) as pool:
        try:
            held: list[Encoded] = []  # the pieces of a document so far
            for part, result, torn in _parts_encoded(documents, tokenizer, pool, threads):
                held.append(result)
                if torn and noted is not None:
                    noted[TORN] += torn
                if part.is_last:
                    yield part.document, _joined(held)
                    held = []
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _parts_encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[_Part, Encoded, int]]:
    """Parts with their ids, and how often they are torn."""
    waiting: deque[Future] = deque()
    for chunk in _chunks(part for document in documents for part in _parts(document, tokenizer)):
        waiting.append(pool.submit(_encode_chunk, chunk, tokenizer))
        if len(waiting) > 2 * threads:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _parts(document: Document, tokenizer: Tokenizer) -> Iterator[_Part]:
    if not isinstance(document.content, str):
        yield _Part(document, document.content)
        return
    for piece in pieces(document.content, tokenizer):
        text = document.content[piece.start : piece.stop]
        yield _Part(document, text, piece.start == 0, piece.stop == len(document.content), piece.torn)


def _chunks(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Lists of at most CHUNK_CHARACTERS together; what is longer is a list of its own."""
    chunk, size = [], 0
    for part in parts:
        length = _length(part.content)
        if chunk and size + length > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(part)
        size += length
    if chunk:
        yield chunk


def _length(content: str | tuple) -> int:
    """Characters; of ids, their number."""
    return len(content.ids) if isinstance(content, Ids) else sum(map(len, texts_of(content)))


def _encode_chunk(chunk: list[_Part], tokenizer: Tokenizer) -> list[tuple[_Part, Encoded, int]]:
    texts = [part.content for part in chunk if isinstance(part.content, str)]
    ids = iter(tokenizer.encode_batch(texts) if texts else [])
    begin, end = np.array(tokenizer.prompt([]), np.uint32), _end(tokenizer)
    results = []
    for part in chunk:
        if isinstance(part.content, str):
            around = begin if part.is_first else begin[:0], end if part.is_last else end[:0]
            framed = np.concatenate([around[0], np.array(next(ids), np.uint32), around[1]])
            results.append((part, Encoded(framed), int(part.torn)))
        else:
            results.append((part, *_encode(part.content, tokenizer)))
    return results


def encode(content: str | tuple, tokenizer: Tokenizer) -> Encoded:
    """One content, as `rendered` gives it. A prompt and its response are tokenised apart, as they are when a server answers."""
    return _encode(content, tokenizer)[0]


def _encode(content: str | tuple, tokenizer: Tokenizer) -> tuple[Encoded, int]:
    """As `encode`; and how often its texts are torn."""
    if isinstance(content, str):
        ids, torn = _in_pieces(content, tokenizer)
        return Encoded(np.concatenate([np.array(tokenizer.prompt([]), np.uint32), ids, _end(tokenizer)])), torn
    if isinstance(content, Ids):
        ids = content.ids.astype(np.uint32)
        return Encoded(_framed(ids, tokenizer) if content.mask is None else ids, content.mask), 0
    if isinstance(content, Rendered):
        ids, starts, torn = _rendered_in_pieces(content.text, tokenizer)
        response, response_torn = _response(content.response, tokenizer) if content.response else ((), 0)
        return _masked(ids, mask_of(starts, content.spans), response), torn + response_torn
    prompt, torn = _in_pieces(content.prompt, tokenizer)
    if tokenizer.bos_id is not None and prompt[:1].tolist() != [tokenizer.bos_id]:  # its text may begin with one
        prompt = np.concatenate([np.array([tokenizer.bos_id], np.uint32), prompt])
    response, response_torn = _response(content.response, tokenizer)
    return _masked(prompt, np.zeros(len(prompt), bool), response), torn + response_torn


def _in_pieces(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """uint32 ids of a text, perhaps a long one: only one piece of it is held as Python's integers; and how often it is torn."""
    cuts = list(pieces(text, tokenizer))
    parts = [np.array(tokenizer.encode_batch([text[start:stop]])[0], np.uint32) for start, stop, _ in cuts]
    return np.concatenate(parts), sum(piece.torn for piece in cuts)


def _rendered_in_pieces(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, int]:
    """As `_in_pieces`, of text that a chat template made; with the character at which each id begins."""
    ids, starts, torn = [], [], 0
    for piece in pieces(text, tokenizer, lambda part: tokenizer.encode_rendered(part)[0]):
        part_ids, part_starts = tokenizer.encode_rendered(text[piece.start : piece.stop])
        ids.append(np.array(part_ids, np.uint32))
        starts.append(np.array(part_starts, np.int64) + piece.start)
        torn += piece.torn
    return np.concatenate(ids), np.concatenate(starts), torn


def _response(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """ids of a response, ended by one end of text; and how often it is torn."""
    ids, torn = _in_pieces(text, tokenizer)
    ended = tokenizer.eos_id is None or ids[-1:].tolist() == [tokenizer.eos_id]
    return ids if ended else np.concatenate([ids, _end(tokenizer)]), torn


def _end(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.uint32)


def _masked(prompt: np.ndarray, mask: np.ndarray, response: np.ndarray | tuple) -> Encoded:
    """A prompt with its mask, then a response that is supervised."""
    ids = np.concatenate([np.asarray(prompt, np.uint32), np.asarray(response, np.uint32)])
    return Encoded(ids, np.concatenate([mask, np.ones(len(response), bool)]))


def _framed(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """ids of a text with what begins and what ends a text, where that is not there already."""
    begin, end = np.array(tokenizer.prompt([]), np.uint32), _end(tokenizer)
    return np.concatenate([begin[: int(ids[0] != tokenizer.bos_id)], ids, end[: int(ids[-1] != tokenizer.eos_id)]])


def _joined(parts: list[Encoded]) -> Encoded:
    return parts[0] if len(parts) == 1 else Encoded(np.concatenate([part.ids for part in parts]))


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Keeps `tokenizers` from starting threads of its own beside ours: loader workers that are forked later could hang on them."""
    variable = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(variable)
    os.environ[variable] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
