"""Llama and its near relatives (Qwen2, Qwen3, Mistral) as a base that also emits hidden states."""

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectitan.errors import UserError
from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import (
    Attention,
    DecoderLayer,
    GatedMLP,
    RopeScaling,
    Rotation,
    assign,
    attention_bias,
    draw_normal,
    positions_in_documents,
    rope_frequencies,
)
from spectitan.models.readout import Readout
from spectitan.types import BaseStates


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and options of a model. -1 means "work it out".

    `model_type` is the family's name in Hugging Face's config.json: llama, qwen2, qwen3 or mistral.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = -1  # num_heads
    head_dim: int = -1  # hidden_size / num_heads
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm on each head's queries and keys
    sliding_window: int = -1  # a token sees itself and the window - 1 before it; -1: all
    initializer_range: float = 0.02
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if self.num_kv_heads == -1:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == -1:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: a model needs at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads = {self.num_kv_heads} must divide num_heads = {self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim = {self.head_dim} must be even for rotary positions")

    def identity(self) -> dict:
        """What the function of the model depends on, weights aside."""
        beside = ("max_position_embeddings", "initializer_range", "model_type", "bos_token_id", "eos_token_id")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in beside}


class EmbedLLaMA(nn.Module):
    """A decoder that returns hidden states; logits are `readout.logits(states.final)`.

    Args:
        config: shape and options. Parameters are not initialised: call `init_weights` or load them.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.readout = Readout(config.vocab_size, config.hidden_size, config.norm_eps, config.tie_embeddings)
        self.layers = nn.ModuleList(_build_layer(config) for _ in range(config.num_layers))
        self._frequencies: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # no buffer: nothing to materialise or shard

    def init_weights(self, generator: torch.Generator) -> None:
        """Draws all parameters in full from one CPU generator, in a fixed order.

        Normal with `initializer_range`; projections back into the residual stream are scaled by 1 / sqrt(2 * num_layers), so
        that the stream's variance does not grow with depth (GPT-2). Norms are 1, biases 0.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if "norm" in name:
                assign(parameter, torch.ones(parameter.shape))
            elif name.endswith(".bias"):
                assign(parameter, torch.zeros(parameter.shape))
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                draw_normal(parameter, std / math.sqrt(2 * self.config.num_layers), generator)
            else:
                draw_normal(parameter, std, generator)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots a row, on the device of the weights."""
        return KVCache(self.config.num_layers, batch, length, self.readout.norm.weight.device)

    def flops(self, tokens: int, seq_length: int) -> int:
        """Floating-point operations of the matrix products of a forward without the head: 2 a multiply-add.

        Args:
            tokens: in the whole batch.
            seq_length: tokens a causal row; half of its scores are useful.
        """
        config = self.config
        attention = config.num_heads * config.head_dim
        projections = config.hidden_size * (2 * attention + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size)
        return config.num_layers * tokens * (2 * projections + 2 * attention * (seq_length + 1))

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
            document_ids: int64 [batch, m], equal inside a document, -1 for padding; None: one document a row. Not with a cache.
            cache: from `new_cache`.
            positions: int64 [batch, m], of the rotary embedding; None: as described above.
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
        rotation = Rotation.at(positions, self._frequencies_on(x), x.dtype)
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
    ) -> tuple[Tensor, Tensor | None]:
        """Positions int64 [batch or 1, seq], and the bias of attention, None where it is plainly causal."""
        length, window = tokens.shape[1], self.config.sliding_window
        index = torch.arange(length, device=tokens.device)
        if document_ids is not None and document_ids.device.type == "cpu" and bool((document_ids == document_ids[:, :1]).all()):
            document_ids = None  # on a GPU this question would wait for the device
        if positions is None:
            positions = index[None] if document_ids is None else positions_in_documents(document_ids)
        if document_ids is None and not 0 < window < length:
            return positions, None
        visible = (index <= index[:, None])[None]
        if 0 < window < length:
            visible = visible & (index > index[:, None] - window)
        if document_ids is not None:
            visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])
        return positions, attention_bias(visible, dtype)

    def _cache_attention(self, slots: Slots, positions: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Bias of attention over the slots, None for single tokens that see every slot."""
        window, m = self.config.sliding_window, slots.index.shape[1]
        windowed = 0 < window < slots.stop
        if mask is None and not windowed and slots.start >= 0 and (m == 1 or slots.start == 0):
            return None
        all_slots = torch.arange(slots.stop, device=positions.device)
        visible = all_slots <= slots.index[..., None] if mask is None else mask[..., : slots.stop]
        if windowed:  # a committed slot is a position; those of this forward hold the positions given
            held = all_slots.expand(len(positions), -1).scatter(1, slots.index, positions)
            visible = visible & (held[:, None] > positions[..., None] - window)
        return attention_bias(visible, dtype)

    def _frequencies_on(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (x.device, dtype)
        if key not in self._frequencies:
            config = self.config
            frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, dtype)
            self._frequencies[key] = frequencies.to(x.device)
        return self._frequencies[key]

    def _eager(self, cache: KVCache | None) -> contextlib.AbstractContextManager:
        """Compiled layers run eagerly with a cache: the number of slots changes with every token."""
        if cache is None or self.layers[0]._compiled_call_impl is None:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")


def _build_layer(config: LlamaConfig) -> DecoderLayer:
    attention = Attention(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
    )
    return DecoderLayer(
        attention, GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias), config.hidden_size, config.norm_eps
    )
