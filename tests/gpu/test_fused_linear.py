"""The fused head and loss on a GPU, by way of Triton, against the plain ones in float64."""

import pytest
import torch

from spectitan.objectives import block_passes
from tests.unit.test_fused_linear import LOSSES, assert_equals_oracle, assert_near, fused, make_case, oracle


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    """Products in full float32, and no pass but Triton's."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    for kind in ("CePass", "KlDivPass", "MixturePass"):
        monkeypatch.setattr(block_passes, kind, None)


def on_gpu(case):
    hidden, weight, row_weights, targets, teacher = case
    hidden, weight = (tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight))
    teacher = teacher._replace(hidden=teacher.hidden.cuda(), weight=teacher.weight.cuda())  # rows stay with the host
    return hidden, weight, row_weights.cuda(), targets.cuda(), teacher


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocabulary", [1003, 151_936])
@pytest.mark.parametrize("rows, chunk_rows", [(97, -1), (97, 13), (1, -1)])
def test_equals_the_oracle(loss, vocabulary, rows, chunk_rows):
    assert_equals_oracle(on_gpu(make_case(rows, vocabulary)), loss, 4e-5, chunk_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocabulary", [1003, 151_936])
def test_bfloat16_keeps_statistics_in_float32(loss, vocabulary):
    case = on_gpu(make_case(vocabulary=vocabulary, dtype=torch.bfloat16))
    total, row_stats = fused(case, loss)
    assert row_stats.dtype == torch.float32
    expected = oracle(case, loss)
    assert_near(total, expected[0], 1e-3)
    assert_near(row_stats[:, 0], expected[1][:, 0], 5e-3)
    for actual, wanted in zip(torch.autograd.grad(total, case[:2]), expected[2:]):
        assert (actual - wanted).norm() < 5e-2 * wanted.norm()
