"""The MLP speculator against its reference implementation, and against a float64 transcription of its definition."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.models.readout import Readout
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.speculators.registry import build_speculator
from spectitan.types import BaseStates, TokenBatch

FIXTURES = Path(__file__).parent / "fixtures"
HIDDEN, VOCAB, WIDTH = 19, 29, 13


def make_speculator(
    n: int, tied: bool, scaled: bool, loss: str = "ce", width: int = WIDTH, dtype=torch.float32, seed: int = 0
) -> MlpSpeculator:
    """A speculator whose norms are not the identity."""
    config = MlpConfig(n_speculator_heads=n, speculator_width=width, tie_weights=tied, scale_input=scaled)
    speculator = build_speculator("mlp", config, SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB), Objective(loss=loss, chunk_rows=7))
    generator = torch.Generator().manual_seed(seed)
    speculator.init_weights(generator)
    with torch.no_grad():
        for name, parameter in speculator.named_parameters():
            if name.startswith("ln"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return speculator.to(dtype)


def make_batch(batch_size: int = 3, length: int = 17, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (batch_size, length), generator=generator)
    loss_mask = torch.rand(batch_size, length, generator=generator) < 0.6
    document_ids = torch.arange(batch_size)[:, None] * 2 + (torch.arange(length) >= length // 3)
    return TokenBatch(tokens, loss_mask, document_ids, torch.arange(batch_size), torch.arange(batch_size))


def transcribed_logits(weights: dict[str, Tensor], hidden: Tensor, tokens: list[int], n: int, tied: bool, scaled: bool) -> list[Tensor]:
    """Logits of all heads for one base state [hidden] and the tokens after it, with no function of spectitan."""

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + 1e-6).sqrt()

    width = weights["emb.0.weight"].shape[1]
    state_weight = 0.5 ** (0.5 / n)
    emb_weight = math.sqrt((1 - state_weight**2) * width / 2)
    state, logits = norm(hidden) / math.sqrt(2) if scaled else hidden, []
    for i, token in enumerate(tokens):
        shared, proj = (0, min(i, 1)) if tied else (i, i)
        x = weights[f"proj.{proj}.weight"] @ state + emb_weight / state_weight * weights[f"emb.{shared}.weight"][token]
        x = norm(x) * weights[f"ln.{shared}.weight"] + weights[f"ln.{shared}.bias"]
        state = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        logits.append(weights[f"head.{shared}.weight"] @ state)
    return logits


@pytest.mark.parametrize("case", ["tied_scaled", "tied", "untied_scaled", "untied"])
def test_logits_and_drafts_of_the_reference_implementation(case):
    fixture = {name.removeprefix(f"{case}."): tensor for name, tensor in load_file(FIXTURES / "fms_extras_mlp.safetensors").items()}
    speculator = make_speculator(3, tied=case.startswith("tied"), scaled=case.endswith("scaled"))
    speculator.load_state_dict({name: fixture[f"weights.{name}"] for name in speculator.state_dict()})
    state, tokens = fixture["state"], fixture["inds"]
    rows = state.flatten(0, 1)
    after = torch.stack([tokens[:, i : i + 5].flatten() for i in range(3)])
    with torch.no_grad():
        unrolled = speculator.unroll(rows, after)
        logits = torch.stack([speculator.head[min(i, len(speculator.head) - 1)](unrolled[i]) for i in range(3)])
        torch.testing.assert_close(logits.view(3, 2, 5, VOCAB), fixture["logits"], rtol=1e-5, atol=1e-5)
        draft = speculator.draft(None, tokens[:, :1], BaseStates(state[:, :1]), torch.ones(2, dtype=torch.int64), None, 3, greedy)
    assert torch.equal(draft.tokens[:, 0], fixture["greedy"])


def greedy(logits: Tensor, step: int) -> tuple[Tensor, None]:
    return logits.argmax(-1), None


@pytest.mark.parametrize("loss", ["ce", "kl_div"])
@pytest.mark.parametrize(
    ("n", "tied", "scaled"), [(1, False, True), (2, True, False), (3, True, True), (3, False, False), (5, True, True), (5, False, True)]
)
def test_loss_and_gradients_are_those_of_the_definition(n, tied, scaled, loss):
    batch = make_batch()
    batch_size, length = batch.tokens.shape
    generator = torch.Generator().manual_seed(1)
    final = torch.randn(batch_size, length, HIDDEN, generator=generator)
    readout = Readout(VOCAB, HIDDEN, 1e-5, tied=True)
    torch.nn.init.normal_(readout.head.weight, generator=generator)
    speculator = make_speculator(n, tied, scaled, loss)
    targets = speculator.align(batch)
    denominators = targets.counts * 2 + 1  # as if other ranks had rows too
    result = speculator(batch, BaseStates(final), targets, denominators, readout)
    result.total.backward()

    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in speculator.named_parameters()}
    total, sums, counts = 0.0, torch.zeros(n, 4, dtype=torch.float64), [0] * n
    for row in range(batch_size):
        for t in range(length - 2):
            after = batch.tokens[row, t + 1 : min(t + 1 + n, length - 1)].tolist()
            all_logits = transcribed_logits(weights, final[row, t].double(), after, n, tied, scaled)
            right_so_far = True
            for k, logits in enumerate(all_logits):
                j = t + 2 + k
                if not batch.loss_mask[row, j] or batch.document_ids[row, t] != batch.document_ids[row, j]:
                    continue
                target, log_q = batch.tokens[row, j], F.log_softmax(logits, 0)
                if loss == "ce":
                    pair_loss, alpha, right = -log_q[target], log_q[target].exp(), bool(logits.argmax() == target)
                else:
                    p = F.softmax(readout.head.weight.detach().double() @ final[row, j - 1].double(), 0)
                    pair_loss, alpha = (p * (p.log() - log_q)).sum(), torch.minimum(p, log_q.exp()).sum()
                    right = bool(logits.argmax() == p.argmax())
                right_so_far = right_so_far and right
                total = total + pair_loss / denominators[k]
                sums[k] += torch.tensor([pair_loss.item(), right, alpha.item(), right_so_far], dtype=torch.float64)
                counts[k] += 1
    assert targets.counts.tolist() == counts and min(counts) > 0
    total.backward()
    torch.testing.assert_close(result.total.double(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.sums.double(), sums, rtol=1e-5, atol=1e-5)
    for name, parameter in speculator.named_parameters():
        assert torch.allclose(parameter.grad.double(), weights[name].grad, rtol=1e-4, atol=1e-6), name
    assert readout.head.weight.grad is None


@pytest.mark.parametrize("loss", ["ce", "kl_div"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_batch_without_targets_has_no_loss_and_zero_gradients(tied, loss):
    batch = make_batch()
    batch = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
    speculator = make_speculator(3, tied, True, loss)
    targets = speculator.align(batch)
    result = speculator(batch, BaseStates(torch.randn(3, 17, HIDDEN)), targets, targets.counts, Readout(VOCAB, HIDDEN, 1e-5, tied=True))
    result.total.backward()
    assert result.total.item() == 0
    assert result.sums.shape == (3, 4) and not result.sums.any()
    assert all(not parameter.grad.any() for parameter in speculator.parameters())


def test_rows_without_targets_cost_nothing():
    speculator, batch = make_speculator(3, True, True), make_batch()
    loss_mask = torch.zeros_like(batch.loss_mask)
    loss_mask[1, 12:14] = True
    targets = speculator.align(batch._replace(loss_mask=loss_mask))
    rows, place = targets.extra
    assert rows.tolist() == [17 + t for t in (8, 9, 10, 11)]  # 12 - 4 is the first that reaches 12, 13 - 2 the last that reaches 13
    assert torch.equal(rows[place], targets.state)


def test_initial_weights():
    first, again, other = (make_raw(seed) for seed in (3, 3, 4))
    for (name, parameter), twin, stranger in zip(first.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(parameter, twin), name
        if name.startswith("ln"):
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all()
        else:
            assert not torch.equal(parameter, stranger)
            assert abs(parameter.std().item() * math.sqrt(64) - 1) < 0.05
            assert abs(parameter.mean().item()) * math.sqrt(64 * parameter.numel()) < 4
    float64 = make_raw(3, torch.float64)  # the same numbers in any dtype
    assert all(torch.equal(a.double(), b) for a, b in zip(first.parameters(), float64.parameters()))


def make_raw(seed: int, dtype=torch.float32) -> MlpSpeculator:
    base = SimpleNamespace(hidden_size=48, vocab_size=101)
    speculator = build_speculator("mlp", MlpConfig(speculator_width=64), base, Objective()).to(dtype)
    speculator.init_weights(torch.Generator().manual_seed(seed))
    return speculator


@pytest.mark.parametrize("tied", [True, False])
def test_useful_flops(tied):
    speculator, rows, n = make_speculator(3, tied, True), 11, 3
    hidden, tokens = torch.randn(rows, HIDDEN), torch.randint(0, VOCAB, (n, rows))
    counter = FlopCounterMode(display=False)
    with counter:
        states = speculator.unroll(hidden, tokens)
        logits = torch.stack([speculator.head[min(i, len(speculator.head) - 1)](state) for i, state in enumerate(states)])
        logits.sum().backward()
    assert speculator.flops([rows] * n, tokens=100) == counter.get_total_flops()
    soft = make_speculator(3, tied, True, "kl_div")
    assert soft.flops([rows] * n, 100) - speculator.flops([rows] * n, 100) == 2 * rows * HIDDEN * VOCAB
    assert speculator.flops([0, 0, 0], 100) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_drafting_ragged_rows_and_fewer_tokens(tied):
    speculator = make_speculator(4, tied, True)
    tokens, final, counts = torch.randint(0, VOCAB, (4, 6)), torch.randn(4, 6, HIDDEN), torch.tensor([6, 1, 0, 3])
    with torch.no_grad():
        together = speculator.draft(None, tokens, BaseStates(final), counts, None, 3, greedy)
        assert together.tokens.shape == (4, 1, 3) and together.probabilities is None
        weights = {name: parameter.double() for name, parameter in speculator.named_parameters()}
        for row, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            chain = [int(tokens[row, count - 1])]
            for _ in range(3):
                logits = transcribed_logits(weights, final[row, count - 1].double(), chain, 4, tied, True)
                chain.append(int(logits[-1].argmax()))
            assert together.tokens[row, 0].tolist() == chain[1:]

        def sample(logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
            steps_seen.append(step)
            return logits.argmin(-1), logits.softmax(-1)

        steps_seen: list[int] = []
        sampled = speculator.draft(None, tokens, BaseStates(final), counts, None, 4, sample)
    assert steps_seen == [0, 1, 2, 3]
    assert sampled.probabilities.shape == (4, 1, 4, VOCAB)
    assert torch.equal(sampled.tokens, sampled.probabilities.argmin(-1))


def test_combinations_that_cannot_be():
    base = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)
    with pytest.raises(UserError, match="speculator.tie_weights = true; allowed: false with speculator.n_speculator_heads = 1"):
        build_speculator("mlp", MlpConfig(n_speculator_heads=1), base, Objective())
    with pytest.raises(UserError, match="speculator.speculator_width = 0; allowed"):
        build_speculator("mlp", MlpConfig(speculator_width=0), base, Objective())
    with pytest.raises(UserError, match="speculator.type = 'mpl': allowed: mlp, lstm, none; did you mean 'mlp'?"):
        build_speculator("mpl", MlpConfig(), base, Objective())
    assert build_speculator("mlp", MlpConfig(), base, Objective()).width == HIDDEN
