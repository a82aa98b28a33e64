"""The LSTM speculator, as ArcticTraining defines it (`method: sum_lstm`; https://github.com/snowflakedb/ArcticTraining)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.config.sections import Objective, key
from spectitan.errors import UserError
from spectitan.models.config_file import ConfigFile
from spectitan.models.layers import Linear
from spectitan.speculators.recurrent import RecurrentConfig, RecurrentSpeculator, ShiftedRMSNorm, State, chain, each_step, levels
from spectitan.speculators.recurrent_folders import arctic_config, read_arctic, single_width

GATES = ("forget", "input", "output", "cell")  # their order in the rows of `proj` and the columns of `emb`, as servers fuse them


@dataclass
class LstmConfig(RecurrentConfig):
    """Keys of the LSTM speculator."""

    tie_lstm_embs: bool = key(True, "one embedding for the four gates; servers need it")


class LstmSpeculator(RecurrentSpeculator):
    """`speculator.type = "lstm"` (sum_lstm): each gate is proj(h) + emb_scale * emb(x), all four in one product and one lookup.

        f, i, o = sigmoid of their gates;  c = c * f + gelu(cell_ln(cell gate)) * i;  h = inner(gelu(state_ln(c)) * o)

    c starts at 0. Step 0 has a projection of its own, all else is shared by all steps. `inner` is empty without widths by level.
    """

    formats = ("arctic", "verl")

    def __init__(self, config: LstmConfig, base_config, objective: Objective):
        super().__init__(config, base_config, objective)
        if not self.tied:
            raise UserError('speculator.tie_weights = false; allowed: true with speculator.type = "lstm"')
        self.tied_embs, gates, state_width = config.tie_lstm_embs, len(GATES), self.inner_dim[-1]
        lookups = 1 if self.tied_embs else gates
        embedding = nn.Embedding(self.vocab_size, lookups * self.emb_dim[0])
        self.emb = nn.ModuleList([chain(embedding, *levels(self.emb_dim, lookups))])
        inputs = [self.hidden_size, state_width][: self.steps]
        self.proj = nn.ModuleList(
            chain(Linear(size, gates * self.proj_dim[0], bias=False), *levels(self.proj_dim, gates)) for size in inputs
        )
        self.cell_ln, self.state_ln = ShiftedRMSNorm(self.width), ShiftedRMSNorm(self.width)
        self.inner = nn.Sequential(*self.inner_levels())
        self.head = nn.ModuleList([Linear(state_width, self.vocab_size, bias=False)])
        self.embs, self.projs, self.heads = (each_step(modules, self.steps) for modules in (self.emb, self.proj, self.head))

    def advance(self, step: int, state: State, embedded: Tensor) -> State:
        rows = embedded.shape[:-1]
        projected = self.projs[step](state.hidden).view(*rows, len(GATES), self.width)
        embedded = embedded.view(*rows, 1 if self.tied_embs else len(GATES), self.width)  # tied, one is added to all four
        gates = torch.add(projected, embedded, alpha=self.emb_scale)
        forget, input, output = gates[..., :3, :].sigmoid().unbind(-2)
        cell = F.gelu(self.cell_ln(gates[..., 3, :])) * input
        if state.cell is not None:
            cell = torch.addcmul(cell, state.cell, forget)
        return State(self.inner(F.gelu(self.state_ln(cell)) * output), cell)

    def modules_of_step(self, step: int) -> list[nn.Module]:
        return [self.embs[step], self.projs[step], self.inner]

    def serving(self, format: str) -> tuple[dict, dict[str, Tensor]]:
        """Arctic's layout, one tensor a gate, which ArcticInference fuses again. VERL's repeats what is shared, under each name."""
        if format == "arctic":
            single_width(self, format)
            if not self.tied_embs:
                raise UserError(
                    'export.format = "arctic": speculator.tie_lstm_embs = false; ArcticInference takes true; allowed: verl, none'
                )
        repeats = format == "verl"
        state, tensors = self.state_dict(), {}
        embedding = next(name for name in state if name.startswith("emb."))
        for name, tensor in state.items():
            kind, _, place = name.partition(".")
            if kind == "emb" and self.tied_embs:
                tensors |= {f"{gate}_emb.{place}": tensor for gate in (GATES if repeats else GATES[:1])}
            elif kind in ("emb", "proj"):
                parts = tensor.chunk(len(GATES), dim=1 if name == embedding else 0)
                tensors |= {f"{gate}_{kind}.{place}": part for gate, part in zip(GATES, parts)}
            elif kind in ("cell_ln", "state_ln"):
                tensors[f"{kind}.0.{place}"] = tensor
            elif kind == "head":
                tensors |= {f"head.{step}.weight": tensor for step in range(self.steps if repeats else 1)}
            else:
                tensors[name] = tensor
        if self.steps == 1:  # readers ask for the projections of later steps all the same
            shape = self.proj_dim[0], self.inner_dim[-1]
            tensors |= {f"{gate}_proj.1.weight": state[embedding].new_zeros(shape) for gate in GATES}
        return arctic_config(self, "sum_lstm") | {"tie_lstm_embs": self.tied_embs}, tensors

    @staticmethod
    def config_from_folder(file: ConfigFile, format: str) -> tuple[LstmConfig, int, int]:
        keys, hidden_size, vocab_size = read_arctic(file)
        return LstmConfig(**keys, tie_lstm_embs=file.flag("tie_lstm_embs")), hidden_size, vocab_size
