"""The fused loss against the plain one in float64: values, gradients, awkward sizes, precision, memory."""

import json
import subprocess
import sys

import pytest
import torch

from spectitan import compiled
from spectitan.config.loss_mixture import loss_weights
from spectitan.objectives import block_passes, fused_linear, kept_memory, losses, mixture_pass, row_passes
from spectitan.objectives.fused_linear import Teacher, fused_linear_loss

SOFT = ("kl_div", "rkl", "jsd", "tv", "nla", "lk_hybrid", "ce_argmax")
PAPER = '{"ce": 0.1, "tv": 0.9}'  # DSpark's
ALL = '{"ce": 0.1, "kl_div": 0.2, "rkl": 0.3, "jsd": 0.4, "tv": 0.5, "nla": 0.6, "lk_hybrid": 0.7, "ce_argmax": 0.8}'
LOSSES = ("ce", *SOFT, PAPER, ALL)
FAST_AND_ALL = ("ce", "kl_div", ALL)  # each takes a path of its own


def make_case(rows=97, vocabulary=1009, width=31, *, magnitude=1.0, dtype=torch.float32, seed=0):
    """Inputs of a call; teacher rows repeat and skip, as those of several heads do."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, width, generator=generator) * magnitude / width**0.5).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    row_weights = torch.rand(rows, dtype=torch.float64, generator=generator)
    row_weights[::5] = 0
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[3::7] = -1  # none
    teacher_hidden = (torch.randn(rows, 23, generator=generator) * magnitude / 23**0.5).to(dtype)
    teacher_weight = torch.randn(vocabulary, 23, generator=generator).to(dtype)
    teacher_rows = torch.randint(max(rows // 2, 1), (rows,), generator=generator).sort()[0]
    return hidden, weight, row_weights, targets, Teacher(teacher_hidden, teacher_weight, teacher_rows)


def fused(case, loss, chunk_rows=-1):
    hidden, weight, row_weights, targets, teacher = case
    return fused_linear_loss(hidden, weight, row_weights, loss=loss, targets=targets, teacher=teacher, chunk_rows=chunk_rows)


def oracle(case, loss):
    """total, row_stats and both gradients, in float64 by autograd."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in case[:2])
    row_weights, targets, teacher = case[2:]
    logits = hidden @ weight.T
    teacher_logits = teacher and teacher.hidden.double()[teacher.rows.to(hidden.device)] @ teacher.weight.double().T
    row_losses, row_stats = losses.mixture(loss, logits, targets, teacher_logits)
    total = row_losses @ row_weights
    return total.detach(), row_stats, *torch.autograd.grad(total, (hidden, weight))


