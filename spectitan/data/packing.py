"""Samples by concatenation: the documents of a dataset, in their fixed order, as one stream that is cut every seq_length tokens."""

import numpy as np

from spectitan.data.shards import Shards


class PackedDataset:
    """Samples of one dataset, the same in every epoch and for every seed.

    Every token of the dataset stands in exactly one sample; only the last one is padded. A document that is cut goes on in the
    next sample as a document of its own: of a chat that is cut, the rest of an answer is supervised without what came before it.
    """

    def __init__(self, shards: Shards, seq_length: int):
        self._shards, self._seq_length = shards, seq_length

    def __len__(self) -> int:
        return -(-self._shards.num_tokens // self._seq_length)

    @property
    def masked(self) -> bool:
        """Whether any token is kept from being a target."""
        return self._shards.masked

    def read_into(self, sample: int, tokens: np.ndarray, documents: np.ndarray, mask: np.ndarray | None) -> None:
        """Fills [seq_length] arrays.

        Args:
            tokens: int64, the ids; 0 in the padding.
            documents: int64, 0, 1, 2, ... for the parts of documents; -1 in the padding.
            mask: bool, whether the token may be a target; the padding is left as it is. None, if it is not wanted.
        """
        shards = self._shards
        begin = sample * self._seq_length
        end = min(begin + self._seq_length, shards.num_tokens)
        row = int(np.searchsorted(shards.stream, begin, side="right")) - 1
        position, ordinal = begin, 0
        while position < end:
            document_begin, document_end = int(shards.stream[row]), int(shards.stream[row + 1])
            length = min(document_end, end) - position
            offset = int(shards.offsets[shards.order[row]]) + position - document_begin
            filled = slice(position - begin, position - begin + length)
            tokens[filled] = shards.read(offset, offset + length)
            documents[filled] = ordinal
            if mask is not None:
                mask[filled] = shards.read_mask(offset, offset + length)
            position, row, ordinal = position + length, row + 1, ordinal + 1
        tokens[end - begin :] = 0
        documents[end - begin :] = -1
