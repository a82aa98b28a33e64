"""GPTBigCode (Allal et al. 2023): GPT-2 whose heads share one key and one value; StarCoder and Granite's larger code models."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.errors import UserError
from spectitan.models.decoder import Decoder, DecoderConfig
from spectitan.models.layers import Attention, DecoderLayer, Linear
from spectitan.models.readout import Readout

_HF_MODULES = {
    "readout.embedding": "transformer.wte",
    "readout.norm": "transformer.ln_f",
    "readout.head": "lm_head",
    "positions": "transformer.wpe",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",  # one matrix: queries, the key, the value
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


@dataclass(frozen=True)
class GPTBigCodeConfig(DecoderConfig):
    """Shape of a model. -1 means "work it out"."""

    hidden_act: ClassVar[str] = "gelu_pytorch_tanh"

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int = -1  # 4 * hidden_size
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    model_type: str = "gpt_bigcode"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if self.intermediate_size == -1:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: a model needs at least 1")
        if self.hidden_size % self.num_heads:
            raise UserError(f"num_heads = {self.num_heads} must divide hidden_size = {self.hidden_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class EmbedGPTBigCode(Decoder):
    """Layer norms with bias, learned positions, multi-query attention, an MLP with a tanh GELU."""

    def __init__(self, config: GPTBigCodeConfig):
        readout = Readout(config.vocab_size, config.hidden_size, config.norm_eps, config.tie_embeddings, nn.LayerNorm)
        super().__init__(config, readout)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def build_layer(self) -> DecoderLayer:
        config = self.config
        attention = Attention(config.hidden_size, config.num_heads, 1, config.head_dim, qkv_bias=True, output_bias=True)
        return DecoderLayer(attention, MLP(config.hidden_size, config.intermediate_size), config.hidden_size, config.norm_eps, nn.LayerNorm)

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        return x + self.positions(positions), None

    def weights_per_token(self) -> int:
        config = self.config
        return 2 * config.num_layers * config.hidden_size * (config.hidden_size + config.head_dim + config.intermediate_size)

    def hf_names(self, name: str) -> list[str]:
        module, _, kind = name.rpartition(".")
        if module in _HF_MODULES:
            return [f"{_HF_MODULES[module]}.{kind}"]
        _, layer, part = module.split(".", 2)
        return [f"transformer.h.{layer}.{_HF_MODULES[part]}.{kind}"]


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
