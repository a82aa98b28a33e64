"""Small tokenizers of the kinds in use, trained on the spot, and text that is hard on them."""

import base64
import io

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spectitan.data.tokenizer import LLAMA3_PATTERN

WORDS = [
    "count",
    "größe",
    "the",
    "returns",
    "naïve",
    "e\u0301a",
    "日本語",
    "12",
    "123456",
    "3.14",
    "don't",
    "I'll",
    "(x)",
    "==",
    "->",
    "👩‍👩‍👧",
    "🇩🇪",
]
GAPS = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", " \n    ", "", ", ", "。", "\u3000"]


def prose(seed: int, words: int) -> str:
    generator = np.random.default_rng(seed)
    return "".join(WORDS[i] + GAPS[j] for i, j in zip(generator.integers(0, len(WORDS), words), generator.integers(0, len(GAPS), words)))


def trained(model, trainer, normalizer=None, pre_tokenizer=None) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = normalizer or normalizers.Sequence([]), pre_tokenizer
    backend.train_from_iterator((prose(seed, 60) for seed in range(25)), trainer)
    return backend


def bpe(normalizer=None, pre_tokenizer=None, vocab_size=500, **keys) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=["<unk>"], **keys)
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, normalizer, pre_tokenizer)


def unsplit_bpe(normalizer=None, pre_tokenizer=None) -> Tokenizer:
    """Trained on words, as sentencepiece does; then used without splitting any."""
    backend = bpe(None, pre_tokenizers.Metaspace())
    backend.normalizer, backend.pre_tokenizer = normalizer or normalizers.Sequence([]), pre_tokenizer
    return backend


def byte_level(*before, normalizer=None) -> Tokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    return bpe(normalizer, pre_tokenizers.Sequence([*before, last]), initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama2() -> Tokenizer:
    return unsplit_bpe(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def gemma() -> Tokenizer:
    return unsplit_bpe(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>")
    return trained(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizers.Metaspace())


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=["[UNK]"])
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())


JSON = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")),
    "qwen": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), normalizer=normalizers.NFC()),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "metaspace": lambda: bpe(None, pre_tokenizers.Metaspace()),
    "llama2": llama2,
    "llama2_unsplit": lambda: unsplit_bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "gemma": gemma,
    "unigram": unigram,
    "word_piece": word_piece,
}
SENTENCEPIECE = {
    "sentencepiece_bpe": {
        "model_type": "bpe",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
    "sentencepiece_unigram": {"model_type": "unigram"},
    "sentencepiece_no_prefix": {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True},
}


def write_json(backend: Tokenizer, folder) -> None:
    backend.add_special_tokens([AddedToken("<|end of turn|>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))


def write_sentencepiece(folder, **keys) -> None:
    model, lines = io.BytesIO(), [line for seed in range(25) for line in prose(seed, 60).splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=330, hard_vocab_limit=False, minloglevel=2, **keys
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_tiktoken(folder) -> None:
    """The tokens of a byte-level BPE as a file of Llama 3's kind."""
    byte_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    vocabulary = sorted(JSON["llama3"]().get_vocab().items(), key=lambda item: item[1])
    tokens = [b"".join(byte_of[character] for character in token) for token, _ in vocabulary if token != "<unk>"]
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))


def write(kind: str, folder):
    """Writes the tokenizer of a kind into a folder that exists."""
    if kind in JSON:
        write_json(JSON[kind](), folder)
    elif kind in SENTENCEPIECE:
        write_sentencepiece(folder, **SENTENCEPIECE[kind])
    else:
        write_tiktoken(folder)
    return folder


KINDS = [*JSON, *SENTENCEPIECE, "tiktoken"]
