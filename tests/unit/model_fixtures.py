"""Small random models of each family, made and saved by transformers: the oracle of our own."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

VOCAB = 97
# The older rotary keys, which transformers 4 and 5 both take; 5 writes its new ones.
_LLAMA3_ROPE = {
    "rope_theta": 100.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 5,
}
# Family -> transformers' config and model class, and options. head_dim is hidden_size / heads where it is not given.
FAMILIES = {
    "llama2": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama3": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"rope_theta": 500.0, "eos_token_id": [5, 7]},
    ),
    "llama3.1": (transformers.LlamaConfig, transformers.LlamaForCausalLM, dict(**_LLAMA3_ROPE, head_dim=10)),
    "llama3.2": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        dict(**_LLAMA3_ROPE, tie_word_embeddings=True, num_key_value_heads=1),
    ),
    "llama-linear": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 5}),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "gpt_bigcode": (transformers.GPTBigCodeConfig, transformers.GPTBigCodeForCausalLM, {}),
    "gpt_bigcode-untied": (
        transformers.GPTBigCodeConfig,
        transformers.GPTBigCodeForCausalLM,
        {"tie_word_embeddings": False, "n_inner": 40, "num_attention_heads": 8},
    ),
}


def oracle(family: str) -> nn.Module:
    """A transformers model whose logits spread widely, in float32 and evaluation mode."""
    config_class, model_class, options = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        model = model_class(config_class(**{**_SMALL, **options})).eval()
        for name, parameter in model.named_parameters():
            parameter.data.normal_(float("norm" in name or "ln_" in name), 0.25)
    return model.requires_grad_(False)


def save_oracle(family: str, folder: Path) -> nn.Module:
    """Writes an oracle in Hugging Face layout and returns it."""
    model = oracle(family)
    model.save_pretrained(folder)
    return model


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
