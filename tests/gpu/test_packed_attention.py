"""FlexAttention's kernels inside documents, against dense masks in float64: states, and gradients of a base that is trained."""

import pytest
import torch

from spectitan.models import decoder
from tests.unit.test_packed_attention import build, packed


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [-1, 7, 200])
@pytest.mark.parametrize("rows", [[[150, 1, 40, 2], [193]], [[3, 140, -50], [193]]])
def test_equals_dense_masks(rows, window, compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    ids = packed(*rows)
    tokens = torch.randint(97, ids.shape, generator=torch.Generator().manual_seed(1))

    def run(model, device):
        model = model.to(device).requires_grad_()
        states = model(tokens.to(device), ids.to(device)).final[ids >= 0]
        states.square().mean().backward()
        return states, [parameter.grad for name, parameter in model.named_parameters() if name.startswith("layers.")]

    expected = run(build(window, torch.float64), "cpu")
    monkeypatch.setattr(decoder, "attention_bias", None)  # nothing dense
    model = build(window)
    for block in model.layers if compiled else ():
        block.compile()
    found = run(model, "cuda")
    torch.testing.assert_close(found[0].double().cpu(), expected[0], rtol=1e-4, atol=1e-4)
    for actual, wanted in zip(found[1], expected[1]):
        assert (actual.double().cpu() - wanted).norm() < 1e-3 * wanted.norm()
