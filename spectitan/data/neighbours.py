"""Where no token can cross, of tokenizers that split no words."""

from collections.abc import Iterable


class Neighbours:
    """Where no token of a vocabulary can cross: between characters that are neighbours in none. For tokenizers that split no words, as
    sentencepiece, whose tokens have a space at most at their beginning."""

    def __init__(self, tokens: Iterable[str]):
        self._pairs, self._characters = set(), set()
        for token in tokens:
            self._pairs.update(map("".join, zip(token, token[1:])))
            self._characters.update(token)

    def starts(self, text: str) -> list[int]:
        """Places in the text that no token crosses. None between two unknown characters, which may become one token for unknown."""
        pairs, known = self._pairs, self._characters
        inner = (i for i, pair in enumerate(map("".join, zip(text, text[1:])), 1) if pair not in pairs)
        return [0, *(i for i in inner if text[i] in known or text[i - 1] in known)] if text else []

    def parts(self, text: str) -> list[str]:
        """The text, cut there."""
        starts = self.starts(text)
        return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)])]
