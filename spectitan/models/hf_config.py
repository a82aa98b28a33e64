"""config.json in Hugging Face layout, read into and written from the configs of our bases."""

import json
import math
from pathlib import Path

from spectitan.models.config_file import ConfigFile
from spectitan.models.decoder import DecoderConfig
from spectitan.models.gpt_bigcode import GPTBigCodeConfig
from spectitan.models.layers import RopeScaling
from spectitan.models.llama import LlamaConfig
from spectitan.models.mixtral import MixtralConfig

HF_CLASSES = {  # by model_type
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
}
_ROPE_TYPES = ("default", "linear", "llama3")


def read_config(folder: Path) -> DecoderConfig:
    """Reads `folder`/config.json.

    Raises:
        UserError: no such file, not JSON, a key that is missing or of a wrong type, or a feature that our models have not.
    """
    keys = ConfigFile(folder, "a base model's folder has config.json, safetensors and a tokenizer")
    model_type = keys.text("model_type")
    keys.must(model_type in HF_CLASSES, "model_type", f"allowed: {', '.join(HF_CLASSES)}")
    unquantised = keys.get("quantization_config") is None
    keys.must(unquantised, "quantization_config", "quantised weights cannot be read; use the float weights")
    return _read_gpt_bigcode(keys) if model_type == "gpt_bigcode" else _read_llama(keys, model_type)


def hf_class(folder: Path) -> str:
    """transformers' class of a base, as servers look for it. Raises as `read_config`."""
    keys = ConfigFile(folder, "a base model's folder has config.json, safetensors and a tokenizer")
    model_type, stated = keys.text("model_type"), keys.get("architectures")
    keys.must(model_type in HF_CLASSES or stated and isinstance(stated[0], str), "architectures", "a list with a class name is expected")
    return HF_CLASSES[model_type] if model_type in HF_CLASSES else stated[0]