def assert_near(actual, expected, tolerance):
    """Largest error within tolerance of the largest value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= tolerance, f"relative error {error:.1e}"


def assert_equals_oracle(case, loss, tolerance, chunk_rows=-1):
    total, row_stats = fused(case, loss, chunk_rows)
    gradients = torch.autograd.grad(total, case[:2])
    expected = oracle(case, loss)
    for actual, wanted in zip((total, row_stats[:, 0], row_stats[:, 2], *gradients), (expected[0], *expected[1].T[[0, 2]], *expected[2:])):
        assert_near(actual, wanted, tolerance)
    assert torch.equal(row_stats[:, 1].double(), expected[1][:, 1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows, chunk_rows", [(97, -1), (97, 1), (97, 13), (97, 97), (96, 32), (1, -1)])
def test_equals_the_oracle(loss, rows, chunk_rows):
    assert_equals_oracle(make_case(rows), loss, 1e-5, chunk_rows)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocabulary", [2, 255, 256, 257, 1024])
def test_equals_the_oracle_around_block_boundaries(loss, vocabulary):
    assert_equals_oracle(make_case(7, vocabulary), loss, 1e-5)


@pytest.mark.parametrize("loss", FAST_AND_ALL)
def test_equals_the_oracle_where_a_chunk_takes_several_row_passes(loss):
    # A float32 product over so many columns is itself off by up to 2e-5 with some libraries, however it is reached.
    assert_equals_oracle(make_case(13, vocabulary=300_007, width=3), loss, 4e-5, chunk_rows=8)
    assert_equals_oracle(make_case(13, vocabulary=300_007, width=3, dtype=torch.float64), loss, 1e-13, chunk_rows=8)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_of_ten_thousand(loss):
    case = make_case(vocabulary=101, magnitude=3000)
    assert (case[0] @ case[1].T).abs().max() > 1e4
    # Float32 products of that size are off by 1e-3, and rkl takes differences of these logits. Exact ones are tested below.
    assert_equals_oracle(case, loss, 1e-3 if "rkl" in loss else 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_float64_is_computed_in_float64(loss):
    case = make_case(dtype=torch.float64)
    assert_equals_oracle(case, loss, 1e-13, chunk_rows=16)
    assert fused(case, loss)[0].dtype == torch.float64


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_keeps_statistics_in_float32(loss):
    case = make_case(dtype=torch.bfloat16)
    total, row_stats = fused(case, loss)
    assert total.dtype == row_stats.dtype == torch.float32
    expected = oracle(case, loss)
    assert_near(total, expected[0], 1e-3)
    assert_near(row_stats[:, 0], expected[1][:, 0], 5e-3)
    for actual, wanted in zip(torch.autograd.grad(total, case[:2]), expected[2:]):
        assert actual.dtype == torch.bfloat16
        # A rounded logit turns some q <= p around, where the gradients of tv and of its relatives jump.
        assert (actual - wanted).norm() < (5e-2 if loss in ("tv", "nla", "lk_hybrid", PAPER) else 1e-2) * wanted.norm()


def test_bfloat16_weight_gradient_is_accumulated_in_float32():
    """4,096 equal rows in chunks of 8: a bfloat16 sum would stop growing after 256 equal terms."""
    case = make_case(1, 11, 3, dtype=torch.bfloat16)
    hidden, targets, weight = case[0].detach().expand(4096, -1).contiguous(), case[3].expand(4096), case[1]
    total, _ = fused_linear_loss(hidden, weight, torch.ones(4096), loss="ce", targets=targets, chunk_rows=8)
    expected = oracle((case[0], weight, torch.full((1,), 4096.0).double(), case[3], None), "ce")
    assert_near(torch.autograd.grad(total, weight)[0], expected[3], 2e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_of_weight_0_gives_no_gradient_and_keeps_its_statistics(loss):
    hidden, weight, row_weights, targets, teacher = make_case()
    total, row_stats = fused((hidden, weight, row_weights, targets, teacher), loss)
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    scored = (row_weights == 0) & ((targets >= 0) | (loss != "ce"))
    assert not d_hidden[row_weights == 0].any() and (row_stats[scored, 0] > 0).all()
    kept = row_weights > 0
    without = (hidden[kept], weight, row_weights[kept], targets[kept], teacher._replace(rows=teacher.rows[kept]))
    assert_near(torch.autograd.grad(fused(without, loss)[0], weight)[0], d_weight.double(), 1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_bad_row_spoils_no_other(loss):
    hidden, weight, *rest = make_case()
    spoiled = hidden.detach().clone()
    spoiled[4] = torch.nan
    spoiled.requires_grad_()
    total, row_stats = fused((spoiled, weight, *rest), loss)
    expected_total, expected_stats = fused((hidden, weight, *rest), loss)
    others = torch.arange(len(hidden)) != 4
    assert row_stats[4, 0].isnan() and row_stats[4, 1] == 0 and torch.equal(row_stats[others], expected_stats[others])
    actual, expected = torch.autograd.grad(total, spoiled)[0], torch.autograd.grad(expected_total, hidden)[0]
    assert torch.equal(actual[others], expected[others]) and not expected[rest[0] == 0].any()


def extremes(rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a drafter and of a teacher: some of both +-1e4, certain of one token or of two, of the same or of others; and none so."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(2, rows, vocabulary, generator=generator)
    signs = torch.randint(-1, 2, (2, rows, vocabulary), generator=generator)
    logits[: rows // 2] += 1e4 * signs[0, : rows // 2]
    teacher_logits[: rows // 3] += 1e4 * signs[1, : rows // 3]
    logits[0], teacher_logits[0] = torch.full((vocabulary,), -1e4), torch.full((vocabulary,), 1e4)
    logits[0, 3] = teacher_logits[1, 5] = 1e4
    teacher_logits[-2] = logits[-2]
    return logits, teacher_logits


@pytest.mark.parametrize("loss", [*SOFT, ALL])
def test_the_pass_of_mixtures_on_given_logits(loss):
    """Numbers and gradients of float32 logits of +-1e4 themselves, which a matrix product would have rounded."""
    logits, teacher_logits = extremes(31, 257)
    targets = torch.randint(-1, 257, (31, 1), generator=torch.Generator().manual_seed(1))
    exact = logits.double().requires_grad_()
    row_losses, expected = losses.mixture(loss, exact, targets[:, 0], teacher_logits.double())
    expected_gradient = torch.autograd.grad(row_losses.sum(), exact)[0]
    row_stats = mixture_pass.mixture(logits, targets, teacher_logits, row_passes.argmax(teacher_logits), loss_weights(loss))
    assert_near(row_stats, expected, 1e-5)
    assert torch.equal(row_stats[:, 1].double(), expected[:, 1])
    assert_near(logits, expected_gradient, 1e-5)


@pytest.mark.parametrize("loss", FAST_AND_ALL)
def test_compiled_passes(monkeypatch, loss):
    """One graph takes full blocks, what is left of them, and teachers, in float32 and from bfloat16 as the passes that are not compiled."""
    monkeypatch.setattr(compiled, "_wanted", True)
    monkeypatch.setattr(block_passes, "_BLOCK_LOGITS", 8 * 1009)
    torch._dynamo.reset()
    assert_equals_oracle(make_case(45), loss, 1e-5, chunk_rows=20)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equals_oracle(make_case(67, seed=1), loss, 1e-5, chunk_rows=30)

    case = make_case(45, dtype=torch.bfloat16)
    total, row_stats = fused(case, loss, 20)
    gradients = torch.autograd.grad(total, case[:2])
    monkeypatch.setattr(compiled, "_wanted", False)
    expected, expected_stats = fused(case, loss, 20)
    assert_near(row_stats, expected_stats.double(), 1e-5)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, case[:2])):
        assert_near(actual, wanted.double(), 0.01)


@pytest.mark.parametrize("loss", [*SOFT, ALL])
def test_a_drafter_that_is_its_teacher(loss):
    """Losses are 0 (ce_argmax apart), alpha is 1, and where a loss is smooth its gradient is 0."""
    hidden, weight, row_weights, targets, _ = make_case()
    rows = torch.arange(len(hidden))
    _, row_stats = fused((hidden, weight, row_weights, targets, Teacher(hidden.detach(), weight.detach(), rows)), loss)
    assert (row_stats[:, 1] == 1).all()
    assert_near(row_stats[:, 2], torch.ones(len(hidden)).double(), 1e-6)
    if loss in ("ce_argmax", ALL):
        return
    assert row_stats[:, 0].abs().max() < 1e-6
    if loss in ("kl_div", "rkl", "jsd"):
        total, _ = fused((hidden, weight, row_weights, targets, Teacher(hidden.detach(), weight.detach(), rows)), loss)
        assert torch.autograd.grad(total, weight)[0].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["ce", "kl_div", "tv"])
def test_a_weight_multiplies_a_single_loss(name):
    case = make_case()
    total, row_stats = fused(case, name)
    doubled, doubled_stats = fused(case, json.dumps({name: 2}))
    for one, two in zip((total, *torch.autograd.grad(total, case[:2])), (doubled, *torch.autograd.grad(doubled, case[:2]))):
        assert_near(two, 2 * one.double(), 1e-6)
    assert_near(doubled_stats[:, 0], 2 * row_stats[:, 0].double(), 1e-6)
    assert torch.equal(doubled_stats[:, 1], row_stats[:, 1])


def test_ties():
    """A tie counts as right, and among the teacher's equals the first is the target."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0], [1.0]])
    _, row_stats = fused_linear_loss(hidden, weight, torch.ones(2), loss="ce", targets=torch.tensor([2, 0]))
    assert row_stats[:, 1].tolist() == [1, 0]
    logits = torch.zeros(1, 700)
    logits[0, [300, 301, 650]] = 1
    assert row_passes.distributions(logits, torch.empty_like(logits)).best.item() == 300


