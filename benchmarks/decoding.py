"""Decoding speed: ours against transformers.generate on the same weights, dtype and threads, and with a speculator.

    python benchmarks/decoding.py --threads 2
    python benchmarks/decoding.py --base spectitan:pystdlib --speculator outputs/quickstart/export --threads 2

Greedy, batch 1, float32, new tokens only, prefill included on all sides, eos ignored. The ways alternate prompt by prompt in one
process; speeds are medians over prompts. Texts are compared: a speed for another text would mean nothing. Without --base,
a random one of the shipped base's shape; random prompts then.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import load_tokenizer
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.speculative import generate_speculative
from spectitan.models.registry import get_model
from spectitan.models.weights import resolve_base_path, save_hf
from spectitan.speculators.serving import load_speculator

SHAPE = "spectitan:pystdlib"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="", help="folder, or spectitan:NAME; empty: random weights")
    parser.add_argument("--speculator", default="", help="exported folder of a speculator for that base")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "decoding.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    base = get_model("embedllama", "auto", arguments.base or SHAPE, init="pretrained" if arguments.base else "random")
    base.requires_grad_(False).eval()
    prompts = choose_prompts(arguments, base.config)
    ways = {"transformers": reference(base, arguments.new_tokens), "plain": lambda prompt: plain(base, prompt, arguments.new_tokens)}
    if arguments.speculator:
        speculator = load_speculator(arguments.speculator, base.config).requires_grad_(False).eval()
        ways["speculative"] = lambda prompt: speculative(base, speculator, prompt, arguments.new_tokens)

    for way in ways.values():  # warm up
        way(prompts[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    same = dict.fromkeys(ways, 0)
    for number, prompt in enumerate(prompts):
        texts = {}
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]  # none always runs after the same one
        for name in order:
            start = time.perf_counter()
            texts[name] = ways[name](prompt)
            seconds[name].append(time.perf_counter() - start)
        for name, text in texts.items():
            same[name] += text == texts["plain"]

    rows = []
    for name, times in seconds.items():
        ratios = [reference / ours for reference, ours in zip(seconds["transformers"], times)]
        rows.append(
            {
                "way": name,
                "tokens_per_second": arguments.new_tokens / statistics.median(times),
                "of_transformers": statistics.median(ratios),
                "texts_equal_to_plain": same[name],
            }
        )
    report = {
        "rows": rows,
        "prompts": len(prompts),
        "new_tokens": arguments.new_tokens,
        "base": arguments.base or f"random, shape of {SHAPE}",
        "base_parameters": sum(parameter.numel() for parameter in base.parameters()),
        "speculator": arguments.speculator or None,
        "dtype": "float32",
        "batch_size": 1,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
    print(f"{'':<14}{'tokens/s':>10}{'of transformers':>18}{'texts as plain':>16}")
    for row in rows:
        print(
            f"{row['way']:<14}{row['tokens_per_second']:>10.1f}{row['of_transformers']:>18.2f}{row['texts_equal_to_plain']:>12} / {len(prompts)}"
        )
    Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def choose_prompts(arguments: argparse.Namespace, config) -> list[list[int]]:
    if arguments.base:
        return load_prompts(arguments.base, load_tokenizer(resolve_base_path(arguments.base)))[: arguments.prompts]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (arguments.prompts, 64), generator=generator).tolist()


def plain(base, prompt: list[int], new_tokens: int) -> list[int]:
    return generate_plain(base, [prompt], new_tokens).tokens[0]


def speculative(base, speculator, prompt: list[int], new_tokens: int) -> list[int]:
    return generate_speculative(base, speculator, [prompt], new_tokens, speculator.steps).tokens[0]


def reference(base, new_tokens: int):
    """transformers' model with the base's weights, and its generate."""
    with tempfile.TemporaryDirectory() as folder:
        save_hf(base, Path(folder) / "base", torch.float32)
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "base", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # both sides generate all tokens
    model.generation_config.pad_token_id = 0

    def generate(prompt: list[int]) -> list[int]:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            text = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False)
        return text[0, len(prompt) :].tolist()

    return generate


if __name__ == "__main__":
    main()
