"""The MLP speculator of Wertheimer et al. 2024 (https://arxiv.org/abs/2404.19124), as IBM's fms-extras defines it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.speculators.folder_config import FolderConfig
from spectitan.speculators.recurrent import MAX_HEADS, RecurrentConfig, RecurrentSpeculator, ShiftedRMSNorm, State, chain, entry, levels


@dataclass
class MlpConfig(RecurrentConfig):
    """Keys of the MLP speculator."""


class MlpSpeculator(RecurrentSpeculator):
    """`speculator.type = "mlp"` (sum_rnn): step i maps state s and token x to gelu(norm_i(proj_i(s) + alpha * emb_i(x))).

    Weights that steps share are held once: tied, the lists `emb`, `ln` and `head` have one entry and `proj` two, and
    step i takes entry i or the last one. With widths by level, each of emb, proj and ln is a chain (ArcticTraining's).
    """

    def __init__(self, config: MlpConfig, base_config, objective: Objective):
        super().__init__(config, base_config, objective)
        if self.tied and self.steps == 1:
            raise UserError("speculator.tie_weights = true; allowed: false with speculator.n_speculator_heads = 1: nothing to tie")
        distinct, state_width = 1 if self.tied else self.steps, self.inner_dim[-1]
        self.emb = nn.ModuleList(chain(nn.Embedding(self.vocab_size, self.emb_dim[0]), *levels(self.emb_dim)) for _ in range(distinct))
        inputs = [self.hidden_size] + [state_width] * ((2 if self.tied else self.steps) - 1)
        self.proj = nn.ModuleList(chain(nn.Linear(size, self.proj_dim[0], bias=False), *levels(self.proj_dim)) for size in inputs)
        self.ln = nn.ModuleList(chain(*self.inner_levels(), ShiftedRMSNorm(state_width)) for _ in range(distinct))
        self.head = nn.ModuleList(nn.Linear(state_width, self.vocab_size, bias=False) for _ in range(distinct))

    def advance(self, step: int, state: State, embedded: Tensor) -> State:
        total = torch.add(entry(self.proj, step)(state.hidden), embedded, alpha=self.alpha)
        return State(F.gelu(entry(self.ln, step)(total)))

    def modules_of_step(self, step: int) -> list[nn.Module]:
        return [entry(self.emb, step), entry(self.proj, step), entry(self.ln, step)]

    def serving(self, format: str) -> tuple[dict, dict[str, Tensor]]:
        """IBM's `mlp_speculator` layout, which fms-extras defines. It repeats what steps share: not all readers tie it themselves."""
        if format != "mlp_speculator":
            raise UserError(f"export.format = {format!r}: a speculator of type mlp is written as mlp_speculator")
        config = {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            "vocab_size": self.vocab_size,
            "emb_dim": self.hidden_size,
            "inner_dim": self.single_width(format),
            "n_predict": self.steps,
            # The tree of readers that draft one: their default of 5, 4, 3, continued.
            "top_k_tokens_per_head": [max(5 - step, 1) for step in range(self.steps)],
            "n_candidates": 5,
            "tie_weights": self.tied,
            "scale_input": self.scale_input,
        }
        state = self.state_dict()
        tensors = {}
        for step in range(self.steps):
            for kind in ("emb", "proj", "ln", "head"):
                index = min(step, len(getattr(self, kind)) - 1)
                for part in ("weight", "bias") if kind == "ln" else ("weight",):
                    tensors[f"speculator.{kind}.{step}.{part}"] = state[f"{kind}.{index}.{part}"]
        return config, tensors

    @staticmethod
    def config_from_folder(config: FolderConfig) -> tuple[MlpConfig, int, int]:
        """Its keys, the base's hidden size and vocabulary size, from the config.json of an `mlp_speculator` folder."""
        hidden_size = config.count("emb_dim")
        keys = MlpConfig(
            n_speculator_heads=config.count("n_predict", at_most=MAX_HEADS),
            speculator_width=config.count("inner_dim", at_least=0) or hidden_size,
            tie_weights=config.flag("tie_weights"),
            scale_input=config.flag("scale_input"),
        )
        return keys, hidden_size, config.count("vocab_size")
