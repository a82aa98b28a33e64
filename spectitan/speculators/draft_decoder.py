"""The decoder layers of drafters that have their own: shape, and the layer that takes in a token's embedding beside a state."""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.errors import UserError
from spectitan.models.kv_cache import KVCache, Slots
from spectitan.models.layers import Attention, GatedMLP, Rotation
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
        config: num_layers, draft_arch, draft_hidden_act.
        base_config: of the base. Sizes it has not (rotary positions, say) are LlamaConfig's defaults.

    Raises:
        UserError: an activation that is not known.
    """
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
        residual, x = self._inputs(hidden, embedded)
        return self._add_mlp(residual + self.self_attn(x, rotation, mask, cache, index, slots))

    def project(self, hidden: Tensor, embedded: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What comes before attention: [1, R, hidden] -> residual, queries, keys, values."""
        residual, x = self._inputs(hidden, embedded)
        return residual, *self.self_attn.project(x, rotation)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What comes after it: [1, R, hidden], [1, heads, R, head_dim] -> [1, R, hidden]."""
        return self._add_mlp(residual + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2)))

    def matrix_elements(self) -> int:
        """Multiply-adds of a row."""
        return sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))

    def _inputs(self, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The residual, and what attention reads."""
        if not self.takes_token:
            return hidden, self.input_layernorm(hidden)
        normed = self.hidden_norm(hidden)
        return normed if self.norm_before_residual else hidden, torch.cat([self.input_layernorm(embedded), normed], -1)

    def _add_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))
