"""Evaluation prompts cut from held-out text: what eval.prompts reads."""

import json
from collections.abc import Iterable

from spectitan.data.documents import Document
from spectitan.data.tokenizer import Tokenizer
from spectitan.keyed_random import uniform

# At least the window by which overlap with training text is found (data/overlap.py).
MIN_TOKENS, MAX_TOKENS = 64, 128


def cut_prompts(documents: Iterable[Document], tokenizer: Tokenizer, count: int, seed: int) -> str:
    """JSON lines {"tokens": [ids], "source": name} of `count` prompts, or fewer if the documents do not give as many.

    Each begins at the start of a line and is MIN_TOKENS to MAX_TOKENS long. Place, length and choice are keyed by the seed;
    documents take turns, so that the prompts come from as many of them as can be.
    """
    candidates = []
    for number, document in enumerate(documents):
        lines = document.text.splitlines(keepends=True)
        for turn in range(1 + count // 8):
            place, length, order = (float(uniform(seed, number, turn, purpose)) for purpose in range(3))
            text = "".join(lines[int(place * len(lines)) :])[: 16 * MAX_TOKENS]
            ids = tokenizer.prompt(tokenizer.encode(text))
            size = MIN_TOKENS + int(length * (MAX_TOKENS - MIN_TOKENS + 1))
            if len(ids) > size:  # the text goes on after the prompt
                candidates.append((turn, order, {"tokens": ids[:size], "source": document.source}))
    candidates.sort(key=lambda candidate: candidate[:2])
    return "".join(json.dumps(prompt) + "\n" for _, _, prompt in candidates[:count])
