"""The programs evaluate and generate, whole, on a tiny base with a tokenizer and an exported speculator."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from spectitan import evaluate, generate
from spectitan.config.sections import Objective
from spectitan.data.tokenizer import load_tokenizer, train_bpe
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.weights import save_hf
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.speculators.serving import write_folder

CONTEXT = 80
TEXT = "def größe(x):\n    return {'naïve': x, '日本': x + 1}\n\n\nclass Häuser:\n    pass\n" * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base/, speculator/, data/ (training and held-out text) and prompts.jsonl."""
    root = tmp_path_factory.mktemp("models")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text(train_bpe([TEXT], 290), encoding="utf-8")
    config = LlamaConfig(290, 24, 32, num_layers=2, num_heads=2, max_position_embeddings=CONTEXT, eos_token_id=0, tie_embeddings=True)
    base = EmbedLLaMA(config)
    base.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        base.readout.embedding.weight *= 20  # far from uniform: bytes that are not UTF-8 come often, ties do not
    save_hf(base, root / "base", torch.float32, tokenizer_files_from=root / "tokenizer")
    speculator = MlpSpeculator(MlpConfig(3, 16, True, True), config, Objective())
    speculator.init_weights(torch.Generator().manual_seed(1))
    write_folder(speculator, root / "speculator", "mlp_speculator", root / "base", "")
    (root / "data").mkdir()
    for number in range(12):
        (root / "data" / f"{number}.txt").write_text(f"# {number}\n{TEXT[number * 7 :]}", encoding="utf-8")
    prompts = [{"text": "def größe"}, {"tokens": [5, 6, 7]}, {"text": "class"}, {"tokens": [9] * 70}]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    return root


def arguments(folders, dump_folder, *more):
    flags = {
        "base.path": folders / "base",
        "speculator.path": folders / "speculator",
        "job.dump_folder": dump_folder,
        "eval.prompts": folders / "prompts.jsonl",
        "eval.max_new_tokens": 24,
        "eval.batch_size": 3,
        "eval.speed_prompts": 2,
    }
    return [*(f"--{name}={value}" for name, value in flags.items()), *more]


