"""The MLP speculator of Wertheimer et al. 2024 (https://arxiv.org/abs/2404.19124), as IBM's fms-extras defines it."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.models.config_file import ConfigFile
from spectitan.models.layers import Linear
from spectitan.speculators.recurrent import RecurrentConfig, RecurrentSpeculator, ShiftedRMSNorm, State, chain, each_step, levels
from spectitan.speculators.recurrent_folders import arctic_config, ibm_config, read_arctic, read_ibm


@dataclass
class MlpConfig(RecurrentConfig):
    """Keys of the MLP speculator."""


class MlpSpeculator(RecurrentSpeculator):
    """`speculator.type = "mlp"` (sum_rnn): step i maps state s and token x to gelu(norm_i(proj_i(s) + emb_scale * emb_i(x))).

    Weights that steps share are held once: tied, the lists `emb`, `ln` and `head` have one entry and `proj` two, and
    step i takes entry i or the last one. With widths by level, each of emb, proj and ln is a chain (ArcticTraining's).
    """

    formats = ("mlp_speculator", "arctic", "verl")

    def __init__(self, config: MlpConfig, base_config, objective: Objective):
        super().__init__(config, base_config, objective)
        if self.tied and self.steps == 1:
            raise UserError("speculator.tie_weights = true; allowed: false with speculator.n_speculator_heads = 1: nothing to tie")
        distinct, state_width = 1 if self.tied else self.steps, self.inner_dim[-1]
        self.emb = nn.ModuleList(chain(nn.Embedding(self.vocab_size, self.emb_dim[0]), *levels(self.emb_dim)) for _ in range(distinct))
        inputs = [self.hidden_size] + [state_width] * ((2 if self.tied else self.steps) - 1)
        self.proj = nn.ModuleList(chain(Linear(size, self.proj_dim[0], bias=False), *levels(self.proj_dim)) for size in inputs)
        self.ln = nn.ModuleList(chain(*self.inner_levels(), ShiftedRMSNorm(state_width)) for _ in range(distinct))
        self.head = nn.ModuleList(Linear(state_width, self.vocab_size, bias=False) for _ in range(distinct))
        self.embs, self.projs, self.lns, self.heads = (
            each_step(modules, self.steps) for modules in (self.emb, self.proj, self.ln, self.head)
        )

    def advance(self, step: int, state: State, embedded: Tensor) -> State:
        total = torch.add(self.projs[step](state.hidden), embedded, alpha=self.emb_scale)
        return State(F.gelu(self.lns[step](total)))

    def modules_of_step(self, step: int) -> list[nn.Module]:
        return [self.embs[step], self.projs[step], self.lns[step]]

    def serving(self, format: str) -> tuple[dict, dict[str, Tensor]]:
        """IBM's layout, also ArcticInference's own, repeats what steps share: not all readers tie it. VERL's has parts as chains."""
        state = self.state_dict()
        if format == "verl":
            heads = {f"head.{step}.weight": state[f"head.{min(step, len(self.head) - 1)}.weight"] for step in range(self.steps)}
            chained = {re.sub(r"^(emb|proj|ln)\.(\d+)\.([a-z])", r"\1.\2.0.\3", name): tensor for name, tensor in state.items()}
            return arctic_config(self, "sum_rnn") | {"tie_lstm_embs": False}, chained | heads
        architecture = {"mlp_speculator": "MLPSpeculatorPreTrainedModel", "arctic": "ArcticMLPSpeculatorPreTrainedModel"}[format]
        config, tensors = ibm_config(self, architecture, format), {}
        for step in range(self.steps):
            for kind in ("emb", "proj", "ln", "head"):
                index = min(step, len(getattr(self, kind)) - 1)
                for part in ("weight", "bias") if kind == "ln" else ("weight",):
                    tensors[f"speculator.{kind}.{step}.{part}"] = state[f"{kind}.{index}.{part}"]
        return config, tensors

    @staticmethod
    def config_from_folder(file: ConfigFile, format: str) -> tuple[MlpConfig, int, int]:
        keys, hidden_size, vocab_size = read_arctic(file) if format == "verl" else read_ibm(file)
        return MlpConfig(**keys), hidden_size, vocab_size
