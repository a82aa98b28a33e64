"""Evaluation prompts cut from held-out text: what eval.prompts reads."""

import heapq
import json
from collections import Counter
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
    """(turn, place in it, prompt). A later turn has no document while there are enough prompts of earlier ones."""
    of_turn: Counter[int] = Counter()
    for number, document in enumerate(documents):
        content, cut, turns = document.content, _of_text, 1 + count // 8
        if isinstance(content, Ids) and content.mask is None:
            cut = _of_ids
        elif not isinstance(content, str):
            cut, turns = _before_the_answer, 1
        for turn in range(turns):
            if sum(of_turn[earlier] for earlier in range(turn)) >= count:
                break
            place, length, rank = (float(uniform(seed, number, turn, purpose)) for purpose in range(3))
            ids = cut(content, place, MIN_TOKENS + int(length * (MAX_TOKENS - MIN_TOKENS + 1)), tokenizer)
            if ids:
                of_turn[turn] += 1
                yield turn, rank, {"tokens": ids, "source": document.source}


def _of_text(text: str, place: float, size: int, tokenizer: Tokenizer) -> list[int] | None:
    """`size` tokens from a place in the text, 0 to 1, on; None if it does not go on after them."""
    lines = text.splitlines(keepends=True)
    excerpt = "".join(lines[int(place * len(lines)) :])[: 16 * MAX_TOKENS]
    ids = tokenizer.prompt(tokenizer.encode(excerpt))
    return ids[:size] if len(ids) > size else None


def _of_ids(content: Ids, place: float, size: int, tokenizer: Tokenizer) -> list[int] | None:
    """As `_of_text`."""
    text = content.ids[1:] if content.ids[0] == tokenizer.bos_id else content.ids
    begin = int(place * len(text))
    ids = tokenizer.prompt(text[begin : begin + size + 1].tolist())
    return ids[:size] if len(ids) > size else None


def _before_the_answer(content: tuple, place: float, size: int, tokenizer: Tokenizer) -> list[int]:
    ids, mask = encode(content, tokenizer)
    return ids[: int(mask.argmax())].tolist()