@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows(loss):
    hidden, weight, row_weights, targets, teacher = make_case(3)
    none = (hidden[:0], weight, row_weights[:0], targets[:0], teacher._replace(rows=teacher.rows[:0]))
    total, row_stats = fused(none, loss)
    assert total == 0 and row_stats.shape == (0, 3)
    total.backward()
    assert not weight.grad.any() and not hidden.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_scale_and_accumulate(loss):
    case = make_case()
    expected = torch.autograd.grad(fused(case, loss)[0], case[:2])
    for scale in (3, 1):
        (scale * fused(case, loss)[0]).backward()
    for tensor, gradient in zip(case[:2], expected):
        torch.testing.assert_close(tensor.grad, 4 * gradient)


def test_a_second_backward_is_refused():
    """The first has handed the gradients on, scaled in place."""
    total, _ = fused(make_case(), "ce")
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        total.backward()


def test_the_gradient_of_a_head_is_handed_on_and_not_copied(monkeypatch):
    case, places = make_case(), []

    class Noted(fused_linear._WideSum):
        def __init__(self, *args):
            super().__init__(*args)
            places.append(self.total.data_ptr())

    monkeypatch.setattr(fused_linear, "_WideSum", Noted)
    fused(case, "ce")[0].backward()
    assert [case[1].grad.data_ptr()] == places


