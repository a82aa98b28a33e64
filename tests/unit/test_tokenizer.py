"""Tokenizers give the ids of the libraries that define their files, and text comes back."""

import base64
import io
import json
import random

import pytest
import regex
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from spectitan.data.tokenizer import (
    LLAMA3_PATTERN,
    JsonTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    TiktokenTokenizer,
    load_tokenizer,
    train_bpe,
)
from spectitan.errors import UserError
from tests.unit.data_fixtures import text, tokenizer_folder
from tests.unit.tokenizer_fixtures import JSON, KINDS, SENTENCEPIECE, prose, write

try:
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
except ImportError:  # transformers before 5
    from transformers.models.llama.tokenization_llama import LlamaTokenizer as SentencePieceBackend

TEXTS = ["", "a", text(3), "  two  spaces\n\n\tand a tab", "größe = 'naïve'\r\n", "日本語 😀 mixed", "x" * 500, "\x00\x7f", "don't 12345"]


def with_bos(folder):
    """Makes the folder's tokenizer put a token <s> before a text, as Llama's do."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    backend.save(str(folder / "tokenizer.json"))
    return backend.token_to_id("<s>")


def test_tokenizer_json_gives_the_ids_of_transformers(tmp_path):
    folder = tokenizer_folder(tmp_path)
    bos = with_bos(folder)
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert isinstance(ours, JsonTokenizer) and (ours.bos_id, ours.eos_id) == (bos, None)
    assert ours.vocab_size == len(theirs) == 301
    assert ours.encode_batch(TEXTS) == [theirs(content, add_special_tokens=False).input_ids for content in TEXTS]
    assert [ours.encode(content) for content in TEXTS] == ours.encode_batch(TEXTS)
    assert [ours.prompt(ours.encode(content)) for content in TEXTS] == [theirs(content).input_ids for content in TEXTS]
    assert [ours.decode(ours.document(ours.encode(content))) for content in TEXTS] == TEXTS


# Emoji joined and coloured, flags, right to left with its marks, line ends, NUL, byte order marks, spaces at the ends.
RARE = [
    "👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 🇩🇪🇫🇷🇩",
    "مرحبا بالعالم שלום \u200fabc\u200e",
    "a\r\nb\r\r\n\n",
    "a\0b\0\0",
    "\ufeffabc \ufeff",
    "  two   ends  ",
    "\n",
    " ",
]
CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]  # all but halves of pairs, which are no characters


def oracle(kind: str, folder):
    """Text to ids, as transformers reads the folder."""
    if kind in JSON:
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    elif kind in SENTENCEPIECE:
        theirs = SentencePieceBackend(vocab_file=str(folder / "tokenizer.model"))
    else:
        theirs = PreTrainedTokenizerFast(tokenizer_object=TikTokenConverter(vocab_file=str(folder / "tokenizer.model")).converted())
    return lambda content: theirs(content, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_rare_characters_have_the_ids_of_transformers(tmp_path, kind):
    ours, theirs = load_tokenizer(write(kind, tmp_path)), oracle(kind, tmp_path)
    texts = [*RARE, prose(7, 200), "".join(map(chr, random.Random(11).choices(CODE_POINTS, k=10_000)))]
    assert ours.encode_batch(texts) == [theirs(content) for content in texts]
    assert [ours.encode(content) for content in texts] == ours.encode_batch(texts)
    if kind == "sentencepiece_bpe":  # by another implementation too; which puts no space before a text that begins with one
        converted = LlamaTokenizer.from_pretrained(str(tmp_path))
        texts = [content for content in texts if not content.startswith(" ")]
        assert ours.encode_batch(texts) == [converted(content, add_special_tokens=False).input_ids for content in texts]


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece_bpe", "tiktoken"])
def test_the_model_may_have_more_ids_than_the_tokenizer_and_not_fewer(tmp_path, kind):
    size = load_tokenizer(write(kind, tmp_path)).vocab_size
    tokenizer = load_tokenizer(tmp_path, size + 100)
    ids = tokenizer.encode("count the returns")
    assert tokenizer.vocab_size == size and max(ids) < size
    assert tokenizer.decode([*ids, size + 7]) == tokenizer.decode(ids) != ""
    with pytest.raises(UserError, match=f"the tokenizer has {size} tokens, the model {size - 1}; allowed: at most as many"):
        load_tokenizer(tmp_path, size - 1)


def test_bos_and_eos_come_from_the_settings_beside_the_tokenizer(tmp_path):
    folder = tokenizer_folder(tmp_path)
    bos = with_bos(folder)
    settings, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    plain = load_tokenizer(folder)

    generation.write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_tokenizer(folder).eos_id == 7
    settings.write_text(json.dumps({"add_bos_token": False, "bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}}))
    changed = load_tokenizer(folder)
    assert (changed.bos_id, changed.eos_id) == (None, 0)
    assert changed.document([5]) == [5, 0]
    assert changed.fingerprint != plain.fingerprint
    settings.write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": None}))
    assert load_tokenizer(folder).document([5]) == [bos, 5, 7]


def train_sentencepiece(path):
    model = io.BytesIO()
    lines = [line for i in range(200) for line in text(i).splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def test_a_sentencepiece_model_is_known_by_its_content(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert isinstance(ours, SentencePieceTokenizer) and ours.vocab_size == 320
    assert ours.encode_batch(TEXTS) == [theirs.encode(content) for content in TEXTS]
    assert ours.document(ours.encode("x")) == [theirs.bos_id(), *theirs.encode("x"), theirs.eos_id()]
    assert ours.decode(ours.document(ours.encode(text(3)))) == text(3)


def test_rendered_text_keeps_its_special_tokens_and_says_where_ids_begin(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    parts = ["<s>", "größe 日本", "</s>", "<s>", "count x", "</s>"]
    expected = [[theirs.bos_id()] if part == "<s>" else [theirs.eos_id()] if part == "</s>" else theirs.encode(part) for part in parts]
    ids, starts = ours.encode_rendered("".join(parts))
    assert ids == sum(expected, [])
    begins = [len("".join(parts[:i])) for i in range(len(parts))]
    assert [starts[len(sum(expected[:i], []))] for i in range(len(parts))] == begins and starts == sorted(starts)
    (count,) = (i for i, id in enumerate(ids) if theirs.id_to_piece(id).endswith("x"))
    assert "".join(parts)[starts[count] :].lstrip().startswith("x")


def byte_pairs(content: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding by its definition: in each word, join the neighbours of lowest rank until none is in the table."""
    ids = []
    for word in regex.findall(LLAMA3_PATTERN, content):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            joined = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
            if not joined or min(joined) == len(ranks):
                break
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_a_tiktoken_file_is_known_by_its_content(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"re", b"se", b" c", b"ou", b"nt", b" cou", b"\xc3\xb6", b"gr", "grö".encode(), b"12", b"\n\n", b"  "]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, TiktokenTokenizer)
    ranks = {token: i for i, token in enumerate(tokens)}
    assert ours.encode_batch(TEXTS) == [byte_pairs(content, ranks) for content in TEXTS]
    # Llama 3's places: begin_of_text and end_of_text are the first two special tokens, eot_id the tenth.
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (len(tokens), len(tokens) + 1, len(tokens) + 256)
    assert ours.encode("<|eot_id|>") == [len(tokens) + 9]
    rendered = "<|begin_of_text|>größe<|eot_id|>count"
    ids, starts = ours.encode_rendered(rendered)
    assert ids == [len(tokens), *ours.encode("größe"), len(tokens) + 9, *ours.encode("count")]
    assert [starts[0], starts[1], starts[1 + len(ours.encode("größe"))]] == [0, 17, 22] and starts[-len(ours.encode("count"))] == 32
    assert [ours.decode(ours.document(ours.encode(content))) for content in TEXTS] == TEXTS


