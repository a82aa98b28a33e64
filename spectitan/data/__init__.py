"""Text to batches: tokenizers, documents, shards, the order of samples, and the loader."""

from spectitan.data.corpus import tokenise_held_out, tokenise_training
from spectitan.data.loader import Loader, build_loader
from spectitan.data.overlap import count_overlap
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, train_bpe
from spectitan.data.validation import build_validation

__all__ = [
    "Loader", "StreamDecoder", "Tokenizer", "build_loader", "build_validation", "count_overlap", "load_prompts", "load_tokenizer",
    "tokenise_held_out", "tokenise_training", "train_bpe",
]  # fmt: skip
