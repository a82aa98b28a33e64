"""Evaluation prompts cut from held-out text: what eval.prompts reads."""

import heapq
import json
from collections.abc import Iterable, Iterator

from spectitan.data.documents import Document, Ids
from spectitan.data.encoding import encode
from spectitan.data.tokenizer import Tokenizer
from spectitan.keyed_random import uniform

# At least the window by which overlap with training text is found (data/overlap.py).
MIN_TOKENS, MAX_TOKENS = 64, 128


def cut_prompts(documents: Iterable[Document], tokenizer: Tokenizer, count: int, seed: int) -> str:
    """JSON lines {"tokens": [ids], "source": name} of `count` prompts, or fewer if the documents do not give as many.

    From a text, each begins at the start of a line, or where it is given as ids at any of them, and is MIN_TOKENS to MAX_TOKENS long;
    place and length are keyed by the seed.
    Of a document with a mask, it is all before the first supervised token. Documents take turns, so that the prompts come from
    as many of them as can be.

    Args:
        documents: as data.rendering.rendered gives them.
    """
    first = heapq.nsmallest(count, _candidates(documents, tokenizer, count, seed), key=lambda candidate: candidate[:2])
    return "".join(json.dumps(prompt) + "\n" for _, _, prompt in first)


def _candidates(documents: Iterable[Document], tokenizer: Tokenizer, count: int, seed: int) -> Iterator[tuple[int, float, dict]]:
    for number, document in enumerate(documents):
        cut = _of_text if isinstance(document.content, str) else _before_the_answer
        if isinstance(document.content, Ids) and document.content.mask is None:
            cut = _of_ids
        for turn, ids in cut(document.content, number, tokenizer, count, seed):
            yield turn, float(uniform(seed, number, turn, 2)), {"tokens": ids, "source": document.source}


def _of_text(text: str, number: int, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    lines = text.splitlines(keepends=True)
    for turn, place, size in _windows(number, count, seed):
        excerpt = "".join(lines[int(place * len(lines)) :])[: 16 * MAX_TOKENS]
        ids = tokenizer.prompt(tokenizer.encode(excerpt))
        if len(ids) > size:  # the text goes on after the prompt
            yield turn, ids[:size]


def _of_ids(content: Ids, number: int, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    text = content.ids[1:] if content.ids[0] == tokenizer.bos_id else content.ids
    for turn, place, size in _windows(number, count, seed):
        begin = int(place * len(text))
        ids = tokenizer.prompt(text[begin : begin + size + 1].tolist())
        if len(ids) > size:
            yield turn, ids[:size]


def _windows(number: int, count: int, seed: int) -> Iterator[tuple[int, float, int]]:
    """(turn, place in the text from 0 to 1, tokens) of the prompts that a document may give."""
    for turn in range(1 + count // 8):
        place, length = (float(uniform(seed, number, turn, purpose)) for purpose in range(2))
        yield turn, place, MIN_TOKENS + int(length * (MAX_TOKENS - MIN_TOKENS + 1))


def _before_the_answer(content: tuple, number: int, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    ids, mask = encode(content, tokenizer)
    prompt = ids[: int(mask.argmax())].tolist()
    if prompt:
        yield 0, prompt
