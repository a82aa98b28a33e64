"""Tokenising on all cores, in order, with bounded memory."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from spectitan.data.documents import Document, Ids
from spectitan.data.rendering import Rendered, mask_of, texts_of
from spectitan.data.tokenizer import Tokenizer

# A longer text is tokenised in pieces, cut at line ends: ids as Python's integers take twenty times the memory of the text.
PIECE_CHARACTERS = 2**20
CHUNK_CHARACTERS = 2**18  # documents handed to a thread together


class Encoded(NamedTuple):
    ids: np.ndarray  # uint32 [n], with what begins and ends a document
    mask: np.ndarray | None = None  # bool [n], which may be targets; None: all


def encoded(documents: Iterable[Document], tokenizer: Tokenizer, threads: int) -> Iterator[tuple[Document, Encoded]]:
    """Documents, as `rendered` gives them, with their ids, in order; -1 threads is one a core. To be closed.

    Tokenizers release the interpreter while they work, so threads use all cores and copy no text between processes.
    """
    threads = threads if threads > 0 else os.cpu_count() or 1
    waiting: deque = deque()
    with _one_thread_a_call(), ThreadPoolExecutor(threads) as pool:
        try:
            for chunk in _chunks(documents):
                waiting.append((chunk, pool.submit(_encode_chunk, chunk, tokenizer)))
                if len(waiting) > 2 * threads:
                    chunk, results = waiting.popleft()
                    yield from zip(chunk, results.result())
            while waiting:
                chunk, results = waiting.popleft()
                yield from zip(chunk, results.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of at most CHUNK_CHARACTERS together; a longer one is a list of its own."""
    chunk, size = [], 0
    for document in documents:
        length = _length(document)
        if chunk and size + length > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(document)
        size += length
    if chunk:
        yield chunk


def _length(document: Document) -> int:
    """Characters; of ids, their number."""
    content = document.content
    return len(content.ids) if isinstance(content, Ids) else sum(map(len, texts_of(content)))


def _encode_chunk(chunk: list[Document], tokenizer: Tokenizer) -> list[Encoded]:
    contents = [document.content for document in chunk]
    if len(contents) > 1 and all(isinstance(content, str) for content in contents):
        begin, end = _frame(tokenizer)
        return [Encoded(np.concatenate([begin, np.array(ids, np.uint32), end])) for ids in tokenizer.encode_batch(contents)]
    return [encode(content, tokenizer) for content in contents]


def encode(content: str | tuple, tokenizer: Tokenizer) -> Encoded:
    """One content, as `rendered` gives it. A prompt and its response are tokenised apart, as they are when a server answers."""
    if isinstance(content, str):  # perhaps a long text: only one piece of it is held as Python's integers
        begin, end = _frame(tokenizer)
        pieces = [np.array(tokenizer.encode_batch([piece])[0], np.uint32) for piece in _pieces(content)]
        return Encoded(np.concatenate([begin, *pieces, end]))
    if isinstance(content, Ids):
        ids = content.ids.astype(np.uint32)
        return Encoded(_framed(ids, tokenizer) if content.mask is None else ids, content.mask)
    if isinstance(content, Rendered):
        ids, starts = tokenizer.encode_rendered(content.text)
        response = _response(content.response, tokenizer) if content.response else ()
        return _masked(ids, mask_of(starts, content.spans), response)
    prompt = tokenizer.encode_batch([content.prompt])[0]
    if prompt[:1] != [tokenizer.bos_id]:  # or its text begins with one
        prompt = tokenizer.prompt(prompt)
    return _masked(prompt, np.zeros(len(prompt), bool), _response(content.response, tokenizer))


def _response(text: str, tokenizer: Tokenizer) -> list[int]:
    """ids of a response, ended by one end of text."""
    ids = tokenizer.encode_batch([text])[0]
    return ids if tokenizer.eos_id is None or ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]


def _masked(prompt: np.ndarray | list[int], mask: np.ndarray, response: np.ndarray | list[int]) -> Encoded:
    """A prompt with its mask, then a response that is supervised."""
    ids = np.concatenate([np.asarray(prompt, np.uint32), np.asarray(response, np.uint32)])
    return Encoded(ids, np.concatenate([mask, np.ones(len(response), bool)]))


def _frame(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """What begins and what ends a text."""
    begin, end = np.split(np.array(tokenizer.document([]), np.uint32), [len(tokenizer.prompt([]))])
    return begin, end


def _framed(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """ids of a text with what begins and what ends a text, where that is not there already."""
    begin, end = _frame(tokenizer)
    begin = begin if ids[0] != tokenizer.bos_id else begin[:0]
    end = end if ids[-1] != tokenizer.eos_id else end[:0]
    return np.concatenate([begin, ids, end])


def _pieces(text: str) -> list[str]:
    """The text, cut after line ends into pieces of about PIECE_CHARACTERS; a longer line is cut within."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        line_end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        stop = line_end if line_end > start else start + PIECE_CHARACTERS
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


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
