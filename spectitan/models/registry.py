"""Architectures and their named sizes; how a base model comes to be."""

import torch
from torch import nn

from spectitan.errors import UserError
from spectitan.models.layers import RopeScaling
from spectitan.models.llama import EmbedLLaMA, LlamaConfig

_ROPE_3_1 = RopeScaling("llama3", factor=8.0)
_ROPE_3_2 = RopeScaling("llama3", factor=32.0)
_LLAMA_2 = dict(vocab_size=32000, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)
_LLAMA_3 = dict(vocab_size=128256, rope_theta=500000.0, max_position_embeddings=8192, bos_token_id=128000, eos_token_id=128001)
_LLAMA_3_1 = {**_LLAMA_3, "max_position_embeddings": 131072}
_7B = dict(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32)
_13B = dict(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40)
_8B = dict(hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8)
_70B = dict(hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8)
_3_2_1B = dict(hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, tie_embeddings=True)
_3_2_3B = dict(hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, num_kv_heads=8, tie_embeddings=True)
_QWEN_2 = dict(
    model_type="qwen2", vocab_size=151936, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, max_position_embeddings=32768,
    bos_token_id=151643, eos_token_id=151643,
)  # fmt: skip
_QWEN_3 = {**_QWEN_2, "model_type": "qwen3", "qkv_bias": False, "qk_norm": True, "head_dim": 128, "max_position_embeddings": 40960,
           "eos_token_id": 151645}  # fmt: skip

_ARCHITECTURES: dict[str, type[nn.Module]] = {"embedllama": EmbedLLaMA}
_VARIANTS: dict[str, dict[str, LlamaConfig]] = {
    "embedllama": {
        "7b": LlamaConfig(**_LLAMA_2, **_7B),
        "13b": LlamaConfig(**_LLAMA_2, **_13B),
        "2-70b": LlamaConfig(**_LLAMA_2, **_70B),
        "8b": LlamaConfig(**_LLAMA_3, **_8B),
        "70b": LlamaConfig(**_LLAMA_3, **_70B),
        "3.1-8b": LlamaConfig(**_LLAMA_3_1, **_8B, rope_scaling=_ROPE_3_1),
        "3.1-70b": LlamaConfig(**_LLAMA_3_1, **_70B, rope_scaling=_ROPE_3_1),
        "3.2-1b": LlamaConfig(**_LLAMA_3_1, **_3_2_1B, rope_scaling=_ROPE_3_2),
        "3.2-3b": LlamaConfig(**_LLAMA_3_1, **_3_2_3B, rope_scaling=_ROPE_3_2),
    }
}


def get_model(
    arch: str,
    variant: str,
    path: str = "",
    init: str = "pretrained",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """Builds a base model on the meta device, materialises it, and fills its weights."""
    with torch.device("meta"):
        model = _ARCHITECTURES[arch](_VARIANTS[arch][variant])
    model = model.to(dtype).to_empty(device=device)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model
