"""A long text is tokenised in pieces, and its ids are those of the whole."""

import random
from collections import Counter

import pytest

from spectitan.data import splitting
from spectitan.data.corpus import tokenise_training
from spectitan.data.documents import Document, PromptResponse
from spectitan.data.encoding import encode, encoded
from spectitan.data.rendering import Rendered
from spectitan.data.splitting import TORN, pieces
from spectitan.data.tokenizer import load_tokenizer
from tests.unit.data_fixtures import documents_of, make_data, write_texts
from tests.unit.tokenizer_fixtures import KINDS, prose, write

PIECE, RUN = 400, 1500


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(write(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return load_tokenizer(write("llama3", tmp_path_factory.mktemp("llama3")))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(splitting, "PIECE_CHARACTERS", PIECE)
    monkeypatch.setattr(splitting, "LONGEST_RUN", RUN)
    monkeypatch.setattr(splitting, "_SEARCHED", 150)


def drawn(characters, size: int) -> str:
    return "".join(random.Random(size).choices(characters, k=size))


LETTERS = drawn("abcdefghijklmnop", 4999)
HARD = [
    drawn(["日", "本", "語", "字", "。", "、", "12", "\n", " "], 4001),
    " ".join(drawn("0123456789", length) for length in range(1, 200, 7)),
    " ".join(drawn("abXY0189+/", 701) for _ in range(5)),  # spaces, but none near where a piece should end
    "".join(gap * length + "x" for length, gap in enumerate(drawn([" ", "\n", "\t"], 80))),
    "abc <|end of turn|> def<|end of turn|>" * 60,
    "e\u0301a\u0308 x" * 400,  # composed by NFC
    "\r\n" * 701,
    LETTERS,
]


def check(text, tokenizer) -> int:
    """Pieces have the ids of the whole if none is torn; returns how many are."""
    found, whole = list(pieces(text, tokenizer)), tokenizer.encode(text)
    assert found[0].start == 0 and found[-1].stop == len(text)
    assert all(0 < piece.stop - piece.start <= RUN for piece in found)
    # Between pieces at most the space is missing that the tokenizer puts before the next one.
    assert all(text[left.stop : right.start] in ("", " ") for left, right in zip(found, found[1:]))
    torn = sum(piece.torn for piece in found)
    assert torn or [id for start, stop, _ in found for id in tokenizer.encode(text[start:stop])] == whole
    return torn


def test_pieces_have_the_ids_of_the_whole(tokenizer):
    assert check(prose(99, 1500), tokenizer) == 0
    for text in HARD:
        check(text, tokenizer)
    assert check("x" * PIECE, tokenizer) == 0 and list(pieces("", tokenizer)) == [(0, 0, False)]


def test_only_runs_that_the_pre_tokenizer_does_not_split_are_torn(llama3):
    """Its words are at most three digits: counted from the first digit, wherever a piece ends."""
    assert [check(text, llama3) for text in HARD[:6]] == [0] * 6
    assert check("0123456789" * 800, llama3) == 0
    torn = list(pieces("so " + LETTERS + " it is", llama3))
    assert [piece.torn for piece in torn] == [False, True, True, True, False][-len(torn) :]
    assert {piece.stop - piece.start for piece in torn if piece.torn} == {RUN}


def test_all_contents_are_tokenised_in_pieces(llama3):
    text, answer = prose(5, 700), prose(6, 700)
    ids, answer_ids = llama3.encode(text), llama3.encode(answer)
    documents = [Document(content, "a", 0) for content in ("short", text, PromptResponse(text, answer), "x", text + answer)]
    noted = Counter()
    results = [result for _, result in encoded(documents, llama3, 3, noted)]
    assert results[1].ids.tolist() == llama3.document(ids) and results[4].ids.tolist() == llama3.encode(text + answer)
    assert results[2].ids.tolist() == ids + answer_ids and results[2].mask.tolist() == [False] * len(ids) + [True] * len(answer_ids)
    assert results[3].ids.tolist() == llama3.encode("x") and not noted
    span = (len(text) // 2, len(text) - 7)
    rendered = encode(Rendered(text, (span,), answer), llama3)
    whole, starts = llama3.encode_rendered(text)
    assert rendered.ids.tolist() == whole + answer_ids
    assert rendered.mask.tolist() == [span[0] <= start < span[1] for start in starts] + [True] * len(answer_ids)


def test_torn_texts_are_counted(llama3, tmp_path):
    write_texts(tmp_path / "text", {"a.txt": LETTERS, "b.txt": "short", "c.txt": LETTERS + LETTERS})
    ((_, shards),) = tokenise_training(make_data(tmp_path), llama3)
    assert shards.meta["noted"] == {TORN: 3 + 6}
    assert len(documents_of(shards)) == 3