def test_training_a_tokenizer(tmp_path):
    texts = [text(i) for i in range(20)]
    content = train_bpe(iter(texts), 300)
    assert content == train_bpe(texts, 300)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 300 and tokenizer.encode("<|endoftext|>") == [0]
    anything = bytes(range(128)).decode() + "\U0010ffff\ud7ff"
    assert tokenizer.decode(tokenizer.encode(anything)) == anything
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode())
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(texts, 256)


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_streamed_text_is_the_text(tmp_path, kind):
    if kind == "json":
        tokenizer_folder(tmp_path)
    else:
        train_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    content = "größe 日本語 😀 naïve x " + text(5)
    ids = tokenizer.encode(content)
    for prompt_length, step in ((0, 1), (0, 3), (3, 1), (9, 2)):
        decoder = StreamDecoder(tokenizer, context=ids[:prompt_length])
        pushed = [decoder.push(ids[i : i + step]) for i in range(prompt_length, len(ids), step)]
        assert not any("\ufffd" in part for part in pushed)
        prefix = tokenizer.decode(ids[:prompt_length])
        assert tokenizer.decode(ids).startswith(prefix.rstrip("\ufffd"))
        if not prefix.endswith("\ufffd"):
            assert prefix + "".join(pushed) + decoder.finish() == tokenizer.decode(ids)


def test_a_stream_shows_invalid_bytes_instead_of_waiting_for_ever(tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    first_byte = tokenizer.encode("😀")[:1]
    decoder = StreamDecoder(tokenizer)
    shown = "".join(decoder.push(first_byte) for _ in range(20))
    assert len(shown) >= 15 and set(shown) == {"\ufffd"}
    assert set(shown + decoder.finish()) == {"\ufffd"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in this folder; allowed: one with tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "not a tokenizer.json that"),
        ({"tokenizer.json": b"\xff\xfe"}, "not a tokenizer.json that"),
        ({"tokenizer.model": b"\x00\x01 nothing"}, "neither a sentencepiece model nor a tiktoken file"),
        ({"tokenizer.model": b""}, "neither a sentencepiece model nor a tiktoken file"),
        ({"tokenizer.model": b"YQ== 0\nYg== one\n"}, "tokenizer.model:2: not a line of a tiktoken file"),
        ({"tokenizer.model": b"YQ== 0\nYg== 2\n"}, "ranks are not 0 .. 1"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_such_folder_and_broken_settings(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: not valid JSON"):
        load_tokenizer(tmp_path)
