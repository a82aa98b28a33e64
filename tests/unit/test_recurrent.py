"""The recurrent speculators against their reference implementations, and against a float64 transcription of their definitions."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.models.readout import Readout
from spectitan.objectives import losses
from spectitan.objectives.fused_linear import fused_linear_loss
from spectitan.speculators import recurrent
from spectitan.speculators.lstm import LstmConfig
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.speculators.registry import SPECULATORS, build_speculator
from spectitan.types import BaseStates, TokenBatch
from tests.unit.recurrent_oracle import transcribed_logits

FIXTURES = Path(__file__).parent / "fixtures"
HIDDEN, VOCAB, WIDTH = 19, 29, 13


def make_speculator(n: int, tied: bool, scaled: bool, loss: str = "ce", width: int = WIDTH, dtype=torch.float32, seed: int = 0, **keys):
    """An mlp whose norms are not the identity; with tie_lstm_embs among `keys`, an lstm."""
    family, config_class = ("lstm", LstmConfig) if "tie_lstm_embs" in keys else ("mlp", MlpConfig)
    config = config_class(n_speculator_heads=n, speculator_width=width, tie_weights=tied, scale_input=scaled, **keys)
    speculator = build_speculator(family, config, SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB), Objective(loss=loss, chunk_rows=7))
    generator = torch.Generator().manual_seed(seed)
    speculator.init_weights(generator)
    with torch.no_grad():
        for parameter in speculator.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return speculator.to(dtype)


def make_batch(batch_size: int = 3, length: int = 17, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (batch_size, length), generator=generator)
    loss_mask = torch.rand(batch_size, length, generator=generator) < 0.6
    document_ids = torch.arange(batch_size)[:, None] * 2 + (torch.arange(length) >= length // 3)
    return TokenBatch(tokens, loss_mask, document_ids, torch.arange(batch_size), torch.arange(batch_size))


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


def logits_of(speculator, hidden: Tensor, tokens: Tensor) -> Tensor:
    """[n, rows, vocab] of [rows, hidden] and int64 [n, rows]."""
    return torch.stack([head(states) for head, states in zip(speculator.heads, speculator.unroll(hidden, tokens))])


@pytest.mark.parametrize("case", ["lstm_tied_embs", "lstm_untied_embs", "rnn_levels_tied", "rnn_levels_untied"])
def test_logits_of_arctic_training(case):
    """Its sum_lstm, gate by gate; and its sum_rnn with levels of equal widths, the only ones that it can run."""
    fixture = {name.removeprefix(f"{case}."): tensor for name, tensor in load_file(FIXTURES / "arctic_speculator.safetensors").items()}
    weights = {name.removeprefix("weights."): tensor for name, tensor in fixture.items() if name.startswith("weights.")}
    tied = not case.endswith("levels_untied")
    if case.startswith("rnn"):
        speculator = make_speculator(3, tied, tied, emb_dim="13.13", proj_dim="13.13", inner_dim="13.13")
    else:
        tied_embs = case == "lstm_tied_embs"
        speculator = make_speculator(3, True, scaled=tied_embs, tie_lstm_embs=tied_embs)
        gates = ("forget", "input", "output", "cell")
        weights = {
            "emb.0.weight": torch.cat([weights[f"{gate}_emb.0.weight"] for gate in (gates[:1] if tied_embs else gates)], 1),
            **{f"proj.{i}.weight": torch.cat([weights[f"{gate}_proj.{i}.weight"] for gate in gates]) for i in range(2)},
            **{f"{norm}.{part}": weights[f"{norm}.0.{part}"] for norm in ("cell_ln", "state_ln") for part in ("weight", "bias")},
            "head.0.weight": weights["head.0.weight"],
        }
    speculator.load_state_dict(weights)
    after = torch.stack([fixture["inds"][:, i : i + 5].flatten() for i in range(3)])
    with torch.no_grad():
        logits = logits_of(speculator, fixture["state"].flatten(0, 1), after)
    torch.testing.assert_close(logits.view(3, 2, 5, VOCAB), fixture["logits"], rtol=1e-5, atol=1e-5)


LEVELS = {"emb_dim": "7.13", "proj_dim": "5.11.13", "inner_dim": "17.3"}
CASES = {  # n, tied, scaled, other keys
    "1": (1, False, True, {}),
    "2 tied": (2, True, False, {}),
    "3 tied": (3, True, True, {}),
    "3": (3, False, False, {}),
    "5 tied": (5, True, True, {}),
    "5": (5, False, True, {}),
    "levels tied": (3, True, True, LEVELS),
    "levels": (2, False, False, LEVELS | {"inner_dim": "13.13.5"}),
    "widths": (3, True, True, {"emb_dim": 7, "proj_dim": "7", "inner_dim": 23}),
    "lstm 1": (1, True, True, {"tie_lstm_embs": False}),
    "lstm 2": (2, True, False, {"tie_lstm_embs": True}),
    "lstm 5": (5, True, True, {"tie_lstm_embs": False}),
    "lstm levels tied": (3, True, True, LEVELS | {"tie_lstm_embs": True}),
    "lstm levels": (3, True, False, LEVELS | {"tie_lstm_embs": False, "inner_dim": "13.5"}),
}


MIXTURE = '{"ce": 0.3, "rkl": 0.4, "lk_hybrid": 0.5}'


@pytest.mark.parametrize("loss", ["ce", "kl_div", MIXTURE])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_definition(case, loss):
    n, tied, scaled, more = CASES[case]
    batch = make_batch(batch_size=2)
    batch_size, length = batch.tokens.shape
    generator = torch.Generator().manual_seed(1)
    final = torch.randn(batch_size, length, HIDDEN, generator=generator, dtype=torch.float64)
    readout = Readout(VOCAB, HIDDEN, 1e-5, tied=True).double()
    torch.nn.init.normal_(readout.head.weight, generator=generator)
    speculator = make_speculator(n, tied, scaled, loss, dtype=torch.float64, **more)
    targets = speculator.align(batch)
    denominators = targets.counts * 2 + 1  # as if other ranks had rows too
    result = speculator(batch, BaseStates(final), targets, denominators, readout)
    result.total.backward()

    keys = (LstmConfig if "tie_lstm_embs" in more else MlpConfig)(
        n_speculator_heads=n, speculator_width=WIDTH, tie_weights=tied, scale_input=scaled, **more
    )
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in speculator.named_parameters()}
    total, sums, counts = 0.0, torch.zeros(n, 5, dtype=torch.float64), [0] * n
    for row in range(batch_size):
        for t in range(length - 2):
            after = batch.tokens[row, t + 1 : min(t + 1 + n, length - 1)].tolist()
            all_logits = transcribed_logits(keys, weights, final[row, t], after)
            right_so_far = True
            for k, logits in enumerate(all_logits):
                j = t + 2 + k
                if not batch.loss_mask[row, j] or batch.document_ids[row, t] != batch.document_ids[row, j]:
                    continue
                target, log_q = batch.tokens[row, j], F.log_softmax(logits, 0)
                if loss == "ce":
                    pair_loss, alpha, right = -log_q[target], log_q[target].exp(), bool(logits.argmax() == target)
                elif loss == MIXTURE:
                    teacher_logits = readout.head.weight.detach() @ final[row, j - 1]
                    (pair_loss,), ((_, right, alpha),) = losses.mixture(loss, logits[None], target[None], teacher_logits[None])
                else:
                    p = F.softmax(readout.head.weight.detach() @ final[row, j - 1], 0)
                    pair_loss, alpha = (p * (p.log() - log_q)).sum(), torch.minimum(p, log_q.exp()).sum()
                    right = bool(logits.argmax() == p.argmax())
                reached = right_so_far
                right_so_far = right_so_far and right
                total = total + pair_loss / denominators[k]
                sums[k] += torch.tensor([pair_loss.item(), right, alpha.item(), right_so_far, reached], dtype=torch.float64)
                counts[k] += 1
    assert targets.counts.tolist() == counts and min(counts) > 0
    total.backward()
    torch.testing.assert_close(result.total, total, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.sums, sums, rtol=1e-11, atol=1e-14)
    for name, parameter in speculator.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)
    assert readout.head.weight.grad is None


@pytest.mark.parametrize("proj_dim", [-1, "5.13"])
def test_the_first_forget_gate_has_a_gradient_of_exactly_zero(proj_dim):
    """It multiplies a cell that is 0."""
    speculator = make_speculator(3, True, True, tie_lstm_embs=False, proj_dim=proj_dim)
    logits_of(speculator, torch.randn(7, HIDDEN), torch.randint(0, VOCAB, (3, 7))).square().sum().backward()
    for step in range(2):
        for parameter in speculator.proj[step].parameters():
            forget, *others = parameter.grad.chunk(4)
            assert bool(forget.any()) == (step == 1)
            assert all(gate.any() for gate in others)


class CountOps(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied_embs", [True, False])
def test_the_gates_are_one_product_and_one_lookup(tied_embs):
    speculator = make_speculator(3, True, True, tie_lstm_embs=tied_embs)
    with CountOps() as training:
        speculator.unroll(torch.randn(11, HIDDEN), torch.randint(0, VOCAB, (3, 11)))
    assert (training.counts["mm"], training.counts["embedding"]) == (3, 1)
    tokens, states = torch.randint(0, VOCAB, (2, 1)), BaseStates(torch.randn(2, 1, HIDDEN))
    with torch.no_grad(), CountOps() as drafting:
        speculator.draft(None, tokens, states, torch.ones(2, dtype=torch.int64), None, 3, greedy)
    assert (drafting.counts["mm"], drafting.counts["embedding"]) == (6, 3)  # gates and head


@pytest.mark.parametrize(("keys", "calls"), [({"tied": True}, 1), ({"tied": False}, 3), ({"tied": True, "tie_lstm_embs": True}, 1)])
def test_one_fused_call_for_each_distinct_head(keys, calls, monkeypatch):
    seen = []

    def spy(hidden, weight, *args, **more):
        seen.append(weight)
        return fused_linear_loss(hidden, weight, *args, **more)

    monkeypatch.setattr(recurrent, "fused_linear_loss", spy)
    speculator, batch = make_speculator(3, scaled=True, **keys), make_batch()
    targets = speculator.align(batch)
    speculator(batch, BaseStates(torch.randn(3, 17, HIDDEN)), targets, targets.counts, None)
    assert [id(weight) for weight in seen] == [id(head.weight) for head in speculator.head] and len(seen) == calls


@pytest.mark.parametrize("loss", ["ce", "kl_div", MIXTURE])
@pytest.mark.parametrize(
    "keys", [{"tied": True}, {"tied": False}, {"tied": True, "tie_lstm_embs": True}, {"tied": True, "tie_lstm_embs": False, **LEVELS}]
)
def test_a_batch_without_targets_has_no_loss_and_zero_gradients(keys, loss):
    batch = make_batch()
    batch = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
    speculator = make_speculator(3, scaled=True, loss=loss, **keys)
    targets = speculator.align(batch)
    result = speculator(batch, BaseStates(torch.randn(3, 17, HIDDEN)), targets, targets.counts, Readout(VOCAB, HIDDEN, 1e-5, tied=True))
    result.total.backward()
    assert result.total.item() == 0
    assert result.sums.shape == (3, 5) and not result.sums.any()
    assert all(not parameter.grad.any() for parameter in speculator.parameters())


@pytest.mark.parametrize("loss", ["ce", "kl_div"])
@pytest.mark.parametrize("keys", [{"tied": True}, {"tied": False}, {"tied": True, "tie_lstm_embs": True}])
def test_the_host_never_waits_in_a_training_forward(keys, loss):
    """On the meta device nothing has a value: whoever asks for one fails. Inputs come as FSDP leaves them on a GPU, all that stands
    in tuples moved."""
    device, batch = torch.device("meta"), make_batch()
    speculator = make_speculator(3, scaled=True, loss=loss, **keys).to(device)
    targets, states = speculator.align(batch), BaseStates(torch.empty(3, 17, HIDDEN, device=device))
    readout = Readout(VOCAB, HIDDEN, 1e-5, tied=True).to(device)
    (inputs,), _ = _to_kwargs((batch.to(device), states, targets.to(device), targets.counts, readout), {}, device, False)
    result = speculator(*inputs)
    result.total.backward()
    assert result.total.device == result.sums.device == device and torch.equal(result.counts, targets.counts)
    assert all(parameter.grad.shape == parameter.shape for parameter in speculator.parameters())


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


@pytest.mark.parametrize(
    "keys",
    [{"tied": True}, {"tied": False}, {"tied": False, **LEVELS}]
    + [{"tied": True, "tie_lstm_embs": True}, {"tied": True, "tie_lstm_embs": False, **LEVELS}],
)
def test_useful_flops(keys):
    speculator, rows, n = make_speculator(3, scaled=True, **keys), 11, 3
    counter = FlopCounterMode(display=False)
    with counter:
        logits_of(speculator, torch.randn(rows, HIDDEN), torch.randint(0, VOCAB, (n, rows))).sum().backward()
    assert speculator.flops([rows] * n, tokens=100) == counter.get_total_flops()
    soft = make_speculator(3, scaled=True, loss="kl_div", **keys)
    assert soft.flops([rows] * n, 100) - speculator.flops([rows] * n, 100) == 2 * rows * HIDDEN * VOCAB
    assert speculator.flops([0, 0, 0], 100) == 0


@pytest.mark.parametrize(
    "more", [{"tie_weights": True}, {"tie_weights": False}, {"tie_lstm_embs": False}, {"tie_lstm_embs": True, **LEVELS}]
)
def test_drafting_ragged_rows_and_fewer_tokens(more):
    keys = (LstmConfig if "tie_lstm_embs" in more else MlpConfig)(n_speculator_heads=4, speculator_width=WIDTH, **more)
    speculator = make_speculator(4, keys.tie_weights, True, **{key: value for key, value in more.items() if key != "tie_weights"})
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
                logits = transcribed_logits(keys, weights, final[row, count - 1].double(), chain)
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
    with pytest.raises(UserError, match="speculator.type = 'mpl': allowed: mlp, lstm, eagle3, none; did you mean 'mlp'?"):
        build_speculator("mpl", MlpConfig(), base, Objective())
    assert build_speculator("mlp", MlpConfig(), base, Objective()).width == HIDDEN
    with pytest.raises(UserError, match='speculator.tie_weights = false; allowed: true with speculator.type = "lstm"'):
        build_speculator("lstm", LstmConfig(tie_weights=False), base, Objective())


@pytest.mark.parametrize("family", ["mlp", "lstm"])
@pytest.mark.parametrize("key", ["emb_dim", "proj_dim", "inner_dim"])
@pytest.mark.parametrize(
    "value", ["1024.", ".5", "0.5", "", "2..3", 0, "0", "-1.4", "1e3", "4,5", " 4", "1_0", "٤", "1000000", "x", ".".join("1" * 9)]
)
def test_widths_that_are_none(family, key, value):
    base = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)
    with pytest.raises(UserError) as error:
        build_speculator(family, SPECULATORS[family][0](**{key: value}), base, Objective())
    shown = f'"{value}"' if isinstance(value, str) else value
    assert str(error.value).startswith(f"speculator.{key} = {shown}; allowed: a width from 1 to 999999, several such as")


def test_embedding_and_projection_that_cannot_be_added():
    base = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)
    with pytest.raises(UserError, match="speculator.emb_dim ends in 12 and speculator.proj_dim in 16; allowed: the same"):
        build_speculator("lstm", LstmConfig(emb_dim="8.12", proj_dim=16), base, Objective())


def test_examples_of_the_seed_build():
    """Seed 002's two configurations, on meta tensors: Qwen2.5-0.5B and Llama-2-7b."""
    with torch.device("meta"):
        basic = {"n_speculator_heads": 3, "scale_input": False, "emb_dim": 512, "proj_dim": 512, "inner_dim": 512}
        mlp = build_speculator("mlp", MlpConfig(**basic), SimpleNamespace(hidden_size=896, vocab_size=151936), Objective())
        advanced = dict.fromkeys(("emb_dim", "proj_dim", "inner_dim"), "1024.2048")
        keys = LstmConfig(n_speculator_heads=5, scale_input=False, tie_lstm_embs=True, **advanced)
        lstm = build_speculator("lstm", keys, SimpleNamespace(hidden_size=4096, vocab_size=32000), Objective())
        states = lstm.unroll(torch.empty(7, 4096), torch.empty(5, 7, dtype=torch.int64))
    assert mlp.width == 512 and sum(p.numel() for p in mlp.parameters()) == 2 * 151936 * 512 + 512 * (896 + 512) + 2 * 512
    assert states.shape == (5, 7, 2048) and lstm.width == 2048
    gate_levels = 4 * (1024 * 2048 + 2 * 1024)
    expected = {
        "emb": 32000 * 1024 + gate_levels // 4,
        "proj": 4 * 1024 * (4096 + 2048) + 2 * gate_levels,
        "cell_ln": 2 * 2048,
        "state_ln": 2 * 2048,
        "inner": 2048 * 1024 + gate_levels // 4,
        "head": 32000 * 2048,
    }
    assert {name: sum(p.numel() for p in module.parameters()) for name, module in lstm.named_children()} == expected


def test_size_of_a_large_lstm():
    """1.185B parameters at hidden size and width 4096, 128,256 tokens, three tied heads."""
    with torch.device("meta"):
        lstm = build_speculator("lstm", LstmConfig(), SimpleNamespace(hidden_size=4096, vocab_size=128256), Objective())
    assert round(sum(p.numel() for p in lstm.parameters()) / 1e9, 3) == 1.185
