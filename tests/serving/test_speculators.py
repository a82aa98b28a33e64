"""The package speculators reads folders for the base that ships: every tensor, and the logits of its forward are ours.

Recorded figures of this kind, for a random base, are a fixture of tests/unit/test_eagle3_folders.py, which needs no such package.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectitan.config.sections import Objective
from spectitan.models.registry import get_model
from spectitan.models.weights import resolve_base_path
from spectitan.speculators.eagle3 import Eagle3Config, Eagle3Speculator
from spectitan.speculators.serving import write_folder
from spectitan.speculators.ttt_attention import TTTAttention, document_spans
from spectitan.types import TokenBatch

BASE = resolve_base_path("spectitan:pystdlib")
LENGTHS = (19, 12)  # of two documents in a row
CASES = {
    "as_it_ships": {},
    "normed": dict(norm_before_fc=True, norm_output=True, norm_before_residual=False, ttt_steps=4),
    "fc_norm": dict(fc_norm=True, num_layers=2, train_head=True, embed_requires_grad=True),
    "reduced": dict(draft_arch="qwen3", draft_vocab_size=997, draft_hidden_act="gelu"),
    "two_taps": dict(target_layer_ids=[3, 8], ttt_steps=1),
    # One step: at later ones its windows do not move on with the tokens drafted, as a server's do.
    "window": dict(sliding_window=5, num_layers=2, sliding_window_indices=[1], ttt_steps=1),
}


def make(base, seed: int, keys: dict) -> Eagle3Speculator:
    """No norm is the identity."""
    speculator, generator = Eagle3Speculator(Eagle3Config(**keys), base.config, Objective()), torch.Generator().manual_seed(seed)
    speculator.init_weights(generator)
    if speculator.reduced:
        speculator.set_vocabulary(torch.randperm(speculator.vocab_size, generator=generator)[: speculator.draft_vocab_size].sort().values)
    speculator.init_from_base(base.readout)
    with torch.no_grad():
        for name, parameter in speculator.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return speculator.eval()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The base, case -> (speculator, folder, batch, states), and what the package has read and computed."""
    root, inputs, cases = tmp_path_factory.mktemp("folders"), {}, {}
    base = get_model("auto", "auto", BASE, dtype=torch.float32).requires_grad_(False).eval()
    document_ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    for seed, (case, keys) in enumerate(CASES.items()):
        speculator = make(base, seed, keys)
        write_folder(speculator, root / case, "speculators", BASE, base_name=str(BASE), readout=base.readout)
        tokens = torch.randint(0, base.config.vocab_size, document_ids.shape, generator=torch.Generator().manual_seed(seed))
        batch = TokenBatch(tokens, tokens >= 0, document_ids, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        states = base(tokens, document_ids, taps=speculator.taps)
        # Its row takes in the token of its own place: ours the one after the state.
        inputs[f"{case}.input_ids"] = tokens.roll(-1, 1).contiguous()
        inputs[f"{case}.document_ids"] = document_ids.clone()
        inputs[f"{case}.hidden_states"] = torch.cat(states.taps, -1)
        cases[case] = speculator, root / case, batch, states
    save_file(inputs, root / "inputs.safetensors")
    python, script = Path(os.environ["SPECTITAN_SPECULATORS"]) / "bin" / "python", Path(__file__).with_name("read_with_speculators.py")
    command = [python, script, root / "inputs.safetensors", root / "read.safetensors", *(root / case for case in CASES)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return base, cases, load_file(root / "read.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_it_reads_every_tensor(case, worlds):
    _, cases, read = worlds
    prefix = f"{case}.tensors."
    theirs = {name.removeprefix(prefix): tensor for name, tensor in read.items() if name.startswith(prefix)}
    written = load_file(cases[case][1] / "model.safetensors")
    assert written.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in written.items())


@pytest.mark.parametrize("case", CASES)
def test_logits_of_its_forward_are_ours(case, worlds):
    base, cases, read = worlds
    speculator, _, batch, states = cases[case]
    length = sum(LENGTHS)
    rows, theirs = torch.arange(length), read[f"{case}.logits"]
    attention = TTTAttention("auto", batch.document_ids, document_spans(batch.document_ids), rows)
    with torch.no_grad():
        outputs = speculator._unroll(batch, states, rows, attention, base.readout)
        head = speculator.lm_head.weight if speculator.config.train_head else speculator._rows_of_head(base.readout)
        ours = (outputs @ head.T).view(speculator.steps, length, -1)
    for step in range(speculator.steps):  # the last rows take in a token past the end
        torch.testing.assert_close(ours[step, : length - 1 - step], theirs[step, : length - 1 - step], rtol=1e-4, atol=1e-4)
