"""Acceptance and speed of a speculator, measured by drafting and verifying: what becomes report.json.

    acceptance_length (tau) = 1 + accepted draft tokens / verification rounds = 1 + sum(acceptance_by_position)

as vLLM counts: every round is verified in full, whatever the end of the text (eos, length) cuts off afterwards, and the token
that the prefill gives is no round. A product of teacher-forced accuracies is not tau.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from spectitan.config.sections import Eval
from spectitan.decoding.generation import EosId, Generation, check_prompts
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.sampling import Sampling
from spectitan.decoding.speculative import generate_speculative
from spectitan.decoding.tree import generate_tree
from spectitan.errors import UserError
from spectitan.models.decoder import DecoderConfig
from spectitan.speculators.base import Speculator

Prompts = Sequence[Sequence[int]]


def measure(
    base: nn.Module,
    speculator: Speculator,
    prompts: Prompts,
    config: Eval,
    *,
    eos_id: EosId,
    seed: int = 0,
    overlap: int | None = None,
) -> dict:
    """Acceptance on all prompts, whether the text is that of plain decoding, and speed.

    Touches nothing global: no gradients, no random state, no module's mode.

    Args:
        base, speculator: whole (not sharded), of one dtype; float32 if `identical` is to mean anything.
        overlap: prompts of which 64 consecutive tokens stand in the training data, to stand beside the figures; None: not counted.

    Returns:
        What summarize_acceptance and measure_speed return; identical: greedy texts are equal on all prompts, up to and including
        eos (None when sampled); first_difference: None, or where and by what top-2 margin; and the settings it all hangs on. With
        eval.top_k_tokens_per_head the same figures of a tree of candidates stand under "tree", those of the chain beside it.

    Raises:
        UserError: no prompts, one that does not fit the base's context, or drafts that the speculator cannot make.
    """
    prompts = select_prompts(prompts, config, base.config)
    plain, *drafting = decoders(base, speculator, config, eos_id, seed)
    plain_texts = decode_all(plain, prompts, config.batch_size)[0] if config.temperature == 0 else None
    reports = []
    for decode in drafting:
        texts, accepted = decode_all(decode, prompts, config.batch_size)
        difference = None if plain_texts is None else first_difference(base, prompts, plain_texts, texts)
        identical = {"identical": None if plain_texts is None else difference is None, "first_difference": difference}
        reports.append(summarize_acceptance(accepted, draft_length(speculator, config)) | identical)
    speeds = measure_speed(plain, drafting, prompts[: None if config.speed_prompts == -1 else config.speed_prompts])
    chain, *trees = (report | speed for report, speed in zip(reports, speeds))
    prompt_lengths = [len(prompt) for prompt in prompts]
    report = {
        **chain,
        "overlap": overlap,
        "prompt_tokens": {"min": min(prompt_lengths), "mean": sum(prompt_lengths) / len(prompts), "max": max(prompt_lengths)},
        "max_new_tokens": config.max_new_tokens,
        "num_draft_tokens": draft_length(speculator, config),
        "draft": "chain",
        "temperature": config.temperature,
        "batch_size": config.batch_size,
        "dtype": str(base.readout.head.weight.dtype).removeprefix("torch."),
        "device": base.readout.head.weight.device.type,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }
    if trees:
        report["tree"] = trees[0] | tree_settings(speculator, config, base.config.vocab_size)
    return report


def measure_acceptance(base: nn.Module, speculator: Speculator, prompts: Prompts, config: Eval, *, eos_id: EosId, seed: int = 0) -> dict:
    """Acceptance of the chain alone, as training reports it between steps. Arguments, errors and result: see `measure`."""
    _, chain, *_ = decoders(base, speculator, config, eos_id, seed)
    _, accepted = decode_all(chain, select_prompts(prompts, config, base.config), config.batch_size)
    return summarize_acceptance(accepted, draft_length(speculator, config))


def select_prompts(prompts: Prompts, config: Eval, base_config: DecoderConfig) -> Prompts:
    """The first eval.num_prompts of them, all checked before any is decoded."""
    prompts = prompts[: config.num_prompts if config.num_prompts >= 0 else None]
    if not prompts:
        raise UserError(f"eval.num_prompts is {config.num_prompts} and eval.prompts is {config.prompts!r}: at least one prompt is needed")
    check_prompts(prompts, base_config)
    return prompts


def draft_length(speculator: Speculator, config: Eval) -> int:
    """eval.num_draft_tokens, or what the speculator was trained for."""
    if config.num_draft_tokens == -1:
        return speculator.steps
    if not 1 <= config.num_draft_tokens <= speculator.steps:
        allowed = f"-1, or 1 to the {speculator.steps} steps of the speculator"
        raise UserError(f"eval.num_draft_tokens = {config.num_draft_tokens}; allowed: {allowed}")
    return config.num_draft_tokens


def tree_settings(speculator: Speculator, config: Eval, vocab_size: int) -> dict:
    """The two arguments of generate_tree, or {} without eval.top_k_tokens_per_head.

    Raises:
        UserError: the speculator cannot draft that tree.
    """
    top_k, k = config.top_k_tokens_per_head, draft_length(speculator, config)
    if not top_k:
        return {}
    given = f"eval.top_k_tokens_per_head = {top_k}"
    if not speculator.drafts_trees:
        raise UserError(f"{given}; allowed: an empty list: this speculator drafts one chain only")
    if len(top_k) != k:
        raise UserError(f"{given} has {len(top_k)} numbers; allowed: {k}, one for each drafted token")
    if max(top_k) > vocab_size:
        raise UserError(f"{given}; allowed: numbers up to the {vocab_size} tokens of the vocabulary")
    n_candidates = min(5, math.prod(top_k)) if config.n_candidates == -1 else config.n_candidates
    return {"top_k_tokens_per_head": top_k, "n_candidates": n_candidates}


Decoder = Callable[..., Generation]  # (prompts, row_keys=...) -> Generation


def decoders(base: nn.Module, speculator: Speculator, config: Eval, eos_id: EosId, seed: int) -> list[Decoder]:
    """Plain decoding, the speculator's chain and, if eval.top_k_tokens_per_head asks for it, its tree, all with the same settings."""
    settings = {"max_new_tokens": config.max_new_tokens, "sampling": Sampling(config.temperature, seed=seed), "eos_id": eos_id}
    chain = partial(generate_speculative, base, speculator, num_draft_tokens=draft_length(speculator, config), **settings)
    tree = tree_settings(speculator, config, base.config.vocab_size)
    return [partial(generate_plain, base, **settings), chain] + (
        [partial(generate_tree, base, speculator, **tree, **settings)] if tree else []
    )


