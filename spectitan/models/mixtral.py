"""Mixtral (Jiang et al. 2024): Llama whose MLP is a choice among experts, two for each token."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.errors import UserError
from spectitan.models.layers import Linear
from spectitan.models.llama import EmbedLLaMA, LlamaConfig

_HF_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class MixtralConfig(LlamaConfig):
    """Llama's, and the experts."""

    num_experts: int = 8
    experts_per_token: int = 2
    rope_theta: float = 1e6
    model_type: str = "mixtral"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(f"experts_per_token = {self.experts_per_token}: allowed: 1 to num_experts = {self.num_experts}")


class EmbedMixtral(EmbedLLaMA):
    """Trained without a loss that balances the experts' load, which is transformers' default too."""

    def build_mlp(self) -> nn.Module:
        config = self.config
        return SparseMLP(config.hidden_size, config.intermediate_size, config.num_experts, config.experts_per_token)

    def mlp_weights_per_token(self) -> int:
        config = self.config
        return config.num_experts * config.hidden_size + config.experts_per_token * super().mlp_weights_per_token()

    def hf_names(self, name: str) -> list[str]:
        if ".mlp." not in name:
            return super().hf_names(name)
        layer, _, matrix = f"model.{name}".partition(".mlp.")
        if matrix == "gate.weight":
            return [f"{layer}.block_sparse_moe.gate.weight"]
        stored = _HF_EXPERT[matrix.split(".")[1]]
        return [f"{layer}.block_sparse_moe.experts.{expert}.{stored}.weight" for expert in range(self.config.num_experts)]


class SparseMLP(nn.Module):
    """The experts that a router gives each token, their outputs weighted by its probabilities among those chosen.

    On a GPU nothing here waits for the device in bfloat16: where an expert's rows end stays there.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, experts_per_token: int):
        super().__init__()
        self.experts_per_token = experts_per_token
        self.gate = Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        k, shape = self.experts_per_token, x.shape
        x = x.reshape(-1, shape[-1])
        logits = self.gate(x)
        # Never less than float32, as transformers has it; float64 stays.
        probabilities, experts = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).topk(k)
        probabilities = (probabilities / probabilities.sum(-1, keepdim=True)).to(x.dtype)

        by_expert, order = experts.flatten().sort(stable=True)  # rows are (token, choice) pairs: token * k + choice
        ends = torch.searchsorted(by_expert, torch.arange(self.gate.out_features, device=x.device), right=True, out_int32=True)
        y = self.experts(x[order // k], ends)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return (y[place].view(-1, k, shape[-1]) * probabilities[..., None]).sum(1).view(shape)


class Experts(nn.Module):
    """A gated MLP each."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.up_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.down_proj = GroupedLinear(num_experts, intermediate_size, hidden_size)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x: [rows, hidden], sorted by expert; ends: int32 [experts], the row after each expert's last one."""
        return self.down_proj(F.silu(self.gate_proj(x, ends)) * self.up_proj(x, ends), ends)


class GroupedLinear(nn.Module):
    """A matrix without bias for each group of rows."""

    def __init__(self, groups: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]; ends as `Experts.forward`."""
        return grouped_product(x, self.weight.transpose(1, 2), ends)


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[i - 1] .. ends[i] - 1 of x [rows, in] times matrices[i] of [groups, in, out]: [rows, out]."""
    return F.grouped_mm(x, matrices, offs=ends) if _is_grouped(x, matrices) else _product_by_product(x, matrices, ends)


def _is_grouped(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch has the product in one (2.11 to 2.13): in bfloat16, with rows of whole 16 bytes, and not on old GPUs.

    On a CPU it has it in float32 as well, but not compiled, and it is the same loop.
    """
    new_enough = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype == torch.bfloat16 and new_enough and all(size % 8 == 0 for size in matrices.shape[1:])


@torch.compiler.disable
def _product_by_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The same in any dtype and at any size; the host waits for `ends`."""
    parts = x.tensor_split(len(matrices) if x.is_meta else ends[:-1].long().cpu())  # meta rows belong to nobody
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, matrices)])