def test_evaluate_writes_the_report(folders, tmp_path, capsys):
    data = [f"--data.path={folders / 'data'}", f"--data.val_path={folders / 'data'}", "--data.seq_length=32", "--eval.loss_samples=1000"]
    assert evaluate.main(arguments(folders, tmp_path / "run", *data)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["identical"] is True and report["overlap"] == 0 and report["sequences"] == 4
    assert len(report["acceptance_by_position"]) == len(report["heldout_loss"]) == 3
    assert report["dtype"] == "float32" and report["max_new_tokens"] == 24 and report["speed_prompts"] == 2
    assert (tmp_path / "run" / "acceptance.svg").read_text().startswith("<svg")
    assert f"{report['acceptance_length']:.3f}" in capsys.readouterr().out

    base, tokenizer = load(folders)
    nats, tokens, num_bytes = 0.0, 0, 0
    ids = [tokenizer.document(tokenizer.encode(file.read_text(encoding="utf-8"))) for file in (folders / "data").iterdir()]
    samples = sum(map(len, ids)) // 32
    assert report["heldout_tokens"] > samples * 20
    for document in ids:  # not cut into samples: the means are near, not equal
        for start in range(0, len(document), 32):
            piece = torch.tensor([document[start : start + 32]])
            if piece.shape[1] > 1:
                logits = base.readout.logits(base(piece).final[0, :-1])
                nats += float(F.cross_entropy(logits, piece[0, 1:], reduction="sum"))
                tokens += piece.shape[1] - 1
                num_bytes += len(tokenizer.decode(piece[0, 1:].tolist()).encode())
    assert math.isclose(report["base_heldout_loss"], nats / tokens, rel_tol=0.05)
    assert math.isclose(report["base_bits_per_byte"], nats / math.log(2) / num_bytes, rel_tol=0.08)


def test_evaluate_measures_a_tree_beside_the_chain(folders, tmp_path, capsys):
    tree = ["--eval.top_k_tokens_per_head=3,2,1", "--eval.n_candidates=4", "--eval.loss_samples=0"]
    assert evaluate.main(arguments(folders, tmp_path / "run", *tree)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = report["tree"]
    assert found["identical"] is True and (found["top_k_tokens_per_head"], found["n_candidates"]) == ([3, 2, 1], 4)
    assert found["sequences"] == 4 and len(found["acceptance_by_position"]) == 3 and found["speculative_tokens_per_second"] > 0
    assert "tree of candidates" in capsys.readouterr().out


def load(folders):
    from spectitan.models.registry import get_model

    return get_model("embedllama", "auto", folders / "base").requires_grad_(False), load_tokenizer(folders / "base")


def test_evaluate_the_base_alone(folders, tmp_path):
    flags = [f"--base.path={folders / 'base'}", "--speculator.type=none", f"--job.dump_folder={tmp_path}", "--data.seq_length=32"]
    assert evaluate.main([*flags, f"--data.val_path={folders / 'data'}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"base_heldout_loss", "base_bits_per_byte", "base_heldout_accuracy"}
    assert not (tmp_path / "acceptance.svg").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--speculator.path="], "nothing to evaluate"),
        (["--speculator.type=none"], "nothing to measure"),
        (["--speculator.type=lstm"], 'speculator has "mlp": leave speculator.type out, or name another speculator.path'),
        (["--eval.prompts=none"], "nothing to measure"),
        (["--eval.prompts=nowhere.jsonl"], "nowhere.jsonl"),
        (["--eval.num_draft_tokens=4"], "eval.num_draft_tokens = 4; allowed: -1, or 1 to the 3 steps"),
        (["--speculator.path=/nowhere"], "no such folder"),
        (["--eval.top_k_tokens_per_head=2,2"], "eval.top_k_tokens_per_head = [2, 2] has 2 numbers; allowed: 3"),
        (["--eval.top_k_tokens_per_head=2,0,1"], "each at least 1"),
        (["--eval.top_k_tokens_per_head=2,2,1", "--eval.n_candidates=5"], "eval.n_candidates = 5; allowed: -1, or 1 to the 4"),
        (["--eval.top_k_tokens_per_head=99,99,99"], "970299 candidates to choose from; allowed: up to 4096"),
        (["--eval.n_candidates=3"], "eval.n_candidates = 3 without eval.top_k_tokens_per_head"),
    ],
)
def test_evaluate_refuses_in_one_line(folders, tmp_path, capsys, changes, words):
    assert evaluate.main(arguments(folders, tmp_path / "run", *changes)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_measured_or_written_is_refused_before_the_base_is_read(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spectitan.evaluation.load_base", None)
    (tmp_path / "file").write_text("")
    long = tmp_path / "prompts.jsonl"
    long.write_text(json.dumps({"tokens": [1] * CONTEXT}))
    for flags, words in (
        (arguments(folders, tmp_path / "file"), "job.dump_folder"),
        (arguments(folders, tmp_path / "run", f"--eval.prompts={long}"), f"prompt 0 has {CONTEXT} tokens"),
        (arguments(folders, tmp_path / "run", "--eval.prompts=none"), "nothing to measure"),
    ):
        assert evaluate.main(flags) == 2
        assert words in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_named_before_any_is_decoded(folders, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"tokens": [1]}) + "\n" + json.dumps({"tokens": [1] * CONTEXT}))
    assert evaluate.main(arguments(folders, tmp_path / "run", f"--eval.prompts={prompts}")) == 2
    assert f"prompt 1 has {CONTEXT} tokens: the base's context of {CONTEXT} leaves" in capsys.readouterr().err


def greedy_text(folders, prompt, max_new_tokens):
    """The continuation of one prompt, without any cache, decoded at once."""
    base, tokenizer = load(folders)
    ids, new = tokenizer.encode(prompt) or [0], []
    while len(new) < max_new_tokens and len(ids) + len(new) < CONTEXT and new[-1:] != [0]:
        new.append(int(base.readout.logits(base(torch.tensor([ids + new])).final[0, -1]).argmax()))
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :], len(new)


@pytest.mark.parametrize("speculator", [False, True])
def test_generate_streams_the_greedy_text(folders, capsys, speculator):
    text, tokens = greedy_text(folders, "def größe", 40)
    flags = [f"--base.path={folders / 'base'}", "--generate.prompt", "def größe", "--generate.max_new_tokens=40"]
    assert generate.main(flags + [f"--speculator.path={folders / 'speculator'}"] * speculator) == 0
    printed = capsys.readouterr()
    assert printed.out == f"def größe{text}\n"
    assert f"{tokens} tokens in " in printed.err and "tokens/s" in printed.err
    assert ("acceptance_length" in printed.err) == speculator


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_generate_reads_a_file_of_prompts(folders, tmp_path, capsys, batch_size):
    lines = ["def größe", "", "class Häuser:", "x" * 20, "return"]
    (tmp_path / "prompts.txt").write_bytes("\n".join(lines).encode() + b"\n")
    flags = [f"--base.path={folders / 'base'}", f"--generate.prompt_file={tmp_path / 'prompts.txt'}", f"--generate.batch_size={batch_size}"]
    assert generate.main([*flags, f"--speculator.path={folders / 'speculator'}", "--generate.max_new_tokens=9"]) == 0
    shown = [f"--- prompt {number} of 5 ---\n{line}{greedy_text(folders, line, 9)[0]}\n" for number, line in enumerate(lines, 1)]
    assert capsys.readouterr().out == "".join(shown)


def test_sampled_text_hangs_on_the_seed_alone(folders, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("def\nclass\nreturn\n")
    flags = [f"--base.path={folders / 'base'}", f"--speculator.path={folders / 'speculator'}", "--generate.temperature=1"]
    flags += ["--generate.top_k=20", f"--generate.prompt_file={tmp_path / 'prompts.txt'}", "--generate.max_new_tokens=12"]
    texts = []
    for more in (["--generate.batch_size=1"], ["--generate.batch_size=3"], ["--job.seed=7"]):
        assert generate.main([*flags, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "content, words",
    [(b"", "an empty file"), (b"fine\n\xff\xfe\n", ":2: not valid UTF-8"), ("ü".encode() * 200, "leaves room for at most 79")],
)
def test_generate_refuses_in_one_line(folders, tmp_path, capsys, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert generate.main([f"--base.path={folders / 'base'}", f"--generate.prompt_file={tmp_path / 'prompts.txt'}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.strip().splitlines()) == 1 and words in printed.err


def test_generate_refuses_another_family_than_the_folder_has(folders, capsys):
    flags = [f"--base.path={folders / 'base'}", "--generate.prompt=class", f"--speculator.path={folders / 'speculator'}"]
    assert generate.main([*flags, "--speculator.type=eagle3"]) == 2
    assert capsys.readouterr().err.startswith(f'spectitan.generate: speculator.type = "eagle3"; {folders / "speculator"} has "mlp": leave')
    assert generate.main([*flags, "--speculator.type=mlp", "--generate.max_new_tokens=2"]) == 0


@pytest.mark.parametrize("program", ["evaluate", "generate"])
def test_the_programs_start(folders, tmp_path, program):
    """As a user starts them; an unknown prompt file is one line and status 2."""
    flags = {
        "evaluate": arguments(folders, tmp_path / "run", "--eval.prompts=nowhere"),
        "generate": [f"--base.path={folders / 'base'}", "--generate.prompt_file=nowhere"],
    }[program]
    done = subprocess.run([sys.executable, "-m", f"spectitan.{program}", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "nowhere" in done.stderr