def decode_all(decode: Decoder, prompts: Prompts, batch_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Texts and accepted counts of all prompts, decoded in batches; each row's random numbers hang on its place in `prompts`."""
    texts, accepted = [], []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        generation = decode(rows, row_keys=range(start, start + len(rows)))
        texts += generation.tokens
        accepted += generation.accepted
    return texts, accepted


def summarize_acceptance(accepted: list[list[int]], k: int) -> dict:
    """Figures from the accepted drafts of each round of each sequence, `k` drafted in each.

    Returns:
        acceptance_length: pooled over all rounds. acceptance_length_mean: mean of the sequences' own, of those that had a round.
        acceptance_by_position [k]: share of rounds in which drafted token i was accepted.
        conditional_acceptance [k]: the same, of the rounds in which all before it were; None where there was none.
        rounds, sequences, accepted_draft_tokens: counts.
    """
    counts = [count for sequence in accepted for count in sequence]
    rounds = max(len(counts), 1)  # no round at all: every figure is that of plain decoding
    reached = [sum(count >= position for count in counts) for position in range(k + 1)]
    own = [1 + sum(sequence) / len(sequence) for sequence in accepted if sequence]
    return {
        "acceptance_length": 1 + sum(counts) / rounds,
        "acceptance_length_mean": sum(own) / len(own) if own else 1.0,
        "acceptance_by_position": [reached[i + 1] / rounds for i in range(k)],
        "conditional_acceptance": [reached[i + 1] / reached[i] if reached[i] else None for i in range(k)],
        "rounds": len(counts),
        "sequences": len(accepted),
        "accepted_draft_tokens": sum(counts),
    }


def measure_speed(plain: Decoder, drafting: Sequence[Decoder], prompts: Prompts) -> list[dict]:
    """Wall-clock speed at batch 1 of each of `drafting`; all alternate with plain prompt by prompt after one warm-up of each.

    Returns:
        For each: plain_tokens_per_second, speculative_tokens_per_second: new tokens over the time of whole generations, prefill
        included on both sides. speedup: their ratio (the ratio of times, where the texts are equal).
        round_cost: time of a draft-verify round over that of a plain token, prefill excluded on both sides; None if there was
        no round. speedup is acceptance_length / round_cost, but for the prefill and for what the texts' ends cut off.
        speed_prompts: how many prompts; speed_batch_size: 1.
    """
    every = (plain, *drafting)
    for decode in every:
        decode(prompts[:1])
    runs: list[list[Generation]] = [[] for _ in every]
    for key, prompt in enumerate(prompts):
        for decode, generations in zip(every, runs):
            generations.append(decode([prompt], row_keys=[key]))
    return [speed_beside(runs[0], generations) for generations in runs[1:]]


def speed_beside(plain: list[Generation], speculative: list[Generation]) -> dict:
    """The figures of measure_speed, from generations of one row each."""
    runs = plain, speculative
    tokens, seconds, after_prefill = ([sum(map(figure, generations)) for generations in runs] for figure in (
        lambda generation: len(generation.tokens[0]),
        lambda generation: generation.seconds,
        lambda generation: generation.seconds - generation.prefill_seconds,
    ))  # fmt: skip
    plain_speed, speculative_speed = (n / time for n, time in zip(tokens, seconds))
    passes = tokens[0] - len(plain), sum(len(generation.accepted[0]) for generation in speculative)
    round_cost = (after_prefill[1] / passes[1]) / (after_prefill[0] / passes[0]) if all(passes) else None
    return {
        "plain_tokens_per_second": plain_speed,
        "speculative_tokens_per_second": speculative_speed,
        "speedup": speculative_speed / plain_speed,
        "round_cost": round_cost,
        "speed_prompts": len(plain),
        "speed_batch_size": 1,
        "prefill_timed": True,
    }


@torch.no_grad()
def first_difference(base: nn.Module, prompts: Prompts, plain: list[list[int]], speculative: list[list[int]]) -> dict | None:
    """None if the texts are equal; else where the first pair parts, and how far apart the base's two best logits are there."""
    for row, (prompt, ours, theirs) in enumerate(zip(prompts, plain, speculative)):
        if ours == theirs:
            continue
        position = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
        tokens = torch.tensor([[*prompt, *ours[:position]]], device=base.readout.head.weight.device)
        best = base.readout.logits(base(tokens).final[:, -1]).topk(2).values[0]
        of = [text[position] if position < len(text) else None for text in (ours, theirs)]
        return {"prompt": row, "position": position, "plain": of[0], "speculative": of[1], "top2_margin": float(best[0] - best[1])}
    return None
