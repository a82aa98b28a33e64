"""The row pass in Triton against the plain losses in float64: on a GPU, or where there is none in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch

from spectitan.config.loss_mixture import loss_weights, needs_teacher
from spectitan.objectives import losses
from tests.unit.test_fused_linear import ALL, LOSSES, assert_near, extremes

triton_pass = pytest.importorskip("spectitan.objectives.triton_pass")  # Linux has Triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = torch.tensor([0, 0, 1, 3, 3, 5, 6], device=DEVICE)  # each one's teacher


def run(loss, logits, targets, teacher_logits):
    """row_stats and gradient."""
    row_pass = triton_pass.TritonPass(loss_weights(loss), len(logits), len(logits), logits)
    if needs_teacher(loss):
        row_pass.read_teacher(teacher_logits)
    row_stats, factors = row_pass.score(logits, targets, ROWS[: len(logits)] if needs_teacher(loss) else None)
    return row_stats, logits * factors


def assert_equals_plain(loss, logits, teacher_logits, targets, tolerance):
    exact = logits.double().requires_grad_()
    teachers = teacher_logits.double()[ROWS[: len(logits)]] if needs_teacher(loss) else None
    row_losses, expected = losses.mixture(loss, exact, targets[:, 0], teachers)
    (expected_gradient,) = torch.autograd.grad(row_losses.sum(), exact)
    row_stats, gradient = run(loss, logits, targets, teacher_logits)
    assert_near(row_stats, expected, 1e-5)
    assert torch.equal(row_stats[:, 1].double(), expected[:, 1])
    assert_near(gradient, expected_gradient, tolerance)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocabulary, dtype", [(31, torch.float32), (257, torch.float32), (1003, torch.bfloat16), (4099, torch.float32)])
def test_equals_the_plain_losses(loss, vocabulary, dtype):
    """Also of logits of +-1e4, at vocabularies of one block and of two, with rows without a target and teachers of several rows."""
    logits, teacher_logits = (tensor.to(DEVICE, dtype) for tensor in extremes(7, vocabulary))
    targets = torch.randint(-1, vocabulary, (7, 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[2] = -1
    assert_equals_plain(loss, logits, teacher_logits, targets, 1e-5 if dtype == torch.float32 else 1e-2)


def test_among_equals_the_first_is_the_teachers_choice():
    logits, teacher_logits = torch.zeros(2, 1, 5003, device=DEVICE)
    teacher_logits[0, [4001, 4002, 4100, 5000]] = 1
    teacher_logits[0, 3] = 1 - 2**-23  # nearly
    logits[0, 4001] = 1e-3
    row_stats, _ = run("kl_div", logits, torch.full((1, 1), -1, device=DEVICE), teacher_logits)
    assert row_stats[0, 1] == 1


def test_a_bad_row_spoils_no_other():
    logits, teacher_logits = (tensor.to(DEVICE) for tensor in extremes(7, 257))
    targets = torch.zeros(7, 1, dtype=torch.int64, device=DEVICE)
    expected_stats, expected = run(ALL, logits.clone(), targets, teacher_logits)
    logits[4] = torch.nan
    row_stats, gradient = run(ALL, logits, targets, teacher_logits)
    others = torch.arange(7, device=DEVICE) != 4
    assert row_stats[4, 0].isnan() and row_stats[4, 1] == 0 and torch.equal(row_stats[others], expected_stats[others])
    assert torch.equal(gradient[others], expected[others])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spectitan.config.loss_mixture import LOSSES
from spectitan.objectives.triton_pass import _score_row

TYPES = {"logits": "*bf16", "teacher_logits": "*bf16", "targets": "*i64", "place": "*i64", "row_stats": "*fp32"}
for names, absent in ((["ce"], ["teacher_logits", "place"]), (LOSSES, [])):
    types = {name: TYPES[name] if name in TYPES and name not in absent else "constexpr" for name in _score_row.arg_names}
    constants = {"vocabulary": 32_003, "block": 4096} | {name: 0.5 * (name in names) for name in LOSSES} | dict.fromkeys(absent)
    places = {(_score_row.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(_score_row, types, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 10_000
"""


def test_it_compiles_for_a_gpu(tmp_path, monkeypatch):
    """For compute capability 9.0, by Triton's own assembler: the interpreter takes more than the compiler does."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", COMPILE], check=True)
