"""Where a long text can be cut so that its pieces have the ids of the whole.

Tokenizers cut a text into words (by a regular expression, at spaces, ..), and no token crosses from one word into the next. A cut
between two words changes no id if the words around it stay what they were, which is tried out at every cut. A run of LONGEST_RUN
characters without such a place is cut at its end: ids may differ there.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from spectitan.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 2**18
LONGEST_RUN = 2**20
TORN = "cuts in a run of 2**20 characters that the tokenizer does not split: ids may differ there"
_SEARCHED = 512  # characters before the end of a piece among which a place is sought first
_BEFORE, _AFTER = 32, 64  # characters around a place that are looked at
_WORDS_BEFORE, _TRIES = 16, 64


class Piece(NamedTuple):
    start: int  # characters [start, stop) of the text
    stop: int
    torn: bool  # cut off where ids may change


def pieces(text: str, tokenizer: Tokenizer, encode: Callable[[str], list[int]] | None = None) -> Iterator[Piece]:
    """The text in pieces of about PIECE_CHARACTERS, at most LONGEST_RUN.

    Args:
        encode: gives the ids that must not change; tokenizer.encode.
    """
    search, start = _Search(text, tokenizer, encode or tokenizer.encode), 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = search.near(start, start + PIECE_CHARACTERS)
        if cut is None and len(text) - start <= LONGEST_RUN:
            break
        end = start + LONGEST_RUN
        cut = cut or search.last(start, end)
        stop, following = cut or (end, end)
        yield Piece(start, stop, torn=cut is None)
        start = following
    yield Piece(start, len(text), torn=False)


class _Search:
    """Cuts are pairs: where a piece ends, and where the next begins, there or behind the space that begins a word: some tokenizers put one
    before every text."""

    def __init__(self, text: str, tokenizer: Tokenizer, encode: Callable[[str], list[int]]):
        self._text, self._tokenizer, self._encode = text, tokenizer, encode

    def near(self, start: int, stop: int) -> tuple[int, int] | None:
        """A cut in the _SEARCHED characters before `stop` that is one whatever the text before: wherever a word begins there."""
        first = max(start, stop - _SEARCHED)
        for place in self._in_turn(self._starts(first, stop)):
            cut = place - first >= _BEFORE and self._cut(place, range(place - _BEFORE, place))
            if cut:
                return cut
        return None

    def last(self, start: int, stop: int) -> tuple[int, int] | None:
        """A late cut in (start, stop). A word begins at `start`, so that all words from there on are those of the whole text."""
        places = self._starts(start, stop)
        for place in self._in_turn(places):
            i = bisect_left(places, place)
            cut = place > start and self._cut(place, [places[i - _WORDS_BEFORE] if i >= _WORDS_BEFORE else start])
            if cut:
                return cut
        return None

    def _starts(self, first: int, stop: int) -> list[int]:
        """Where words may begin, up to `stop`."""
        starts = self._tokenizer.word_starts(self._text[first : stop + _AFTER])
        return [first + start for start in starts if start <= stop - first]

    def _in_turn(self, places: list[int]) -> Iterator[int]:
        """The places to try, last first: where a space begins the word, then others."""
        spaces = [place for place in places if self._text[place] == " "]
        others = [place for place in places if self._text[place] != " "]
        return chain(reversed(spaces[-_TRIES:]), reversed(others[-_TRIES:]))

    def _cut(self, place: int, befores: Sequence[int]) -> tuple[int, int] | None:
        """The cut at `place`, if it changes neither ids nor words of a text that begins at any of `befores`."""
        words, after = self._tokenizer.words, self._text[place : place + _AFTER]
        lefts = [self._text[before:place] for before in befores]
        for skipped in (0, 1) if after.startswith(" ") else (0,):
            if self._encode(lefts[0] + after) != self._encode(lefts[0]) + self._encode(after[skipped:]):
                continue
            right = words(after[skipped:])
            if all(words(left + after) == words(left) + right for left in lefts):
                return place, place + skipped
        return None
