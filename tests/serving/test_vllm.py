"""A real vLLM serves an exported EAGLE-3 on the base that ships: the base's own greedy text, and the acceptance that evaluate finds.

Drafters of several shapes are trained for a minute each; or it is the one in SPECTITAN_SERVING_FOLDER, whose README names a base that vLLM finds.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from spectitan import prepare, train
from spectitan.config.sections import Eval
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import load_tokenizer
from spectitan.decoding.acceptance import measure_acceptance
from spectitan.decoding.generation import eos_ids
from spectitan.decoding.plain import generate_plain
from spectitan.models.registry import get_model
from spectitan.models.weights import resolve_base_path
from spectitan.speculators.serving import load_speculator
from tests.serving.vllm_server import VllmServer

RECIPE = Path(__file__).parents[2] / "train_configs" / "eagle3.toml"
BASE = resolve_base_path("spectitan:pystdlib")
NEW_TOKENS, PROMPTS = 128, 64


GIVEN = os.environ.get("SPECTITAN_SERVING_FOLDER")
VARIANTS = {
    "as_it_is": {},
    "reduced": {"draft_vocab_size": 1500},
    "qwen3_normed": {"draft_arch": "qwen3", "norm_before_fc": "true", "norm_output": "true"},
    "deep_with_own_ends": {"num_layers": 2, "train_head": "true", "embed_requires_grad": "true", "norm_before_residual": "false"},
    "window": {"sliding_window": 24, "fc_norm": "true"},
}


@pytest.fixture(scope="module", params=["given"] if GIVEN else VARIANTS)
def folder(request, tmp_path_factory) -> Path:
    if GIVEN:
        return Path(GIVEN)
    run, counts = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("counts") / "token_freq.pt"
    keys = {"job.dump_folder": run, "training.num_steps": 150, "stage2.start_step": -1, "eval.at_end": "false", "export.base_name": BASE}
    keys |= {f"speculator.{name}": value for name, value in VARIANTS[request.param].items()}
    if request.param == "reduced":
        assert prepare.main(flags(keys | {"prepare.token_freq": counts, "prepare.show": 0, "speculator.draft_vocab_size": -1})) == 0
        keys["speculator.token_freq_path"] = counts
    assert train.main(flags(keys)) == 0
    return run / "export"


def flags(keys: dict) -> list[str]:
    return [f"--job.config_file={RECIPE}", *(f"--{key}={value}" for key, value in keys.items())]


@pytest.fixture(scope="module")
def ours():
    """Base in float32, and prompts."""
    base = get_model("auto", "auto", BASE, dtype=torch.float32).requires_grad_(False).eval()
    return base, load_prompts("spectitan:pystdlib", load_tokenizer(BASE, base.config.vocab_size))[:PROMPTS]


@pytest.fixture(scope="module")
def served(folder, ours, tmp_path_factory):
    """Its texts, and its counters."""
    with VllmServer(Path(os.environ["SPECTITAN_VLLM"]), folder, tmp_path_factory.mktemp("server") / "log") as server:
        return [server.complete(prompt, NEW_TOKENS) for prompt in ours[1]], server.acceptance()


def test_its_text_is_the_greedy_text_of_the_base(served, ours):
    base, prompts = ours
    eos = eos_ids(base.config, None)
    plain = generate_plain(base, prompts, NEW_TOKENS, eos_id=eos).tokens
    assert served[0] == plain


def test_its_acceptance_is_what_evaluate_finds(served, folder, ours):
    base, prompts = ours
    speculator = load_speculator(folder, base.config).eval()
    report = measure_acceptance(
        base, speculator, prompts, Eval(max_new_tokens=NEW_TOKENS, batch_size=32), eos_id=eos_ids(base.config, None)
    )
    rounds, accepted, by_position = served[1]
    theirs = {
        "acceptance_length": 1 + accepted / rounds,
        "acceptance_by_position": [count / rounds for count in by_position],
        "rounds": rounds,
    }
    if path := os.environ.get("SPECTITAN_SERVING_REPORT"):
        figures = {"prompts": len(prompts), "max_new_tokens": NEW_TOKENS, "vllm": theirs, "spectitan": {key: report[key] for key in theirs}}
        Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    assert report["acceptance_length"] > 1.15, "a drafter that is never right shows nothing"
    assert theirs["acceptance_length"] == pytest.approx(report["acceptance_length"], rel=0.02)
    assert theirs["acceptance_by_position"] == pytest.approx(report["acceptance_by_position"], abs=0.02)
