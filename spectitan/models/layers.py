"""The ordinary decoder layer, for bases and drafters: attention with rotary positions, and a gated MLP.

Submodules carry the names of Hugging Face's Llama, so that weights need no renaming. No parallelism here: head counts come
from the shapes of what the projections return, so that a tensor-parallel plan can split them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.attention.flex_attention import BlockMask

from spectitan.models import packed_attention
from spectitan.models.kv_cache import KVCache, Slots

_FEW_ROWS = 8


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to longer contexts. `type`: "linear" or "llama3" (Llama 3.1's rule)."""

    type: str
    factor: float
    low_freq_factor: float = 1.0  # llama3: waves longer than original / low_freq_factor are stretched in full
    high_freq_factor: float = 4.0  # llama3: waves shorter than original / high_freq_factor are left alone
    original_max_position_embeddings: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype) -> Tensor:
    """[head_dim / 2] radians a position (Su et al. 2021; scaling as in Llama 3.1)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).to(dtype) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # turns within the original context
    kept = ((waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class Rotation(NamedTuple):
    """Rotary embedding of the tokens of one forward; the same in every layer."""

    cosine: Tensor  # [batch or 1, 1, seq, head_dim]
    sine: Tensor  # [batch or 1, 1, seq, head_dim], the first half negated

    @staticmethod
    def at(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> "Rotation":
        """positions: int64 [batch or 1, seq]; frequencies: [head_dim / 2]. Angles are in the dtype of frequencies."""
        angles = positions[:, None, :, None] * torch.cat([-frequencies, frequencies])  # cosine is even, sine is odd
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    def apply(self, x: Tensor) -> Tensor:
        """[batch, heads, seq, head_dim], rotated in pairs (i, i + head_dim / 2)."""
        first, second = x.chunk(2, -1)  # not x.roll: compiled for a CPU, that is read element by element
        return torch.addcmul(x * self.cosine, torch.cat([second, first], -1), self.sine)


class Linear(nn.Linear):
    """nn.Linear that decodes fast on a CPU: a few rows go as weight @ x.T, which BLAS spreads over threads along the long
    dimension. Written the other way round, four rows take twice as long there as one."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if torch.is_grad_enabled() or not (1 < rows <= _FEW_ROWS and x.device.type == "cpu"):
            return super().forward(x)
        y = torch.mm(self.weight, x.reshape(rows, -1).t()).t().reshape(*x.shape[:-1], -1).contiguous()  # attention's kernels want it so
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Grouped-query attention, with rotary positions or none.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: shape.
        qkv_bias, output_bias: biases of the projections.
        qk_norm_eps: epsilon of an RMS norm on each head's queries and keys (Qwen3); None for none.
        input_size: of what queries, keys and values are made of; None: hidden_size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        input_size: int | None = None,
    ):
        super().__init__()
        self.head_dim = head_dim
        input_size = hidden_size if input_size is None else input_size
        self.q_proj = Linear(input_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = Linear(input_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = Linear(input_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, eps=qk_norm_eps)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, seq, input] -> queries [batch, heads, seq, head_dim], keys and values [batch, kv_heads, seq, head_dim]."""
        return self.split_heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), rotation)

    def split_heads(self, queries: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the projections return, [batch, seq, heads * head_dim] each -> as `project`."""
        queries, keys, values = (x.unflatten(2, (-1, self.head_dim)) for x in (queries, keys, values))
        queries, keys, values = self.q_norm(queries).transpose(1, 2), self.k_norm(keys).transpose(1, 2), values.transpose(1, 2)
        if rotation is not None:
            queries, keys = rotation.apply(queries), rotation.apply(keys)
        return queries, keys, values

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        mask: Tensor | BlockMask | None,
        cache: KVCache | None = None,
        layer: int = 0,
        slots: Slots | None = None,
    ) -> Tensor:
        """See DecoderLayer.forward."""
        batch, seq, _ = x.shape
        queries, keys, values = self.project(x, rotation)
        if cache is not None:
            keys, values = cache.write(layer, keys, values, slots)
        if seq > 1:
            causal = mask is None  # a bool, also where the length is traced as a symbol
        else:  # heads that share keys are rows of one head: the keys are read once for all of them
            causal, queries = False, queries.reshape(batch, keys.shape[1], -1, self.head_dim)
        attended = self._attend(queries, keys, values, mask, causal)
        return self.o_proj(attended.reshape(batch, -1, seq, self.head_dim).transpose(1, 2).reshape(batch, seq, -1))

    @staticmethod
    def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | BlockMask | None, causal: bool) -> Tensor:
        if isinstance(mask, BlockMask):
            return packed_attention.attend(queries, keys, values, mask)[0]
        grouped = queries.shape[1] != keys.shape[1]
        if grouped and mask is not None and not queries.is_cpu:
            # On a GPU no kernel that takes a mask shares heads: all scores would be stored.
            keys, values = (heads.repeat_interleave(queries.shape[1] // heads.shape[1], 1) for heads in (keys, values))
            grouped = False
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm residual layer.

    Args:
        attention, mlp: its two halves.
        hidden_size, norm_eps: of its norms.
        norm: their class, nn.RMSNorm or nn.LayerNorm.
    """

    def __init__(self, attention: Attention, mlp: nn.Module, hidden_size: int, norm_eps: float, norm: type[nn.Module] = nn.RMSNorm):
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = norm(hidden_size, eps=norm_eps)
        self.post_attention_layernorm = norm(hidden_size, eps=norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        mask: Tensor | BlockMask | None,
        cache: KVCache | None = None,
        layer: int = 0,
        slots: Slots | None = None,
    ) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden].

        Args:
            rotation: of the tokens' positions; None where they are not rotated.
            mask: [batch or 1, 1, seq, keys], what `attention_bias` returns, added to the scores; or a block mask, without a cache;
                None: causal over the tokens given, or a single token that sees every key.
            cache, layer, slots: where keys and values are stored; slots = cache.next_slots(seq).
        """
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, layer, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [batch or 1, seq, keys] -> [batch or 1, 1, seq, keys]: 0 where visible, else the most negative number.

    Made once a forward: given a bool mask, attention would make this in every layer. Not -inf: a row that sees nothing
    (padding under a caller's mask) stays finite.
    """
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """int64 [batch, seq] -> int64 [batch, seq]: place of each token in its document, a run of equal ids."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(1).values


def own_part(parameter: nn.Parameter) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank keeps of a parameter that may be sharded: its memory, and its place in the full tensor."""
    if not isinstance(parameter, DTensor):
        return parameter.data, tuple(slice(0, size) for size in parameter.shape)
    shape, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.data.to_local(), tuple(slice(first, first + size) for first, size in zip(start, shape))


def assign(parameter: nn.Parameter, full: Tensor) -> None:
    """Copies a full tensor, the same on every rank, into a parameter that may be sharded."""
    local, place = own_part(parameter)
    local.copy_(full[place])


def whole(parameter: Tensor) -> Tensor:
    """The full tensor of one that may be sharded, without gradient; all ranks call it together."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def draw_normal(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    """Fills a parameter from N(0, std^2), drawn in full and in float32 from a CPU generator: alike on all layouts and devices."""
    assign(parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
