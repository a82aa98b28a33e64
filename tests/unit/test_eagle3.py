"""EAGLE-3's training forward against a dense float64 transcription, and its attention against all its backends."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from spectitan import compiled
from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.models import packed_attention
from spectitan.models.gpt_bigcode import GPTBigCodeConfig
from spectitan.models.llama import LlamaConfig
from spectitan.models.readout import Readout
from spectitan.objectives import losses
from spectitan.objectives.chunked import argmax_tokens, expected_acceptance
from spectitan.speculators import eagle3
from spectitan.speculators.eagle3 import Eagle3Config, Eagle3Speculator
from spectitan.speculators.ttt_attention import Memory, TTTAttention, choose_backend, document_spans
from spectitan.types import BaseStates, TokenBatch
from tests.unit.eagle3_oracle import outputs_of_document

VOCAB, HIDDEN = 53, 24
BASE = LlamaConfig(VOCAB, HIDDEN, intermediate_size=40, num_layers=9, num_heads=6, num_kv_heads=2, rope_theta=100.0, initializer_range=0.2)
SPANS = [[(0, 11), (11, 12), (12, 29)], [(0, 23), (23, 26)]]  # documents of two rows of 29 tokens; the second ends in padding


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Later steps leave rows out, also in batches as small as these."""
    monkeypatch.setattr(eagle3, "_ROWS", 4)


def make_batch(spans=SPANS, length: int = 29, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    document_ids, count = torch.full((len(spans), length), -1), itertools.count()
    for row, documents in enumerate(spans):
        for start, stop in documents:
            document_ids[row, start:stop] = next(count)
    index = torch.arange(len(spans))
    loss_mask = (torch.rand(len(spans), length, generator=generator) < 0.7) & (document_ids >= 0)
    return TokenBatch(torch.randint(0, VOCAB, loss_mask.shape, generator=generator), loss_mask, document_ids, index, index)


def make_readout(seed: int = 3) -> Readout:
    readout = Readout(VOCAB, HIDDEN, 1e-5, tied=False).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in readout.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return readout


def make_speculator(loss: str = "kl_div", base=BASE, seed: int = 0, **keys) -> Eagle3Speculator:
    """In float64, its norms not the identity."""
    speculator = Eagle3Speculator(Eagle3Config(**keys), base, Objective(loss=loss, chunk_rows=7))
    generator = torch.Generator().manual_seed(seed)
    speculator.init_weights(generator)
    with torch.no_grad():
        for name, parameter in speculator.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return speculator.double()


def make_states(speculator, batch: TokenBatch, seed: int = 5) -> BaseStates:
    generator = torch.Generator().manual_seed(seed)
    shape = *batch.tokens.shape, HIDDEN
    final, *taps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(1 + len(speculator.taps)))
    return BaseStates(final, tuple(taps))


