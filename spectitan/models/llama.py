"""Llama and its near relatives (Qwen2, Qwen3, Mistral) as a base that also emits hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectitan.errors import UserError
from spectitan.models.decoder import Decoder, DecoderConfig
from spectitan.models.layers import Attention, DecoderLayer, GatedMLP, RopeScaling, Rotation, rope_frequencies
from spectitan.models.readout import Readout

_HF_ENDS = {
    "readout.embedding.weight": "model.embed_tokens.weight",
    "readout.norm.weight": "model.norm.weight",
    "readout.head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
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


class EmbedLLaMA(Decoder):
    """RMS norms, rotary positions, grouped-query attention, a gated MLP; parameters carry Hugging Face's names."""

    def __init__(self, config: LlamaConfig):
        readout = Readout(config.vocab_size, config.hidden_size, config.norm_eps, config.tie_embeddings)
        super().__init__(config, readout, config.sliding_window)
        self._frequencies: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # no buffer: nothing to materialise or shard

    def build_layer(self) -> DecoderLayer:
        config = self.config
        attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        return DecoderLayer(attention, self.build_mlp(), config.hidden_size, config.norm_eps)

    def build_mlp(self) -> nn.Module:
        return GatedMLP(self.config.hidden_size, self.config.intermediate_size, self.config.mlp_bias)

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        return x, Rotation.at(positions, self._frequencies_on(x), x.dtype)

    def weights_per_token(self) -> int:
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        return config.num_layers * (config.hidden_size * heads + self.mlp_weights_per_token())

    def mlp_weights_per_token(self) -> int:
        """Of one layer."""
        return 3 * self.config.hidden_size * self.config.intermediate_size

    def hf_names(self, name: str) -> list[str]:
        return [_HF_ENDS.get(name, f"model.{name}")]

    def _frequencies_on(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (x.device, dtype)
        if key not in self._frequencies:
            config = self.config
            frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, dtype)
            self._frequencies[key] = frequencies.to(x.device)
        return self._frequencies[key]
