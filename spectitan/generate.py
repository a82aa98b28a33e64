"""Continues prompts with a base model, plain or with a speculator, and says how fast.

    python -m spectitan.generate --base.path spectitan:pystdlib --generate.prompt "def main("
    python -m spectitan.generate --base.path BASE --speculator.path FOLDER_OR_CHECKPOINT --generate.prompt_file prompts.txt

Text goes to stdout as it comes (a batch of several prompts when it is complete), figures to stderr.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from spectitan import program
from spectitan.config.sections import Generate
from spectitan.config.tables import Config
from spectitan.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from spectitan.decoding.acceptance import draft_length, summarize_acceptance
from spectitan.decoding.generation import Generation, check_prompts, eos_ids
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.sampling import Sampling
from spectitan.decoding.speculative import generate_speculative
from spectitan.distributed.mesh import choose_device
from spectitan.errors import UserError
from spectitan.signals import StopSignal
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.trained import find_trained, load_base, load_speculator_for, locate_base


def generate(config: Config, stop: StopSignal) -> None:
    """The program's work."""
    if config.job.threads > 0:
        torch.set_num_threads(config.job.threads)
    texts = read_prompts(config.generate)
    trained = find_trained(config)
    _, base_path, base_config = locate_base(config, trained)
    tokenizer = load_tokenizer(base_path, base_config.vocab_size)
    prompts = [start_of_text(text, tokenizer) for text in texts]
    check_prompts(prompts, base_config)
    base, _ = load_base(config, trained, torch.float32)
    base.to(choose_device())
    speculator = load_speculator_for(config, trained, base)

    settings = {
        "max_new_tokens": config.generate.max_new_tokens,
        "sampling": Sampling(config.generate.temperature, config.generate.top_k, config.job.seed),
        "eos_id": eos_ids(base.config, tokenizer.eos_id),
    }
    decode = partial(generate_plain, base, **settings)
    if speculator is not None:
        decode = partial(generate_speculative, base, speculator, num_draft_tokens=draft_length(speculator, config.eval), **settings)

    generations, size = [], config.generate.batch_size
    for start in range(0, len(prompts), size):
        writers = [Writer(text, prompt, tokenizer) for text, prompt in zip(texts[start : start + size], prompts[start : start + size])]
        numbers = range(start, start + len(writers))
        if len(writers) == 1:
            writers[0].begin(numbers[0], len(prompts))
            generations.append(decode(prompts[start : start + 1], row_keys=numbers, on_tokens=lambda row, tokens: writers[0].write(tokens)))
            writers[0].end()
            continue
        generations.append(decode(prompts[start : start + size], row_keys=numbers))
        for number, writer, tokens in zip(numbers, writers, generations[-1].tokens):
            writer.begin(number, len(prompts))
            writer.write(tokens)
            writer.end()
    print(figures(generations, draft_length(speculator, config.eval) if speculator else 0), file=sys.stderr)


class Writer:
    """Prints one prompt and its continuation; a character is printed when all its bytes are there."""

    def __init__(self, text: str, prompt: list[int], tokenizer: Tokenizer):
        self.text, self.decoder = text, StreamDecoder(tokenizer, context=prompt)

    def begin(self, number: int, total: int) -> None:
        if total > 1:
            print(f"--- prompt {number + 1} of {total} ---")
        print(self.text, end="", flush=True)

    def write(self, tokens: list[int]) -> None:
        print(self.decoder.push(tokens), end="", flush=True)

    def end(self) -> None:
        print(self.decoder.finish(), flush=True)


def read_prompts(config: Generate) -> list[str]:
    """generate.prompt, or the lines of generate.prompt_file."""
    if not config.prompt_file:
        return [config.prompt]
    content = Path(config.prompt_file).read_bytes()
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    if not lines:
        raise UserError(f"generate.prompt_file = {config.prompt_file}: an empty file; allowed: one prompt a line")
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError:
            raise UserError(f"{config.prompt_file}:{number}: not valid UTF-8") from None
    return texts


def start_of_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt; an empty one begins as a document does, after the end of another."""
    prompt = tokenizer.prompt(tokenizer.encode(text))
    if prompt:
        return prompt
    if tokenizer.eos_id is None:
        raise UserError("the prompt is empty, and the tokenizer has neither a bos nor an eos token to begin with: give some text")
    return [tokenizer.eos_id]


def figures(generations: list[Generation], num_draft_tokens: int) -> str:
    """One line: speed, and how many tokens a round of a speculator gave."""
    tokens = sum(len(text) for generation in generations for text in generation.tokens)
    seconds = sum(generation.seconds for generation in generations)
    line = f"{tokens} tokens in {seconds:.2f} s, prompts included: {tokens / seconds:.1f} tokens/s"
    if not num_draft_tokens:
        return f"{line} (plain decoding)"
    summary = summarize_acceptance([counts for generation in generations for counts in generation.accepted], num_draft_tokens)
    return f"{line}; acceptance_length {summary['acceptance_length']:.2f} in {summary['rounds']} rounds of {num_draft_tokens} drafted"


def main(argv: list[str] | None = None) -> int:
    """The program: returns the exit status."""
    return program.run("generate", generate, argv, SPECULATOR_CONFIGS)


if __name__ == "__main__":
    sys.exit(main())
