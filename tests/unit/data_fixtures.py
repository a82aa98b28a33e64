"""Text, tokenizers and configurations for tests of the data package."""

from pathlib import Path

import numpy as np

from spectitan.config.sections import Data
from spectitan.data.tokenizer import Tokenizer, train_bpe

WORDS = ["größe", "naïve", "日本語", "count", "self", "return", "😀", "x", "\n    ", "\n", " = ", "0.5"]


class ByteTokenizer(Tokenizer):
    """One id a byte: what the data package needs of a tokenizer, and nothing that takes time. Ids of the bytes are 2 .. 257."""

    vocab_size, fingerprint = 258, "bytes"

    def __init__(self, bos_id: int | None = None, eos_id: int | None = 0):
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode_batch(self, texts):
        return [(np.frombuffer(text.encode(), np.uint8).astype(int) + 2).tolist() for text in texts]

    def encode_rendered(self, text):
        return self.encode(text), [i for i, character in enumerate(text) for _ in character.encode()]

    def decode(self, ids):
        return bytes(i - 2 for i in ids if i >= 2).decode(errors="replace")

    def words(self, text):
        return list(text)

    def word_starts(self, text):
        return list(range(len(text)))


def text(number: int, words: int = 40) -> str:
    """Different for each number; as many words as asked for."""
    return f"{number} " + " ".join(WORDS[((number + 1) * (i + 1) * 2654435761 >> 9) % len(WORDS)] for i in range(words))


def write_texts(folder: Path, texts: dict[str, str | bytes]) -> Path:
    for name, content in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def make_data(folder: Path, **keys) -> Data:
    """A configuration of folder/text, with a cache beside it."""
    return Data(**({"path": str(folder / "text"), "cache_dir": str(folder / "cache"), "seq_length": 17} | keys))


def tokenizer_folder(folder: Path, vocab_size: int = 300) -> Path:
    """A folder with the tokenizer.json of a small byte-level BPE."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(train_bpe([text(i) for i in range(20)], vocab_size), encoding="utf-8")
    return folder


def documents_of(shards) -> list[list[int]]:
    """The ids of each document, in the order in which they were written."""
    return [shards.read(int(begin), int(end)).tolist() for begin, end in zip(shards.offsets, shards.offsets[1:])]


def masks_of(shards) -> list[list[bool]]:
    """Which ids of each document may be targets."""
    spans = zip(shards.offsets.tolist(), shards.offsets[1:].tolist())
    return [np.broadcast_to(shards.read_mask(begin, end), end - begin).tolist() for begin, end in spans]