def oracle_loss(
    speculator, weights: dict[str, Tensor], batch: TokenBatch, states: BaseStates, readout, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, sums of the first four columns [steps, 4] and counts [steps]: pair by pair, from the definition."""
    keys, steps = speculator.config, speculator.steps
    head = weights["lm_head.weight"] if keys.train_head else readout.head.weight
    embedding = weights["embed_tokens.weight"] if keys.embed_requires_grad else readout.embedding.weight
    logits, teachers, targets, where = [], [], [], []
    for row, document_ids in enumerate(batch.document_ids):
        for document in sorted(set(document_ids.tolist()) - {-1}):
            at = (document_ids == document).nonzero()[:, 0]
            tokens = batch.tokens[row, at]
            taps = [tap[row, at] for tap in states.taps]
            outputs = outputs_of_document(weights, keys, speculator.decoder, taps, tokens, embedding)
            for step, i in itertools.product(range(steps), range(len(at))):
                if i + 2 + step < len(at) and batch.loss_mask[row, at[i + 2 + step]]:
                    logits.append(outputs[step][i] @ head.T)
                    teachers.append(readout.head.weight @ states.final[row, at[i + 1 + step]])
                    targets.append(tokens[i + 2 + step])
                    where.append((row, int(at[i]), step))
    counts = torch.tensor([sum(step == k for *_, step in where) for k in range(steps)])
    values, stats = losses.mixture(loss, *map(torch.stack, (logits, targets, teachers)))
    right = {place: float(stat[1]) for place, stat in zip(where, stats)}
    total, sums = 0.0, torch.zeros(steps, 4, dtype=torch.float64)
    for place, value, stat in zip(where, values, stats):
        row, i, step = place
        total = total + keys.ttt_step_loss_decay**step * value / counts[step]
        so_far = all(right.get((row, i, earlier), 1.0) for earlier in range(step + 1))
        sums[step] += torch.cat([stat, torch.tensor([float(so_far)])])
    return total, sums, counts


CASES = {
    "one_step": dict(ttt_steps=1),
    "defaults": dict(),
    "deep_and_long": dict(num_layers=3, ttt_steps=7, ttt_step_loss_decay=0.8, norm_before_residual=False),
    "qwen3_norms": dict(draft_arch="qwen3", num_layers=2, norm_before_fc=True, norm_output=True, ttt_steps=4),
    "fc_norm_own_ends": dict(fc_norm=True, train_head=True, embed_requires_grad=True),
    "window": dict(sliding_window=5, ttt_steps=4, num_layers=2),
    "window_of_one_layer": dict(sliding_window=9, sliding_window_indices=[1], num_layers=3, ttt_steps=3),
    "window_below_steps": dict(sliding_window=2, ttt_steps=5),
    "window_of_one": dict(sliding_window=1, ttt_steps=3),
}


MIXTURE = '{"ce": 0.3, "jsd": 0.4, "nla": 0.5}'
LOSSES = ["ce", "kl_div", MIXTURE]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradients_of_the_dense_transcription(case, loss, attention):
    speculator, readout, batch = make_speculator(loss, attention=attention, **CASES[case]), make_readout(), make_batch()
    speculator.init_from_base(readout)
    states, targets = make_states(speculator, batch), speculator.align(batch)
    result = speculator(batch, states, targets, targets.counts, readout)
    result.total.backward()

    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in speculator.named_parameters()}
    total, sums, counts = oracle_loss(speculator, weights, batch, states, readout, loss)
    total.backward()
    assert torch.equal(result.counts, counts) and counts[-1] > 0
    torch.testing.assert_close(result.total, total, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.sums[:, :4], sums, rtol=1e-9, atol=1e-9)
    for name, parameter in speculator.named_parameters():
        expected = torch.zeros_like(parameter) if weights[name].grad is None else weights[name].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("loss", ["ce", "kl_div"])
def test_one_step_equals_many_micro_batches(loss):
    """Rows are independent and losses add up, so that a batch equals its rows one by one."""
    speculator, readout, batch = make_speculator(loss, num_layers=2, ttt_steps=3), make_readout(), make_batch()
    states = make_states(speculator, batch)
    targets = speculator.align(batch)
    whole = speculator(batch, states, targets, targets.counts, readout)
    total = 0
    for row in range(len(batch.tokens)):
        part = TokenBatch(*(x if x is None else x[row : row + 1] for x in batch))
        own = BaseStates(states.final[row : row + 1], tuple(tap[row : row + 1] for tap in states.taps))
        total += speculator(part, own, speculator.align(part), targets.counts, readout).total
    torch.testing.assert_close(total, whole.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spans", [[[]], [[(0, 1)]], [[(0, 2)]], [[(0, 3)]], [[(i, i + 3) for i in range(0, 12, 3)]]])
def test_documents_too_short_for_later_steps_or_for_any(spans):
    speculator, readout, batch = make_speculator("ce", ttt_steps=3), make_readout(), make_batch(spans, length=13, seed=2)
    batch = batch._replace(loss_mask=batch.document_ids >= 0)
    targets = speculator.align(batch)
    loss = speculator(batch, make_states(speculator, batch), targets, targets.counts, readout)
    loss.total.backward()
    pairs = [sum(max(0, stop - start - 2 - step) for start, stop in spans[0]) for step in range(3)]
    assert loss.counts.tolist() == pairs and (loss.sums[:, 0] > 0).tolist() == [count > 0 for count in pairs]
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in speculator.parameters())


@pytest.mark.parametrize(
    "needed, length, rows",
    [
        ([], 9, [0, 1, 2, 3]),
        ([], 3, [0, 1, 2]),
        ([5], 9, [0, 1, 2, 5]),
        ([8, 1, 1, 3, 0], 9, [0, 1, 3, 8]),
        ([7, 6, 5, 4, 3], 7 + 1, list(range(8))),
        ([6, 5, 4, 3, 2], 7, list(range(7))),
    ],
)
def test_rows_that_go_on_are_those_that_must_and_a_few_more(needed, length, rows):
    assert eagle3._rows_that_go_on(torch.tensor(needed, dtype=torch.int64), length).tolist() == rows


@pytest.mark.parametrize("tokens", ["own", "ground_truth"])
def test_every_batch_calls_the_readout_as_often(tokens, monkeypatch):
    """Where ranks share the base's weights each call is a collective, whatever a rank's own batch holds."""
    calls, call = [], Readout.call
    monkeypatch.setattr(Readout, "call", lambda *args: calls.append(1) or call(*args))
    seen = []
    for spans in ([], [(0, 2)], [(0, 3)], [(0, 13)]):
        speculator, batch = make_speculator("ce", ttt_steps=3, ttt_tokens=tokens), make_batch([spans], length=13, seed=2)
        targets = speculator.align(batch._replace(loss_mask=batch.document_ids >= 0))
        loss = speculator(batch, make_states(speculator, batch), targets, targets.counts, make_readout())
        loss.total.backward()
        assert all(parameter.grad.isfinite().all() for parameter in speculator.parameters())
        seen.append(len(calls))
        calls.clear()
    assert len(set(seen)) == 1 and seen[0] > 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_draft_vocabulary_of_some_tokens(loss):
    """Loss over the draft vocabulary, from the definition; a target outside is wrong, counted, and to ce of no account."""
    ids = torch.arange(3, VOCAB, 3)
    speculator = make_speculator(loss, ttt_steps=3, draft_vocab_size=len(ids))
    speculator.set_vocabulary(ids)
    readout, batch = make_readout(), make_batch()
    states, targets = make_states(speculator, batch), speculator.align(batch)
    loss_of_all = speculator(batch, states, targets, targets.counts, readout)
    full = make_speculator(loss, ttt_steps=3)
    seen = {}

    def spy(hidden, *args, **kwargs):
        seen["hidden"] = hidden
        return original(hidden, *args, **kwargs)

    original, eagle3.fused_linear_loss = eagle3.fused_linear_loss, spy
    try:
        full(batch, states, targets, targets.counts, readout)
    finally:
        eagle3.fused_linear_loss = original
    logits = seen["hidden"] @ readout.head.weight[ids].T
    tokens, teacher = batch.tokens.flatten()[targets.teacher + 1], states.final.flatten(0, 1)[targets.teacher]
    inside = torch.isin(tokens, ids)
    place = torch.where(inside, torch.searchsorted(ids, tokens), -1)
    values, stats = losses.mixture(loss, logits, place, teacher @ readout.head.weight[ids].T)
    expected = (values / targets.counts[targets.step]).sum()
    torch.testing.assert_close(loss_of_all.total, expected, rtol=1e-9, atol=0)
    for step in range(3):
        at = targets.step == step
        torch.testing.assert_close(loss_of_all.sums[step, 1], (stats[at, 1] * inside[at]).sum(), rtol=1e-9, atol=1e-12)
        assert loss_of_all.sums[step, 5] == (~inside[at]).sum()

    with torch.no_grad():  # validation: the chance that the base, with all of its vocabulary, keeps what is drafted
        alpha = speculator(batch, states, targets, targets.counts, readout).sums[:, 2]
    q = torch.zeros(len(logits), VOCAB, dtype=torch.float64).index_copy(1, ids, logits.softmax(-1).detach())
    true_alpha = torch.minimum(q, (teacher @ readout.head.weight.T).softmax(-1)).sum(-1)
    torch.testing.assert_close(alpha, torch.zeros(3, dtype=torch.float64).index_add(0, targets.step, true_alpha), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_targets_outside_the_draft_vocabulary(loss):
    speculator, readout, batch = make_speculator(loss, ttt_steps=2, draft_vocab_size=2), make_readout(), make_batch()
    speculator.set_vocabulary(torch.tensor([50, 52]))
    batch = batch._replace(tokens=batch.tokens % 50)
    targets = speculator.align(batch)
    result = speculator(batch, make_states(speculator, batch), targets, targets.counts, readout)
    result.total.backward()
    assert result.sums[:, 5].tolist() == result.counts.tolist() and result.sums[:, 1].tolist() == [0.0, 0.0]
    assert result.total.isfinite() and all(parameter.grad.isfinite().all() for parameter in speculator.parameters())
    assert (result.total == 0) == (loss == "ce")


def test_own_tokens_are_what_it_would_draft():
    """Fed with its own tokens, it is right where the text it is fed with equals them; its first step is that of the text."""
    own, given = (make_speculator("ce", ttt_steps=3, ttt_tokens=tokens) for tokens in ("own", "ground_truth"))
    readout, batch = make_readout(), make_batch([[(0, 29)]])
    batch = batch._replace(loss_mask=torch.ones_like(batch.loss_mask))
    states, targets = make_states(own, batch), own.align(batch)
    seen = []

    def spy(self, tokens, readout):
        seen.append(tokens.clone())
        return embed(self, tokens, readout)

    embed, Eagle3Speculator._embed = Eagle3Speculator._embed, spy
    try:
        with torch.no_grad():
            sums = own(batch, states, targets, targets.counts, readout).sums
    finally:
        Eagle3Speculator._embed = embed
    rows = targets.extra[1]
    assert len(seen) == 3 and len(rows) < 29
    weights = {name: parameter.detach() for name, parameter in own.named_parameters()}
    taps = [tap[0] for tap in states.taps]
    outputs = outputs_of_document(weights, own.config, own.decoder, taps, batch.tokens[0], readout.embedding.weight)
    assert torch.equal(seen[1][rows], (outputs[0] @ readout.head.weight.T).argmax(-1)[rows])
    with torch.no_grad():
        other = given(batch, states, targets, targets.counts, readout).sums
    torch.testing.assert_close(sums[0], other[0])
    assert not torch.equal(sums[1], other[1])


def random_attention_inputs(rows: Tensor, length: int, steps: int):
    generator = torch.Generator().manual_seed(1)
    memory = Memory()
    for step in range(steps + 1):
        count = length if step == 0 else len(rows)
        memory.add(*(torch.randn(1, 2, count, 8, generator=generator, dtype=torch.float64) for _ in range(2)))
    queries = torch.randn(1, 6, len(rows) if steps else length, 8, generator=generator, dtype=torch.float64)
    return queries, memory


@pytest.mark.parametrize("window", [-1, 3, 300])
def test_long_documents_in_a_window_go_by_bands(window):
    """Longer than a band, so that it is cut: both ways of attention by document agree."""
    length = 613
    ids = torch.zeros(1, length, dtype=torch.int64)
    ids[0, 601:] = 1
    rows = torch.arange(0, length, 3)
    for steps in (0, 2):
        queries, memory = random_attention_inputs(rows, length, steps)
        both = [TTTAttention(name, ids, document_spans(ids), rows)(queries, memory, window) for name in ("sdpa", "eager")]
        torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)


def test_compiled_diagonals(monkeypatch):
    """The same numbers, and a graph serves other numbers of rows."""
    results = {}
    for wanted in (False, True):
        monkeypatch.setattr(compiled, "_wanted", wanted)
        torch._dynamo.reset()
        for length, stride, steps in ((45, 2, 3), (67, 1, 2)):
            ids, rows = torch.arange(length)[None] // 31, torch.arange(0, length, stride)
            queries, memory = random_attention_inputs(rows, length, steps)
            leaves = [x.requires_grad_() for x in (queries, *memory.keys, *memory.values)]
            with torch._dynamo.config.patch(error_on_recompile=length == 67):
                attended = TTTAttention("sdpa", ids, document_spans(ids), rows)(queries, memory, -1)
                results[wanted, length] = attended, *torch.autograd.grad(attended.square().sum(), leaves)
    for length in (45, 67):
        torch.testing.assert_close(results[True, length], results[False, length], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keys", [{}, dict(num_layers=2, ttt_tokens="own"), dict(train_head=True, ttt_steps=5), dict(fc_norm=True)])
def test_useful_flops(keys, monkeypatch):
    """As PyTorch counts the products, attention's scores apart."""
    monkeypatch.setattr(eagle3, "_ROWS", 1)
    batch = make_batch([[(0, 33)]], 33)._replace(loss_mask=torch.ones(1, 33, dtype=torch.bool))
    speculator, readout = make_speculator(**keys), make_readout()
    speculator.chunk_rows = 1000
    targets, states = speculator.align(batch), make_states(speculator, batch)
    counter = FlopCounterMode(display=False)
    with counter:
        speculator(batch, states, targets, targets.counts, readout).total.backward()
    products = counter.get_flop_counts()["Global"]
    counted = products[torch.ops.aten.mm] + products[torch.ops.aten.addmm]
    if speculator.config.train_head:  # its gradient is summed in place, which PyTorch does not count
        counted += 2 * int(targets.counts.sum()) * HIDDEN * VOCAB
    assert counted == speculator.flops(targets.counts.tolist(), 33)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [-1, 5])
