"""EAGLE-3 written down from its definition, in dense attention, one document at a time, with no function of spectitan."""

import math

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """[rows, heads, head_dim] at positions [rows]."""
    half = x.shape[-1] // 2
    angles = positions[:, None].to(x.dtype) / theta ** (torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def outputs_of_document(weights: dict[str, Tensor], keys, shape, taps: list[Tensor], tokens: Tensor, embedding: Tensor) -> list[Tensor]:
    """Outputs [rows, hidden] of each step, after the last norm, for the rows 0 .. L - 2 - step of a document; see `taken`.

    Args:
        weights: the speculator's parameters.
        keys: an Eagle3Config.
        shape: num_heads, num_kv_heads, head_dim, norm_eps, rope_theta.
        taps: each [L, hidden].
        tokens: int64 [L].
        embedding: [vocab, hidden].
    """
    eps, rows = shape.norm_eps, len(tokens)
    if keys.fc_norm:
        taps = [rms(tap, weights[f"fc_norm.{i}.weight"], eps) for i, tap in enumerate(taps)]
    joined = torch.cat(taps, -1)
    if keys.norm_before_fc:
        joined = rms(joined, weights["input_norm.weight"], eps)
    hidden = joined @ weights["fc.weight"].T
    stored = [([], []) for _ in range(keys.num_layers)]
    index, results = torch.arange(rows), []
    for step in range(keys.ttt_steps):
        token = tokens[(index + 1 + step).clamp_max(rows - 1)]  # those past the end are never compared
        embedded = embedding[token]
        for layer in range(keys.num_layers):
            w = {name.removeprefix(f"layers.{layer}."): value for name, value in weights.items() if name.startswith(f"layers.{layer}.")}
            residual = hidden
            x = rms(hidden, w["input_layernorm.weight"], eps)
            if layer == 0:
                normed = rms(hidden, w["hidden_norm.weight"], eps)
                x = torch.cat([rms(embedded, w["input_layernorm.weight"], eps), normed], -1)
                residual = normed if keys.norm_before_residual else hidden
            q, k, v = ((x @ w[f"self_attn.{name}_proj.weight"].T).view(rows, -1, shape.head_dim) for name in "qkv")
            if "self_attn.q_norm.weight" in w:
                q, k = rms(q, w["self_attn.q_norm.weight"], eps), rms(k, w["self_attn.k_norm.weight"], eps)
            position = index + step
            q, k = rotate(q, position, shape.rope_theta), rotate(k, position, shape.rope_theta)
            groups = q.shape[1] // k.shape[1]
            stored[layer][0].append(k.repeat_interleave(groups, 1))
            stored[layer][1].append(v.repeat_interleave(groups, 1))
            windowed = keys.sliding_window > 0 and (not keys.sliding_window_indices or layer in keys.sliding_window_indices)
            visible = [index[None] <= index[:, None], *[torch.eye(rows, dtype=torch.bool)] * step]
            if windowed:
                visible = [seen & (index[None] + j > position[:, None] - keys.sliding_window) for j, seen in enumerate(visible)]
            scores = torch.einsum("qhd,khd->hqk", q, torch.cat(stored[layer][0])) / math.sqrt(shape.head_dim)
            weight = scores.masked_fill(~torch.cat(visible, 1), -torch.inf).softmax(-1)
            attended = torch.einsum("hqk,khd->qhd", weight, torch.cat(stored[layer][1])).flatten(1)
            x = residual + attended @ w["self_attn.o_proj.weight"].T
            y = rms(x, w["post_attention_layernorm.weight"], eps)
            gate = y @ w["mlp.gate_proj.weight"].T
            hidden = x + (gate * gate.sigmoid() * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
        normed = rms(hidden, weights["norm.weight"], eps)
        results.append(normed)
        hidden = normed if keys.norm_output else hidden
    return results
