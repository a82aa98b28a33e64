"""The matrix products of a training step of EAGLE-3: the floor under its time."""

import json

import torch
from torch import Tensor
from vs_speculators_run import Run  # a neighbour: this folder is where Python looks first

from spectitan.models.weights import resolve_base_path


def products_of(run: Run) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(left, right, out) of each, of EAGLE-3 with one layer and three steps, every row supervised.

    As the model is written: each step multiplies the embeddings that it takes in, which ours does once for all steps. Heads go by
    blocks of rows, because one product of all rows is slower where its logits leave the cache.
    """
    config = json.loads((resolve_base_path(run.base) / "config.json").read_text())
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * hidden // heads, kv_heads * hidden // heads
    vocab = run.draft_vocab_size if run.reduced else vocab
    dtype, all_rows, products = getattr(torch, run.dtype), run.rows * run.seq_length, []
    buffers: dict[tuple, Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> Tensor:
        return buffers.setdefault((name, rows, columns), torch.randn(rows, columns).to(dtype))

    def linear(rows: int, inputs: int, outputs: int, from_states: bool = False) -> None:
        """A linear layer: its output, the gradient of its weight, and that of its input unless this needs none."""
        x, y, weight = matrix("x", rows, inputs), matrix("y", rows, outputs), matrix("weight", outputs, inputs)
        products.append((x, weight.T, y))
        products.append((y.T, x, weight))
        if not from_states:
            products.append((y, weight, x))

    linear(all_rows, 3 * hidden, hidden, from_states=True)
    for step in range(3):
        rows = all_rows if step == 0 else run.rows * (run.seq_length - 3)
        for outputs in (queries, keys, keys):
            linear(rows, hidden, outputs, from_states=True)  # what comes of the embedding, which is frozen
            linear(rows, hidden, outputs)
        linear(rows, queries, hidden)
        linear(rows, hidden, intermediate)
        linear(rows, hidden, intermediate)
        linear(rows, intermediate, hidden)
    block, pairs = 512, sum(run.rows * (run.seq_length - 2 - step) for step in range(3))
    head, logits = matrix("head", vocab, hidden), matrix("logits", block, vocab)
    teacher_rows = run.rows * (run.seq_length - 2)
    for count, backward in ((teacher_rows, False), (pairs, True)):
        for first in range(0, count, block):
            rows = min(block, count - first)
            x = matrix("block", block, hidden)[:rows]
            products.append((x, head.T, logits[:rows]))
            if backward:
                products.append((logits[:rows], head, x))
    return products
