"""The decoder layers of drafters that have their own: shape, and the layer that takes in a token's embedding beside a state."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan import hub
from spectitan.errors import UserError
from spectitan.models.config_file import ConfigFile
from spectitan.models.hf_config import config_to_json, read_rope
from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import Attention, GatedMLP, Linear, Rotation
from spectitan.models.llama import LlamaConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclasses.dataclass(frozen=True)
class DecoderShape(LlamaConfig):
    """Shape and options of a drafter's decoder; `num_layers` and the sliding window are the drafter's own keys."""

    hidden_act: str = "silu"


def decoder_of(config, base_config) -> DecoderShape:
    """The decoder that a drafter's keys ask for, everything else as in its base.

    Args:
        config: draft_config (JSON, as `decoder_to_json` writes it), or num_layers, draft_arch and draft_hidden_act.
        base_config: of the base. Sizes it has not (rotary positions, say) are LlamaConfig's defaults.

    Raises:
        UserError: an activation that is not known, or a decoder that does not fit the base.
    """
    if config.draft_config:
        shape = read_decoder(ConfigFile.of_text("speculator.draft_config", config.draft_config))
        if shape.hidden_size != base_config.hidden_size:
            raise UserError(
                f"speculator.draft_config: hidden_size = {shape.hidden_size}; allowed: the base's {base_config.hidden_size}, whose states "
                "and head it works with"
            )
        return dataclasses.replace(shape, vocab_size=base_config.vocab_size)
    act = config.draft_hidden_act
    if act == "inherit":
        act = getattr(base_config, "hidden_act", "silu")
    if act not in ACTIVATIONS:
        allowed = ", ".join(("inherit", *ACTIVATIONS))
        raise UserError(f"speculator.draft_hidden_act = {config.draft_hidden_act!r} ({act}); allowed: {allowed}")
    inherited = (
        "vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings", "norm_eps",
        "rope_theta", "rope_scaling", "initializer_range",
    )  # fmt: skip
    values = {name: getattr(base_config, name) for name in inherited if hasattr(base_config, name)}
    return DecoderShape(
        **values,
        intermediate_size=getattr(base_config, "intermediate_size", 3 * base_config.hidden_size),
        num_layers=config.num_layers,
        model_type=config.draft_arch,
        qk_norm=config.draft_arch == "qwen3",
        hidden_act=act,
    )


def read_decoder(keys: ConfigFile) -> DecoderShape:
    """Of a LlamaConfig or Qwen3Config as transformers writes it. Raises UserError, naming the key."""
    model_type, hidden_size, num_heads = keys.text("model_type"), keys.count("hidden_size"), keys.count("num_attention_heads")
    keys.must(model_type in ("llama", "qwen3"), "model_type", "allowed: llama, qwen3")
    act = keys.text("hidden_act", "silu")
    keys.must(act in ACTIVATIONS, "hidden_act", f"allowed: {', '.join(ACTIVATIONS)}")
    head_dim = keys.count("head_dim", max(1, hidden_size // num_heads) if model_type == "llama" else 128)
    keys.must(head_dim % 2 == 0, "head_dim", "rotary positions need an even number")
    num_kv_heads = keys.count("num_key_value_heads", num_heads)
    keys.must(num_heads % num_kv_heads == 0, "num_key_value_heads", f"it must divide num_attention_heads = {num_heads}")
    rope_theta, rope_scaling = read_rope(keys)
    attention_bias = keys.flag("attention_bias")
    return DecoderShape(
        vocab_size=keys.count("vocab_size", 1),
        hidden_size=hidden_size,
        intermediate_size=keys.count("intermediate_size"),
        num_layers=keys.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=keys.count("max_position_embeddings", 2048),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=model_type == "llama" and keys.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        initializer_range=keys.number("initializer_range", 0.02),
        model_type=model_type,
        hidden_act=act,
    )


def read_windows(keys: ConfigFile) -> tuple[int, list[int]]:
    """sliding_window (-1: none) and the layers that slide, of the same object."""
    types = keys.get("layer_types") or []
    known = isinstance(types, list) and set(types) <= {"full_attention", "sliding_attention"}
    keys.must(
        known and len(types) in (0, keys.count("num_hidden_layers")), "layer_types", "full_attention or sliding_attention for each layer"
    )
    indices = [index for index, type in enumerate(types) if type == "sliding_attention"]
    return (keys.count("sliding_window"), indices) if indices else (-1, [])


def decoder_to_json(shape: DecoderShape, windows: list[int]) -> dict:
    """What `read_decoder` and `read_windows` read. windows: of each layer, -1 for none."""
    beside = ("architectures", "torch_dtype", "tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id")
    content = {name: value for name, value in config_to_json(shape, "float32").items() if name not in beside}
    content |= {"hidden_act": shape.hidden_act, "tie_word_embeddings": False}
    if max(windows) > 0:
        kinds = {True: "sliding_attention", False: "full_attention"}
        content |= {"sliding_window": max(windows), "layer_types": [kinds[window > 0] for window in windows]}
        if shape.model_type == "qwen3":
            content |= {"use_sliding_window": True, "max_window_layers": 0}
    return content


def settle_draft_config(config) -> None:
    """Replaces a drafter's key draft_config, if it names a file or folder, by the JSON there, and sets the keys that this decides.

    What is there: a LlamaConfig or Qwen3Config, or a speculator's config, whose transformer_layer_config is taken.

    Raises:
        UserError: no such file, or a value in it that is not allowed.
    """
    if not config.draft_config:
        return
    keys = _open_draft_config(config.draft_config)
    if "transformer_layer_config" in keys.content:
        keys = keys.inside("transformer_layer_config")
    adopt_decoder(config, keys)


def adopt_decoder(config, keys: ConfigFile) -> None:
    """Sets draft_config, and the keys that it decides, to what an object says."""
    shape, (window, indices) = read_decoder(keys), read_windows(keys)
    config.num_layers, config.draft_arch, config.draft_hidden_act = shape.num_layers, shape.model_type, shape.hidden_act
    config.sliding_window, config.sliding_window_indices = window, indices
    windows = [window if index in indices else -1 for index in range(shape.num_layers)]
    config.draft_config = json.dumps(decoder_to_json(shape, windows), separators=(",", ":"))


def _open_draft_config(value: str) -> ConfigFile:
    if value.startswith("{"):
        return ConfigFile.of_text("speculator.draft_config", value)
    path, problem = Path(value).expanduser(), f"speculator.draft_config = {value!r}: no such file or folder"
    if not path.exists() and hub.could_be_model(value):
        path = hub.fetch_model(value, ("config.json",), problem)
    path = path / "config.json" if path.is_dir() else path
    try:
        return ConfigFile.of_text(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"speculator.draft_config = {value!r}: {path}: {reason}; allowed: a JSON file, a folder with config.json, or a name of the hub"
        ) from None


class DraftLayer(nn.Module):
    """A pre-norm decoder layer. The first one reads the embedding of a token beside the state: twice as wide.

    Args:
        shape: of the decoder.
        window: tokens that it sees at most; -1: all.
        takes_token: it is the first.
        norm_before_residual: of the first: the residual is the normed state.
    """

    def __init__(self, shape: DecoderShape, window: int, takes_token: bool, norm_before_residual: bool):
        super().__init__()
        width, eps = shape.hidden_size, shape.norm_eps
        self.window, self.takes_token, self.norm_before_residual = window, takes_token, norm_before_residual
        self.self_attn = Attention(
            width,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            qkv_bias=shape.qkv_bias,
            output_bias=shape.output_bias,
            qk_norm_eps=eps if shape.qk_norm else None,
            input_size=2 * width if takes_token else width,
        )
        self.mlp = GatedMLP(width, shape.intermediate_size, shape.mlp_bias, ACTIVATIONS[shape.hidden_act])
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        if takes_token:
            self.hidden_norm = nn.RMSNorm(width, eps=eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, rotation: Rotation, mask: Tensor | None, cache: KVCache, index: int, slots: Slots
    ) -> Tensor:
        """[batch, m, hidden] -> [batch, m, hidden], with a cache; arguments as DecoderLayer's."""
        residual, x = hidden, self.input_layernorm(embedded if self.takes_token else hidden)
        if self.takes_token:
            normed = self.hidden_norm(hidden)
            residual, x = self._residual(hidden, normed), torch.cat([x, normed], -1)
        return self._add_mlp(residual + self.self_attn(x, rotation, mask, cache, index, slots))

    def halves(self) -> tuple[Tensor, Tensor]:
        """Of the first layer's projections to queries, keys and values, side by side: the weight for tokens and that for states, [outputs,
        hidden] each."""
        return torch.cat([part.weight for part in self._projections()]).chunk(2, 1)

    def project_tokens(self, embedded: Tensor, weight: Tensor) -> Tensor:
        """What tokens add to queries, keys and values, biases included: [R, hidden] -> [R, outputs]. Most tokens are taken in at
        each step; this is made once for all."""
        biases = [part.bias for part in self._projections()]
        return F.linear(self.input_layernorm(embedded), weight, None if biases[0] is None else torch.cat(biases))

    def project(
        self, hidden: Tensor, of_tokens: Tensor | None, weight: Tensor | None, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What comes before attention: [1, R, hidden] -> residual, queries, keys, values.

        Args:
            of_tokens: [R, outputs], of the tokens that the rows take in; of the first layer.
            weight: for states, of `halves`; of the first layer.
        """
        if not self.takes_token:
            return hidden, *self.self_attn.project(self.input_layernorm(hidden), rotation)
        normed = self.hidden_norm(hidden)
        projected = torch.addmm(of_tokens, normed[0], weight.T)[None]
        heads = projected.split([part.out_features for part in self._projections()], 2)
        return self._residual(hidden, normed), *self.self_attn.split_heads(*heads, rotation)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What comes after it: [1, R, hidden], [1, heads, R, head_dim] -> [1, R, hidden]."""
        return self._add_mlp(residual + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2)))

    def matrix_elements(self) -> int:
        """Multiply-adds of a row."""
        return sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))

    def _residual(self, hidden: Tensor, normed: Tensor) -> Tensor:
        return normed if self.norm_before_residual else hidden

    def _projections(self) -> tuple[Linear, Linear, Linear]:
        return self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj

    def _add_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))