def test_flex_attention_forward_equals_the_others(window, monkeypatch):
    """Its backward needs a GPU; its mask, its log-sum-exp and the merging are the same on a CPU, eagerly."""
    monkeypatch.setattr(packed_attention, "_compiled_flex", lambda: flex_attention)
    ids = make_batch().document_ids
    rows = torch.tensor([0, 4, 5, 13, 28, 29, 40])
    for steps in (0, 3):
        queries, memory = random_attention_inputs(rows, ids.numel(), steps)
        expected = TTTAttention("eager", ids, document_spans(ids), rows)(queries, memory, window)
        attention = TTTAttention("eager", ids, document_spans(ids), rows)
        attention.backend = "flex"
        found = attention(queries, memory, window)
        inside = slice(None) if steps else ids.flatten() >= 0
        torch.testing.assert_close(found[:, :, inside], expected[:, :, inside], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(norm_before_fc=True, fc_norm=True), "speculator.fc_norm"),
        (dict(target_layer_ids=[1, 1, 2]), "speculator.target_layer_ids"),
        (dict(target_layer_ids=[1, 2, 10]), "from 0 to the base's 9"),
        (dict(sliding_window=0), "speculator.sliding_window"),
        (dict(sliding_window_indices=[0]), "speculator.sliding_window_indices"),
        (dict(sliding_window=4, sliding_window_indices=[1]), "speculator.num_layers"),
        (dict(draft_vocab_size=VOCAB + 1), "speculator.draft_vocab_size"),
        (dict(draft_vocab_size=0), "speculator.draft_vocab_size"),
        (dict(draft_hidden_act="swish"), "inherit, silu"),
    ],
)
def test_keys_that_cannot_be(keys, words):
    with pytest.raises(UserError, match=words):
        make_speculator(**keys)


