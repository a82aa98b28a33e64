"""The example of docs/embedding.md, for codebases with a loop and a model of their own."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.speculators.mlp import MlpConfig
from tests.unit.recurrent_oracle import transcribed_logits

PAGE = Path(__file__).parents[2] / "docs" / "embedding.md"
STEPS = 60


class OwnModel(nn.Module):
    """A model that knows nothing of spectitan: each token follows from the one before it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(53, 32), nn.Linear(32, 32)
        self.norm, self.head = nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 53, bias=False)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        return self.norm(self.mix(self.embedding(tokens)))

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """int64 [5, 23], likeliest tokens after random ones."""
        tokens = [torch.randint(53, (5, 1), generator=generator)]
        for _ in range(22):
            tokens.append(self.head(self.hidden_states(tokens[-1])).argmax(-1))
        return torch.cat(tokens, 1)


@torch.no_grad()
def first_losses(model: OwnModel, weights: dict[str, Tensor], tokens: Tensor) -> list[float]:
    """Mean KL(base, drafter) of each head, from their definitions."""
    hidden, losses = model.hidden_states(tokens).detach(), [[], [], []]
    for row, states in zip(tokens, hidden):
        for t in range(len(row) - 2):
            after = row[t + 1 : t + 4][: len(row) - 2 - t].tolist()
            for k, logits in enumerate(transcribed_logits(MlpConfig(speculator_width=64), weights, states[t], after)):
                log_p = F.log_softmax(model.head(states[t + 1 + k]), -1)
                losses[k].append(F.kl_div(F.log_softmax(logits, -1), log_p, reduction="sum", log_target=True))
    return [float(torch.stack(pairs).mean()) for pairs in losses]


def test_the_example_trains_a_drafter_of_a_model_of_ones_own(capsys):
    code = re.search(r"<!-- example: embedding -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    torch.manual_seed(0)
    model, generator = OwnModel(), torch.Generator().manual_seed(1)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches, names = [model.sample(generator) for _ in range(STEPS)], {"model": model}
    names["loader"] = iter(batches)
    untrained, _, loop = code.partition("\nfor tokens in loader:")
    exec(untrained, names)
    weights = {name: parameter.detach().clone() for name, parameter in names["speculator"].named_parameters()}
    exec(f"for tokens in loader:{loop}", names)
    losses = [[float(number) for number in line.strip("[]").split(", ")] for line in capsys.readouterr().out.splitlines()]
    assert losses[0] == pytest.approx(first_losses(model, weights, batches[0]), rel=1e-4)
    assert len(losses) == STEPS and all(last < 0.5 * first for first, last in zip(losses[0], losses[-1]))
    assert all(torch.equal(parameter, frozen[name]) and parameter.grad is None for name, parameter in model.named_parameters())