def _read_llama(keys: ConfigFile, model_type: str) -> LlamaConfig:
    """Llama and what differs from it by options or by its MLP."""
    keys.must(keys.get("hidden_act", "silu") == "silu", "hidden_act", "allowed: silu")
    hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    head_dim = keys.count("head_dim", None if model_type == "qwen3" else hidden_size // num_heads)
    keys.must(head_dim % 2 == 0, "head_dim", "rotary positions need an even number")
    num_kv_heads = keys.count("num_key_value_heads", num_heads if model_type == "llama" else None)
    keys.must(num_heads % num_kv_heads == 0, "num_key_value_heads", f"it must divide num_attention_heads = {num_heads}")
    attention_bias = model_type in ("llama", "qwen3") and keys.flag("attention_bias")
    rope_theta, rope_scaling = read_rope(keys, 1e6 if model_type == "mixtral" else 1e4)
    bos, eos = _read_special_tokens(keys)
    family, options = LlamaConfig, {}
    if model_type == "mixtral":
        family, options = MixtralConfig, _read_experts(keys)
    return family(
        **options,
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.count("intermediate_size"),
        num_layers=keys.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=keys.count("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=keys.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=model_type == "llama" and keys.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        sliding_window=_read_sliding_window(keys, model_type),
        initializer_range=keys.number("initializer_range", 0.02),
        model_type=model_type,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def _read_gpt_bigcode(keys: ConfigFile) -> GPTBigCodeConfig:
    """Keys whose absence means what transformers takes for granted: tied, multi-query, scaled."""
    for name, value in (("multi_query", True), ("scale_attn_weights", True), ("add_cross_attention", False)):
        keys.must(keys.get(name, value) is value, name, f"allowed: {json.dumps(value)}")
    activation = "gelu_pytorch_tanh"
    keys.must(keys.get("activation_function", activation) == activation, "activation_function", f"allowed: {activation}")
    hidden_size, num_heads = keys.count("n_embd"), keys.count("n_head")
    keys.must(hidden_size % num_heads == 0, "n_head", f"it must divide n_embd = {hidden_size}")
    bos, eos = _read_special_tokens(keys)
    return GPTBigCodeConfig(
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        num_layers=keys.count("n_layer"),
        num_heads=num_heads,
        intermediate_size=keys.count("n_inner", 4 * hidden_size),
        max_position_embeddings=keys.count("n_positions"),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=keys.get("tie_word_embeddings") is None or keys.flag("tie_word_embeddings"),
        initializer_range=keys.number("initializer_range", 0.02),
        bos_token_id=bos,
        eos_token_id=eos,
    )


def _read_experts(keys: ConfigFile) -> dict[str, int]:
    num_experts, chosen = keys.count("num_local_experts"), keys.count("num_experts_per_tok")
    keys.must(chosen <= num_experts, "num_experts_per_tok", f"at most num_local_experts = {num_experts}")
    return {"num_experts": num_experts, "experts_per_token": chosen}


def _read_special_tokens(keys: ConfigFile) -> tuple[int | None, int | tuple[int, ...] | None]:
    """bos_token_id and eos_token_id."""
    bos, eos = keys.get("bos_token_id"), keys.get("eos_token_id")
    keys.must(isinstance(bos, int | None), "bos_token_id", "an integer or null is expected")
    eos_is_known = all(isinstance(token, int) for token in eos) if isinstance(eos, list) else isinstance(eos, int | None)
    keys.must(eos_is_known, "eos_token_id", "an integer, a list of them, or null is expected")
    return bos, tuple(eos) if isinstance(eos, list) else eos


def config_to_json(config: DecoderConfig, dtype_name: str) -> dict:
    """The content of config.json."""
    return {
        "architectures": [HF_CLASSES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        **(_gpt_bigcode_to_json(config) if isinstance(config, GPTBigCodeConfig) else _llama_to_json(config)),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id,
        "torch_dtype": dtype_name,
    }


def _gpt_bigcode_to_json(config: GPTBigCodeConfig) -> dict:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
        "scale_attn_weights": True,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _llama_to_json(config: LlamaConfig) -> dict:
    """Rotary keys are the older ones, which every version of transformers reads."""
    scaling = config.rope_scaling
    content = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": scaling.type, "factor": scaling.factor},
        "attention_dropout": 0.0,
    }
    if scaling is not None and scaling.type == "llama3":
        content["rope_scaling"] |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if config.model_type in ("llama", "qwen3"):
        content["attention_bias"] = config.qkv_bias
    if config.model_type == "llama":
        content["mlp_bias"] = config.mlp_bias
    if config.model_type in ("mistral", "mixtral"):
        content["sliding_window"] = None if config.sliding_window == -1 else config.sliding_window
    if config.model_type == "mixtral":
        content |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    return content


def read_rope(keys: ConfigFile, default_theta: float = 1e4) -> tuple[float, RopeScaling | None]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older ones."""
    name = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    rope = keys.get(name) or {}
    keys.must(isinstance(rope, dict), name, "an object or null is expected")
    theta = rope.get("rope_theta", keys.get("rope_theta"))
    theta = default_theta if theta is None else theta
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    keys.must(rope_type in _ROPE_TYPES, name, f"allowed rope_type: {', '.join(_ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    keys.must(partial == 1.0, name if "partial_rotary_factor" in rope else "partial_rotary_factor", "only 1.0 is known")
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[rope_type]
    values = {key: rope.get(key) for key in needed}
    for key, value in {"rope_theta": theta, **values}.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        keys.must(number and 0 < value < math.inf, name if key in rope or key in values else key, f"{key} must be a number above 0")
    if rope_type == "default":
        return float(theta), None
    if rope_type == "linear":
        return float(theta), RopeScaling("linear", float(values["factor"]))
    original = rope.get("original_max_position_embeddings", keys.get("max_position_embeddings"))
    keys.must(isinstance(original, int) and original > 0, name, "original_max_position_embeddings must be an integer above 0")
    keys.must(values["high_freq_factor"] != values["low_freq_factor"], name, "low_freq_factor and high_freq_factor must differ")
    return float(theta), RopeScaling(original_max_position_embeddings=original, type="llama3", **{k: float(v) for k, v in values.items()})


def _read_sliding_window(keys: ConfigFile, model_type: str) -> int:
    """-1 for none. Mistral has one window for all layers; in Qwen it may differ by layer, which EmbedLLaMA has not."""
    if model_type in ("mistral", "mixtral"):
        default = 4096 if model_type == "mistral" else None
        return -1 if keys.get("sliding_window", default) is None else keys.count("sliding_window", default)
    keys.must(not keys.flag("use_sliding_window"), "use_sliding_window", f"{model_type} is read without a sliding window only")
    layer_types = keys.get("layer_types") or []
    keys.must(set(layer_types) <= {"full_attention"}, "layer_types", "allowed: full_attention in every layer")
    return -1
