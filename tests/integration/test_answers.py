"""Training on answers only, through the programs: what prepare shows, what held-out loss is of, and data that has no answers."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from spectitan import evaluate, prepare, train
from spectitan.config import manager
from spectitan.data.tokenizer import load_tokenizer
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.trained import find_trained, load_base, load_speculator_for
from tests.integration import tiny

TEMPLATE = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
SHORT = {"training__num_steps": 4, "eval__interval": 2, "eval__prompts": "none", "export__format": "none", "data__holdout": "0.0"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    """A base with a chat template; questions.parquet, of which every third answer is empty; held_out.jsonl, one sample of ids."""
    world = tiny.make(tmp_path_factory.mktemp("tiny"))
    (world.root / "base" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"extra": {"question": f"größe {i}?", "answer": f"count {i}" if i % 3 else ""}} for i in range(20)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), world.root / "questions.parquet")
    (world.root / "held_out.jsonl").write_text(json.dumps({"input": list(range(30, 40)), "output": list(range(80, 97))}))
    return world


def flags(world, dump_folder, **changes):
    keys = {"prompt_key": "extra", "prompt_dict_keys": "question", "response_key": "extra", "response_dict_keys": "answer"}
    keys = {f"data__{name}": value for name, value in keys.items()} | {"data__path": world.root / "questions.parquet"}
    return world.flags(dump_folder, **SHORT | keys | changes)


def test_prepare_shows_what_was_found_and_what_is_supervised(world, tmp_path, capsys):
    assert prepare.main(flags(world, tmp_path, data__seq_length=20, prepare__show=9)) == 0
    output = capsys.readouterr().out
    tokenizer = load_tokenizer(world.root / "base")
    answers = [tokenizer.encode(f"count {i}") for i in range(20) if i % 3]
    prompts = [tokenizer.encode(f"[user]größe {i}?[assistant]") for i in range(20) if i % 3]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)]
    ends = 0 if tokenizer.eos_id is None else 1
    cells = output.splitlines()[1].split()
    supervised = sum(map(len, answers)) + 13 * ends
    assert cells[1:4] == ["13", f"{sum(lengths) + 13 * ends:,}", f"{supervised:,}"]
    assert "questions.parquet: 13 rows of prompt and response" in output
    fill = (sum(lengths) + 13 * ends) / (-(-(sum(lengths) + 13 * ends) // 20) * 20)
    assert f"samples are {fill:.2%} filled; the longest document has {max(lengths) + ends} tokens" in output
    assert " documents split" in output
    assert "dropped 7 (empty 'extra' (data.response_key))" in output
    example = output[output.index("--- document") :]
    assert "[[[user]größe" in example and "[assistant]]]count" in example


def test_prepare_cuts_prompts_before_the_answer(world, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    changes = {"eval__prompts": path, "prepare__num_prompts": 5, "data__val_path": world.root / "questions.parquet"}
    assert prepare.main(flags(world, tmp_path, **changes)) == 0
    tokenizer = load_tokenizer(world.root / "base")
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(prompts) == 5 == len({prompt["source"] for prompt in prompts})
    for prompt in prompts:
        row = int(prompt["source"].rpartition(":")[2])
        assert prompt["tokens"] == tokenizer.encode(f"[user]größe {row - 1}?[assistant]")


@torch.no_grad()
def held_out_by_definition(base, speculator, prompt, output) -> tuple[list[float], float]:
    """Mean cross-entropy of each head, and of the base, over the targets in `output`."""
    tokens = torch.tensor(prompt + output)
    states = base(tokens[None], torch.zeros(1, len(tokens), dtype=torch.int64)).final[0]
    heads = []
    for head in range(speculator.steps):
        losses = []
        for target in range(max(len(prompt), 2 + head), len(tokens)):
            row = target - 2 - head
            state = speculator.first_state(states[row : row + 1])
            for step in range(head + 1):
                state = speculator.advance(step, state, speculator.emb[min(step, len(speculator.emb) - 1)](tokens[row + 1 + step][None]))
            logits = speculator.head[min(head, len(speculator.head) - 1)](state.hidden)
            losses.append(torch.nn.functional.cross_entropy(logits.double(), tokens[target][None]))
        heads.append(float(torch.stack(losses).mean()))
    logits = states @ base.readout.head.weight.T
    own = torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1].double(), tokens[len(prompt) :])
    return heads, float(own)


def test_held_out_loss_is_of_answers_only(world, tmp_path):
    run = flags(world, tmp_path / "run", data__val_path=world.root / "held_out.jsonl", eval__at_end="true")
    assert train.main(run) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    config = manager.load([*run, f"--speculator.path={tmp_path / 'run'}"], "evaluate", SPECULATOR_CONFIGS)
    trained = find_trained(config)
    base, _ = load_base(config, trained, torch.float32)
    speculator = load_speculator_for(config, trained, base)
    row = json.loads((world.root / "held_out.jsonl").read_text())
    heads, own = held_out_by_definition(base, speculator, row["input"], row["output"])
    assert report["heldout_loss"] == pytest.approx(heads, rel=1e-4) and report["base_heldout_loss"] == pytest.approx(own, rel=1e-4)
    assert report["heldout_tokens"] == len(row["output"])
    assert [evaluation["step"] for evaluation in evaluations] == [2] and all(map(math.isfinite, evaluations[0].values()))
    assert evaluate.main([*run, f"--speculator.path={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "x", "answer": ""}\n' * 3, "no training document in it; its documents: 3 empty 'answer' (data.response_key)"),
        ('{"question": "x", "answer": 5}\n', "its documents: 1 no string in 'answer' (data.response_key)"),
        ('{"question": "x", "reply": "y"}\n', "answers.jsonl:1: no column 'text' (data.text_column)"),
        ('{"question": "x", "answer": "y"}\n{"question"\n', "answers.jsonl:2: not valid JSON"),
        ('{"input": [1, 2], "output": [291]}\n', "answers.jsonl:1: token id 291; this tokenizer's are 0 .. 290"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "1 no assistant turn in 'messages' (data.messages_key)"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
            "answers.jsonl:1: messages need a chat",
        ),
    ],
)
@pytest.mark.parametrize("program", [train, prepare])
def test_data_without_answers_is_refused_in_one_line(world, tmp_path, capsys, program, content, message):
    (tmp_path / "answers.jsonl").write_text(content)
    shutil.copytree(world.root / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    run = world.flags(tmp_path / "run", **SHORT, data__path=tmp_path / "answers.jsonl", base__path=tmp_path / "base")
    assert message in tiny.refusal(program, run, capsys, tmp_path)
    assert not (tmp_path / "run").exists()
