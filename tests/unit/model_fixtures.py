"""Small random models of each family, made and saved by transformers: the oracle of our own."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from spectitan.models.decoder import Decoder
from spectitan.models.kv_cache import KVCache
from spectitan.models.registry import get_model

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
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
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
        model = model_class(config_class(**(SMALL | {"num_key_value_heads": 2} | options))).eval()
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


def backward_of_both(family: str, folder: Path) -> tuple[Decoder, dict[str, Tensor]]:
    """Our model after the backward of a scalar of its logits, and the gradients of transformers' by name."""
    theirs, ours = save_oracle(family, folder).requires_grad_(True), get_model("auto", "auto", folder)
    tokens = random_tokens(2, 11)
    direction = torch.randn(2, 11, VOCAB, generator=torch.Generator().manual_seed(1))
    (ours.readout.logits(ours(tokens).final) * direction).sum().backward()
    (theirs(tokens).logits * direction).sum().backward()
    return ours, {name: parameter.grad for name, parameter in theirs.named_parameters()}


def assert_cached_ragged_rows_equal(ours: Decoder, theirs: nn.Module, tolerance: float) -> tuple[KVCache, Tensor]:
    """A prompt batch padded on the right, then blocks of which each row keeps another number, then single tokens.

    Returns:
        The cache, of rows of 17, 11 and 8 tokens, and the text [3, 23] that they come from.
    """
    text = random_tokens(3, 23)
    cache = ours.new_cache(3, 30)
    for block, counts in [(9, [9, 4, 1]), (4, [1, 4, 2]), (1, [1, 1, 1]), (4, [4, 0, 3]), (1, [1, 1, 0]), (1, [1, 1, 1])]:
        tokens = torch.stack([row[length : length + block] for row, length in zip(text, cache.lengths)])
        logits = ours.readout.logits(ours(tokens, cache=cache).final)
        for row, (length, count) in enumerate(zip(cache.lengths.tolist(), counts)):
            expected = theirs(text[row : row + 1, : length + block]).logits[0, length:]
            assert relative_error(logits[row, :count], expected[:count]) < tolerance if count else True
        cache.commit(torch.tensor(counts))
    assert cache.lengths.tolist() == [17, 11, 8]
    return cache, text


def assert_packed_equal_alone(model: Decoder, documents: list[list[int]], lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Final states and a tap of packed documents are those of each document alone.

    Args:
        documents: ids of each row, the rest of it filled with -1.
        lengths: of the documents of each row.

    Returns:
        The tokens and the final states of the packed rows.
    """
    tokens = random_tokens(len(documents), len(documents[0]))
    packed = model(tokens, torch.tensor(documents), taps=(2,))
    for row, of_row in enumerate(lengths):
        start = 0
        for length in of_row:
            here = slice(start, start + length)
            alone = model(tokens[row : row + 1, here], taps=(2,))
            assert torch.allclose(packed.final[row, here], alone.final[0], atol=1e-12)
            assert torch.allclose(packed.taps[0][row, here], alone.taps[0][0], atol=1e-12)
            start += length
    return tokens, packed.final
