"""A GPU's way to attend inside documents, against the dense masks that a CPU takes; its kernels need a GPU (tests/gpu)."""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from spectitan.models import decoder, packed_attention
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.packed_attention import document_block_mask

CONFIG = LlamaConfig(97, 32, 40, num_layers=2, num_heads=2, num_kv_heads=1, initializer_range=0.3)


def packed(*rows: list[int]) -> torch.Tensor:
    """Document ids of rows with documents of these lengths; a negative length is padding."""
    ids = [
        torch.cat([torch.full((abs(n),), 7 * row + place if n > 0 else -1) for place, n in enumerate(ns)]) for row, ns in enumerate(rows)
    ]
    return torch.stack(ids)


@pytest.mark.parametrize("reach", [1, 2, 127, 130, 500, 10**6])
@pytest.mark.parametrize("rows", [[[613]], [[1, 127, 128, 129, 3, 200], [588]], [[128, 256], [383, 1], [5, 130, -249]], [[5]]])
def test_blocks_in_closed_form_are_those_of_the_dense_mask(rows, reach):
    ids = packed(*rows)
    mask, length = document_block_mask(ids, reach), ids.shape[1]
    index = torch.arange(length)
    blocks = -(-length // 128)
    for row, row_ids in enumerate(ids):
        dense = (row_ids[:, None] == row_ids) & (index <= index[:, None]) & (index > index[:, None] - reach)
        assert torch.equal(mask.mask_mod(row, 0, index[:, None], index), dense)
        padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
        padded[:length, :length] = dense
        tiles = padded.view(blocks, 128, blocks, 128).transpose(1, 2).flatten(2)
        for i, j in itertools.product(range(blocks), repeat=2):
            partial = j in mask.kv_indices[row, 0, i, : mask.kv_num_blocks[row, 0, i]]
            full = j in mask.full_kv_indices[row, 0, i, : mask.full_kv_num_blocks[row, 0, i]]
            assert not (partial and full) and (not tiles[i, j].any() or partial or full)
            there = min(128, length - 128 * i)  # of the last block, the rows that there are
            assert not full or tiles[i, j].view(128, 128)[:there].all()
            assert not partial or tiles[i, j].any(), "a block that nothing is seen of"


def build(window: int, dtype: torch.dtype = torch.float32) -> EmbedLLaMA:
    model = EmbedLLaMA(CONFIG).to(dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    model.sliding_window = window
    return model.requires_grad_(False)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Models take the way that they take on a GPU, in eager arithmetic."""
    monkeypatch.setattr(packed_attention, "_compiled_flex", lambda: flex_attention)
    return lambda: monkeypatch.setattr(decoder, "can_flex", lambda device, dtype, head_dim: True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [-1, 7, 200])
@pytest.mark.parametrize("rows", [[[150, 1, 40, 2], [193]], [[3, 140, -50], [193]], [[1]], None])
def test_a_base_attends_the_same_with_both(rows, window, on_a_gpu):
    ids = None if rows is None else packed(*rows)
    tokens = torch.randint(97, (2, 193) if ids is None else ids.shape, generator=torch.Generator().manual_seed(1))
    kept = torch.ones_like(tokens, dtype=torch.bool) if ids is None else ids >= 0
    model = build(window)
    dense = model(tokens, ids).final
    on_a_gpu()
    torch.testing.assert_close(model(tokens, ids).final[kept], dense[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_compiled_blocks_serve_every_packing(on_a_gpu):
    """One graph, whatever the documents are, and it is the block's."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = build(-1)
    tokens = torch.randint(97, (2, 193), generator=torch.Generator().manual_seed(1))
    ids = [packed(*rows) for rows in ([[150, 43], [193]], [[1, 2, 190], [100, 93]], [[193], [64, 64, -65]])]
    expected = [model(tokens, each).final.detach() for each in ids]
    on_a_gpu()
    torch._dynamo.reset()
    with torch.no_grad():
        for block in model.layers:
            block.compile(backend=counting)
        for each, wanted in zip(ids, expected):
            found = model(tokens, each).final
            torch.testing.assert_close(found[each >= 0], wanted[each >= 0], rtol=1e-5, atol=1e-5)
            assert len(graphs) == 1
    assert any("flex_attention" in str(node.target) for node in graphs[0].graph.nodes)
