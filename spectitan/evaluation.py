"""The report on a base and its speculator: held-out loss, acceptance, speed. Shared by evaluate and the end of training."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from spectitan.config.sections import Data, Eval, Objective
from spectitan.config.tables import Config
from spectitan.data.corpus import tokenise_training
from spectitan.data.overlap import count_overlap
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import Tokenizer, load_tokenizer
from spectitan.data.validation import build_validation, check_seq_length
from spectitan.decoding.acceptance import measure, measure_acceptance, select_prompts, tree_settings
from spectitan.decoding.generation import eos_ids
from spectitan.decoding.heldout import heldout_report, heldout_sums
from spectitan.decoding.report import table, write_report
from spectitan.distributed.mesh import choose_device
from spectitan.errors import UserError
from spectitan.speculators.base import Speculator, align_targets
from spectitan.speculators.next_token import NextToken
from spectitan.states.online import OnlineStates
from spectitan.trained import Trained, load_base, load_speculator_for, locate_base
from spectitan.types import TokenBatch


def evaluate_run(config: Config, trained: Trained | None) -> dict:
    """Measures what was trained, or the base alone; prints a table, writes report.json.

    Everything is float32: there, greedy text must be that of plain decoding.

    Raises:
        UserError: nothing trained, nothing to measure it on, or files that cannot be read.
    """
    if config.speculator.type != "none" and trained is None:
        raise UserError(
            f"speculator.path is empty and job.dump_folder = {config.job.dump_folder!r} has no checkpoint: nothing to evaluate; "
            'speculator.type = "none" evaluates the base alone'
        )
    _, base_path, base_config = locate_base(config, trained)
    tokenizer = load_tokenizer(base_path, base_config.vocab_size)
    drafts = config.speculator.type != "none" and trained.keys.get("speculator.type") != "none"
    prompts = load_prompts(config.eval.prompts, tokenizer) if drafts and config.eval.prompts != "none" else []
    if prompts:
        select_prompts(prompts, config.eval, base_config)
    if config.eval.loss_samples and (config.data.val_path or config.data.holdout):
        check_seq_length(config.data, base_config.max_position_embeddings)
    elif not prompts:
        raise UserError("nothing to measure: give eval.prompts (acceptance of a speculator), or data.val_path or data.holdout (loss)")
    base, _ = load_base(config, trained, torch.float32)
    base.to(choose_device())
    speculator = load_speculator_for(config, trained, base)
    if prompts:
        tree_settings(speculator, config.eval, base_config.vocab_size)
    validation = build_validation(config.data, tokenizer, config.eval.loss_samples, config.training.micro_batch_size)
    overlap = training_overlap(config.data, tokenizer, prompts)
    report = {"step": trained.step} if trained and trained.step is not None else {}
    report |= evaluate_models(base, speculator, tokenizer, prompts, validation, config.eval, seed=config.job.seed, overlap=overlap)
    print(table(report))
    print(f"written: {write_report(report, config.job.dump_folder)}", flush=True)
    return report


def evaluate_models(
    base: nn.Module,
    speculator: Speculator | None,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    validation: Sequence[TokenBatch],
    config: Eval,
    *,
    seed: int,
    overlap: int | None = None,
) -> dict:
    """All figures of report.json.

    Args:
        base, speculator: whole, frozen, of one dtype; without a speculator the base alone is measured.
        prompts: token ids; none, and acceptance and speed are left out.
        validation: held-out batches on the CPU; none, and held-out loss is left out.
        overlap: see decoding.acceptance.measure.

    Returns:
        Per head heldout_loss (nats a token), heldout_accuracy, ...; base_heldout_loss (nats a token), base_bits_per_byte,
        base_heldout_accuracy; and what `measure` returns.
    """
    report = {}
    if speculator is not None and prompts:
        eos = eos_ids(base.config, tokenizer.eos_id)
        report |= measure(base, speculator, prompts, config, eos_id=eos, seed=seed, overlap=overlap)
    if validation:
        if base.readout.plain_head:
            report |= base_heldout(base, tokenizer, validation)
        if speculator is not None:
            source = OnlineStates(base, speculator.taps, frozen=True)
            report |= heldout_report(speculator.metrics, *heldout_sums(speculator, source, validation, base.readout))
    return report


def checkpoint_acceptance(
    config: Config, trained: Trained, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], device: torch.device
) -> float:
    """Acceptance length of a checkpoint, with its base, in float32. Of one process alone."""
    base, _ = load_base(config, trained, torch.float32)
    speculator = load_speculator_for(config, trained, base.to(device))
    eos = eos_ids(base.config, tokenizer.eos_id)
    return measure_acceptance(base, speculator, prompts, config.eval, eos_id=eos, seed=config.job.seed)["acceptance_length"]


def training_overlap(data: Data, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> int | None:
    """How many prompts share 64 consecutive tokens with the training data; None without prompts or data.path."""
    if not prompts or not data.path:
        return None
    return count_overlap([dataset.shards for dataset in tokenise_training(data, tokenizer) if dataset.shards is not None], prompts)


def base_heldout(base: nn.Module, tokenizer: Tokenizer, validation: Sequence[TokenBatch]) -> dict:
    """The base's own loss on held-out text, in nats a token and in bits a byte of that text.

    A token that ends a text costs nats and has no bytes.
    """
    next_token = NextToken(base.config.hidden_size, base.config.vocab_size, Objective())
    sums, counts = heldout_sums(next_token, OnlineStates(base, (), frozen=True), validation, base.readout)
    nats, correct = (float(total) for total in sums[0, :2])
    tokens = max(int(counts[0]), 1)
    num_bytes = sum(supervised_bytes(batch, tokenizer) for batch in validation)
    return {
        "base_heldout_loss": nats / tokens,
        "base_bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
        "base_heldout_accuracy": correct / tokens,
    }


def supervised_bytes(batch: TokenBatch, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the tokens that the base's own loss predicts; a character that a sample cuts counts up to twice."""
    supervised = batch.loss_mask.new_zeros(batch.tokens.numel())
    supervised[align_targets(batch, steps=1, lookahead=0).teacher + 1] = True
    rows = zip(batch.tokens, supervised.view_as(batch.tokens))
    return sum(len(tokenizer.decode(tokens[kept].tolist()).encode()) for tokens, kept in rows)
