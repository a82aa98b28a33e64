"""What the bases share: decoder layers that attend inside documents or over a cache, between the two ends of the Readout."""

import contextlib
import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import Rotation, assign, attention_bias, draw_normal, positions_in_documents
from spectitan.models.packed_attention import can_flex, document_block_mask
from spectitan.models.readout import Readout
from spectitan.types import BaseStates


class DecoderConfig:
    """What is known of every base. A family's config is a dataclass with these fields and its own."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_embeddings: bool
    initializer_range: float
    model_type: str  # the family's name in Hugging Face's config.json
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None

    def identity(self) -> dict:
        """What the function of the model depends on, weights aside."""
        beside = ("max_position_embeddings", "initializer_range", "model_type", "bos_token_id", "eos_token_id")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in beside}


class Decoder(nn.Module):
    """A decoder that returns hidden states; logits are `readout.logits(states.final)`.

    A family says what its layers are (`build_layer`), how tokens get their positions (`place`), how many weights a token meets
    (`weights_per_token`), and where Hugging Face's checkpoints keep its parameters (`hf_names`).

    Args:
        config: shape and options. Parameters are not initialised: call `init_weights` or load them.
        readout: its ends.
        sliding_window: a token sees itself and the window - 1 before it; -1: all.
    """

    def __init__(self, config: DecoderConfig, readout: Readout, sliding_window: int = -1):
        super().__init__()
        self.config, self.sliding_window = config, sliding_window
        self.readout = readout
        self.layers = nn.ModuleList(self.build_layer() for _ in range(config.num_layers))

    def build_layer(self) -> nn.Module:
        raise NotImplementedError

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """Embedded tokens [batch, m, hidden] at positions, int64 [batch or 1, m]: what the first layer takes in, and the
        rotation of queries and keys."""
        raise NotImplementedError

    def weights_per_token(self) -> int:
        """Numbers in the matrices of all layers that a token is multiplied with."""
        raise NotImplementedError

    def hf_names(self, name: str) -> list[str]:
        """Names of the tensors that hold one of our parameters.

        Several: one for each index of its first dimension. Parameters with one name stand there one below the other.
        """
        raise NotImplementedError

    def init_weights(self, generator: torch.Generator) -> None:
        """Draws all parameters in full from one CPU generator, in a fixed order.

        Normal with `initializer_range`; projections back into the residual stream are scaled by 1 / sqrt(2 * num_layers), so
        that the stream's variance does not grow with depth (GPT-2). Norms are 1, biases 0.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                assign(parameter, torch.zeros(parameter.shape))
            elif "norm" in name:
                assign(parameter, torch.ones(parameter.shape))
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                draw_normal(parameter, std / math.sqrt(2 * self.config.num_layers), generator)
            else:
                draw_normal(parameter, std, generator)

    def drop_layers(self) -> None:
        """For a run that reads its hidden states from disk: the readout is all it uses. To be called before weights are read."""
        self.layers = nn.ModuleList()

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots a row, on the device of the weights."""
        return KVCache(self.config.num_layers, batch, length, self.readout.norm.weight.device)

    def flops(self, tokens: int, seq_length: int) -> int:
        """Floating-point operations of the matrix products of a forward without the head: 2 a multiply-add.

        Args:
            tokens: in the whole batch.
            seq_length: tokens a causal row; half of its scores are useful.
        """
        attention = self.config.num_heads * self.config.head_dim
        return 2 * tokens * (self.weights_per_token() + self.config.num_layers * attention * (seq_length + 1))

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        taps: tuple[int, ...] = (),
    ) -> BaseStates:
        """Hidden states of every token.

        Without a cache, attention is causal inside each document and positions restart with it. With one, keys and values go
        into slots cache.lengths + 0 .. m - 1, and the caller commits what it keeps.

        Args:
            tokens: int64 [batch, m].
            document_ids: int64 [batch, m], equal inside a document, -1 for padding, which ends a row; None: one document a row. Not
                with a cache.
            cache: from `new_cache`.
            positions: int64 [batch, m]; None: as described above.
            mask: bool [batch, m, slots], which slots a token sees, itself included, for trees; slots may end at the last one
                written or beyond. None: all slots up to its own. Only with a cache.
            taps: layer ids whose states are returned: id k enters layer k, num_layers is before the final norm.
        """
        assert all(0 <= tap <= self.config.num_layers for tap in taps), f"taps {taps} of {self.config.num_layers} layers"
        x = self.readout.embed(tokens)
        if cache is None:
            assert mask is None, "a mask over slots needs a cache"
            positions, bias = self._document_attention(tokens, document_ids, positions, x.dtype)
            slots = None
        else:
            assert document_ids is None, "a cached row is one document"
            slots = cache.next_slots(tokens.shape[1])
            positions = slots.index if positions is None else positions
            bias = self._cache_attention(slots, positions, mask, x.dtype)
        x, rotation = self.place(x, positions)
        kept = {}
        with self._eager(cache):
            for index, layer in enumerate(self.layers):
                if index in taps:
                    kept[index] = x
                x = layer(x, rotation, bias, cache, index, slots)
        kept[len(self.layers)] = x
        return BaseStates(self.readout.final(x), tuple(kept[tap] for tap in taps))

    def _document_attention(
        self, tokens: Tensor, document_ids: Tensor | None, positions: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | BlockMask | None]:
        """Positions int64 [batch or 1, seq], and the mask of attention, None where it is plainly causal."""
        length, window = tokens.shape[1], self.sliding_window
        index = torch.arange(length, device=tokens.device)
        # On a GPU this question would wait for the device; compiled layers would be compiled once more for the answer.
        if document_ids is not None and document_ids.device.type == "cpu" and not self._is_compiled():
            if bool(((document_ids == document_ids[:, :1]) | (document_ids < 0)).all()):
                document_ids = None  # one document a row, which does not see the padding after it
        if positions is None:
            positions = index[None] if document_ids is None else positions_in_documents(document_ids)
        if document_ids is None and not 0 < window < length:
            return positions, None
        if length > 1 and can_flex(tokens.device, dtype, self.config.head_dim):
            ids = torch.zeros_like(tokens) if document_ids is None else document_ids
            return positions, document_block_mask(ids, window if window > 0 else length)
        visible = (index <= index[:, None])[None]
        if 0 < window < length:
            visible = visible & (index > index[:, None] - window)
        if document_ids is not None:
            visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])
        return positions, attention_bias(visible, dtype)

    def _cache_attention(self, slots: Slots, positions: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Bias of attention over the slots, None for single tokens that see every slot."""
        window, m = self.sliding_window, slots.index.shape[1]
        windowed = 0 < window < slots.stop
        if mask is None and not windowed and slots.start >= 0 and (m == 1 or slots.start == 0):
            return None
        all_slots = torch.arange(slots.stop, device=positions.device)
        visible = all_slots <= slots.index[..., None] if mask is None else mask[..., : slots.stop]
        if windowed:  # a committed slot is a position; those of this forward hold the positions given
            held = all_slots.expand(len(positions), -1).scatter(1, slots.index, positions)
            visible = visible & (held[:, None] > positions[..., None] - window)
        return attention_bias(visible, dtype)

    def _eager(self, cache: KVCache | None) -> contextlib.AbstractContextManager:
        """Compiled layers run eagerly with a cache: the number of slots changes with every token."""
        if cache is None or not self._is_compiled():
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _is_compiled(self) -> bool:
        return self.layers[0]._compiled_call_impl is not None