@pytest.mark.parametrize("device, own, other", [("cpu", "sdpa", "flex"), ("cuda", "flex", "sdpa")])
def test_attention_that_has_a_backward_there(device, own, other):
    device = torch.device(device)
    assert [choose_backend(name, device) for name in ("auto", own, "eager")] == [own, own, "eager"]
    make_speculator(attention=own).check_device(device)
    with pytest.raises(UserError, match=f"speculator.attention.*allowed: auto, {own}, eager"):
        make_speculator(attention=other).check_device(device)


@pytest.mark.parametrize(
    "num_layers, taps", [(1, (0, 1)), (2, (0, 1, 2)), (3, (1, 2, 3)), (4, (1, 2, 3)), (6, (1, 3, 5)), (7, (2, 3, 4)), (32, (2, 16, 29))]
)
def test_default_taps(num_layers, taps):
    assert make_speculator(base=dataclasses.replace(BASE, num_layers=num_layers)).taps == taps


def test_the_activation_of_the_base():
    bases = {"silu": BASE, "gelu_pytorch_tanh": GPTBigCodeConfig(VOCAB, HIDDEN, num_layers=3, num_heads=3)}
    for act, base in bases.items():
        assert make_speculator(base=base, draft_hidden_act="inherit").decoder.hidden_act == act
        assert make_speculator(base=base).decoder.hidden_act == "silu"


def test_chunked_questions_about_logits(monkeypatch):
    from spectitan.objectives import chunked

    monkeypatch.setattr(chunked, "_CHUNK_BYTES", 4 * 31 * 3)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher, large = (torch.randn(n, 5, generator=generator) for n in (11, 13, 7, 31))
    assert torch.equal(argmax_tokens(hidden, weight), (hidden @ weight.T).argmax(-1)) and not len(argmax_tokens(hidden[:0], weight))
    rows, ids = torch.randint(0, 7, (11,), generator=generator), torch.arange(13) * 2
    p = (teacher[rows] @ large.T).softmax(-1)[:, ids]
    expected = torch.minimum(p, (hidden @ weight.T).softmax(-1)).sum(-1)
    torch.testing.assert_close(expected_acceptance(hidden, weight, teacher, large, rows, ids), expected)
