"""Tokenising on all cores, in order, with bounded memory."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from spectitan.data.documents import Document
from spectitan.data.tokenizer import Tokenizer

# A longer text is tokenised in pieces, cut at line ends: ids as Python's integers take twenty times the memory of the text.
PIECE_CHARACTERS = 2**20
CHUNK_CHARACTERS = 2**18  # documents handed to a thread together


def encoded(documents: Iterable[Document], tokenizer: Tokenizer, threads: int) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with the ids of their text, uint32 [n], in order; -1 threads is one a core. To be closed.

    Tokenizers release the interpreter while they work, so threads use all cores and copy no text between processes.
    """
    threads = threads if threads > 0 else os.cpu_count() or 1
    waiting: deque = deque()
    with _one_thread_a_call(), ThreadPoolExecutor(threads) as pool:
        try:
            for chunk in _chunks(documents):
                waiting.append((chunk, pool.submit(_encode_chunk, chunk, tokenizer)))
                if len(waiting) > 2 * threads:
                    chunk, ids = waiting.popleft()
                    yield from zip(chunk, ids.result())
            while waiting:
                chunk, ids = waiting.popleft()
                yield from zip(chunk, ids.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of at most CHUNK_CHARACTERS together; a longer one is a list of its own."""
    chunk, size = [], 0
    for document in documents:
        if chunk and size + len(document.text) > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(document)
        size += len(document.text)
    if chunk:
        yield chunk


def _encode_chunk(chunk: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    if len(chunk) == 1:  # perhaps a long text: only one piece of it is held as Python's integers
        return [np.concatenate([np.array(tokenizer.encode_batch([piece])[0], np.uint32) for piece in _pieces(chunk[0].text)])]
    return [np.array(ids, np.uint32) for ids in tokenizer.encode_batch([document.text for document in chunk])]


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
