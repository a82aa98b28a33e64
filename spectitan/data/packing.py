"""Samples by concatenation: the documents of a dataset, in their fixed order, as one stream that is cut every seq_length tokens."""

from typing import NamedTuple

import numpy as np

from spectitan.data.shards import Shards


class Sample(NamedTuple):
    tokens: np.ndarray  # int64 [seq_length]; 0 in the padding
    documents: np.ndarray  # int64 [seq_length]; 0, 1, 2, ... for the parts of documents in it, -1 in the padding


class PackedDataset:
    """Samples of one dataset, the same in every epoch and for every seed.

    Every token of the dataset stands in exactly one sample; only the last one is padded. A document that is cut goes on in the
    next sample as a document of its own.
    """

    def __init__(self, shards: Shards, seq_length: int):
        self._shards, self._seq_length = shards, seq_length

    def __len__(self) -> int:
        return -(-self._shards.num_tokens // self._seq_length)

    def __getitem__(self, sample: int) -> Sample:
        shards, seq_length = self._shards, self._seq_length
        begin = sample * seq_length
        end = min(begin + seq_length, shards.num_tokens)
        tokens = np.zeros(seq_length, np.int64)
        documents = np.full(seq_length, -1, np.int64)
        row = int(np.searchsorted(shards.stream, begin, side="right")) - 1
        position, ordinal = begin, 0
        while position < end:
            document_begin, document_end = int(shards.stream[row]), int(shards.stream[row + 1])
            length = min(document_end, end) - position
            offset = int(shards.offsets[shards.order[row]]) + position - document_begin
            filled = slice(position - begin, position - begin + length)
            tokens[filled] = shards.read(offset, offset + length)
            documents[filled] = ordinal
            position, row, ordinal = position + length, row + 1, ordinal + 1
        return Sample(tokens, documents)