@pytest.mark.parametrize("loss", FAST_AND_ALL)
def test_a_wider_head_is_computed_with_as_if_cast_and_its_gradient_is_not_rounded(loss):
    narrow = make_case(dtype=torch.bfloat16)
    master = (narrow[1].detach().float() * (1 + 1e-4)).requires_grad_()  # rounds to the same
    assert torch.equal(master.bfloat16(), narrow[1])
    total, row_stats = fused(narrow, loss, 13)
    d_hidden, d_head = torch.autograd.grad(total, narrow[:2])
    wide_total, wide_row_stats = fused((narrow[0], master, *narrow[2:]), loss, 13)
    d_hidden_beside, d_master = torch.autograd.grad(wide_total, (narrow[0], master))
    assert torch.equal(wide_total, total) and torch.equal(wide_row_stats, row_stats) and torch.equal(d_hidden_beside, d_hidden)
    assert d_master.dtype == torch.float32 and torch.equal(d_master.bfloat16(), d_head) and not torch.equal(d_master, d_head.float())


@pytest.mark.parametrize("loss", LOSSES)
def test_only_wanted_gradients_are_made(loss, monkeypatch):
    """Counts matrix products: one for logits, one for each gradient, one for the teacher."""
    hidden, weight, *rest = make_case()
    products = []
    mm, addmm_ = torch.mm, torch.Tensor.addmm_
    monkeypatch.setattr(torch, "mm", lambda *args, **options: products.append(1) or mm(*args, **options))
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: products.append(1) or addmm_(*args))

    def count(hidden, weight):
        products.clear()
        total, _ = fused((hidden, weight, *rest), loss)
        return total, len(products) - (loss != "ce")

    assert count(hidden, weight)[1] == 3
    assert count(hidden.detach(), weight)[1] == count(hidden, weight.detach())[1] == 2
    with torch.no_grad():
        total, made = count(hidden, weight)
    assert made == 1 and not total.requires_grad


def test_student_head_may_be_the_teachers():
    """A trained head that is the base's own gets the student's gradient alone."""
    hidden, weight, row_weights, targets, teacher = make_case()
    teacher = Teacher(torch.randn(len(hidden), weight.shape[1]), weight, teacher.rows)
    case = (hidden, weight, row_weights, targets, teacher)
    gradients = torch.autograd.grad(fused(case, "kl_div")[0], (hidden, weight))
    expected = oracle((*case[:4], teacher._replace(weight=weight.detach())), "kl_div")
    assert_near(gradients[1], expected[3], 1e-5)


PEAK = """
import resource, sys, torch
from spectitan.objectives.fused_linear import Teacher, fused_linear_loss
from spectitan.training.allocator import use_huge_pages
use_huge_pages()  # as programs do: glibc's own threshold leaves up to 25 MB in the heap, now and then
loss, rows = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
hidden, weight = (torch.randn(size, 512, requires_grad=True) for size in (rows, 32000))
targets = torch.zeros(rows, dtype=torch.int64)
teacher = Teacher(torch.randn(rows, 64), torch.randn(32000, 64), torch.arange(rows))
fused_linear_loss(hidden, weight, torch.ones(rows), loss=loss, targets=targets, teacher=teacher)[0].backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - 2 * hidden.nbytes)
"""


@pytest.mark.parametrize("loss", ["ce", "kl_div", PAPER])
def test_memory_grows_by_less_than_a_twentieth_of_a_row_of_logits(loss):
    few, many = (int(subprocess.check_output([sys.executable, "-c", PEAK, loss, str(rows)])) for rows in (600, 1600))
    assert (many - few) / 1000 < 0.05 * 32000 * 4


def test_memory_of_chunks_stays(monkeypatch):
    """The next loss gets the same; one with more rows gets more; each name and dtype has its own."""
    monkeypatch.setattr(kept_memory, "_kept", {})
    head = torch.empty(11, 3)
    first = kept_memory.kept_memory("logits", 7, head)
    assert first.shape == (7, 11)
    assert kept_memory.kept_memory("logits", 5, head).data_ptr() == first.data_ptr()
    others = kept_memory.kept_memory("teacher", 7, head), kept_memory.kept_memory("logits", 7, head, torch.float64)
    more = kept_memory.kept_memory("logits", 8, head)
    assert more.shape == (8, 11) and len({x.data_ptr() for x in (first, *others, more)}) == 4
    assert kept_memory.kept_memory("logits", 7, head).data_ptr() == more.data_ptr()
