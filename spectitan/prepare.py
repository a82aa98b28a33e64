"""Tokenises the data ahead of training and shows what was found; makes a tokenizer, evaluation prompts or training data, if asked to.

python -m spectitan.prepare --job.config_file train_configs/quickstart.toml
python -m spectitan.prepare --base.path BASE --data.path TEXT --prepare.tokenizer_vocab_size 4096
python -m spectitan.prepare --base.path BASE --data.path TEXT --data.holdout 0.05 --prepare.num_prompts 64 --eval.prompts prompts.jsonl
python -m spectitan.prepare --base.path BASE --data.path TEXT --prepare.token_freq token_freq.pt
python -m spectitan.prepare --base.path BASE --data.path TEXT --prepare.generate generated/0.jsonl
python -m spectitan.prepare --job.config_file train_configs/eagle3_offline.toml --prepare.states true
"""

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from spectitan import program
from spectitan.config.sections import Data
from spectitan.config.tables import Config
from spectitan.data.corpus import TokenisedDataset, cache_folder, tokenise_held_out
from spectitan.data.cut_prompts import cut_prompts
from spectitan.data.documents import HELD_OUT, TRAINING, Dataset, Found, find_datasets, read_documents, validation_datasets
from spectitan.data.loader import SAMPLE_BITS, Loader, build_loader
from spectitan.data.rendering import rendered, texts_of
from spectitan.data.token_counts import count_targets, write_token_freq
from spectitan.data.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer, load_tokenizer, train_bpe
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.distributed.mesh import choose_device
from spectitan.errors import UserError
from spectitan.files import write_whole
from spectitan.filling import fill_states, open_states
from spectitan.models.registry import choose_config, get_model
from spectitan.models.weights import fingerprint, resolve_base_path
from spectitan.signals import StopSignal
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.states.continued import ContinuedStates, prompts_per_sample
from spectitan.states.generated import write_generated
from spectitan.states.online import OnlineStates
from spectitan.training.run_folder import check_can_be_written
from spectitan.types import TokenBatch

logger = logging.getLogger(__name__)

GREEN, END = "\x1b[32m", "\x1b[0m"


def prepare(config: Config, stop: StopSignal) -> None:
    """The program's work."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if config.job.threads > 0:
        torch.set_num_threads(config.job.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # of torchrun: states are all that is divided over processes
        fill_states(config, open_states(config))
        return
    base_path = resolve_base_path(config.base.path)
    check_files(config)
    if config.prepare.tokenizer_vocab_size > 0:
        write_tokenizer(config.data, base_path, config.prepare.tokenizer_vocab_size)
    opened = open_states(config) if config.prepare.states else None
    vocab_size, prompts = check_generation(config) if config.prepare.generate else (None, 0)
    tokenizer = load_tokenizer(base_path, vocab_size)
    if config.prepare.num_prompts > 0:
        write_prompts(config, tokenizer)
    loader = build_loader(config.data, tokenizer, seed=config.job.seed, global_batch_size=1, micro_batch_size=1)
    held_out = tokenise_held_out(config.data, tokenizer)
    print(table(loader, held_out))
    print(f"{loader.samples_per_epoch:,} samples of {config.data.seq_length} tokens in an epoch; shards are in {cache_folder(config.data)}")
    if config.prepare.token_freq:
        write_counts(Path(config.prepare.token_freq), loader, tokenizer.vocab_size)
    for _ in range(config.prepare.show):
        print(show_sample(next(loader), tokenizer, loader.datasets, uses_colour()))
    if config.prepare.generate:
        generate_data(config, tokenizer, prompts)
    if opened is not None:
        fill_states(config, opened)


def check_files(config: Config) -> None:
    """Raises UserError, before any work, for a file to write that is a folder or whose folder may not be written."""
    files = {"prepare.token_freq": config.prepare.token_freq, "prepare.generate": config.prepare.generate}
    if config.prepare.num_prompts > 0:
        files["eval.prompts"] = config.eval.prompts
    for key, file in files.items():
        if file and Path(file).is_dir():
            raise UserError(f"{key} = {file!r} is a folder; allowed: a file")
        if file:
            check_can_be_written(key, str(Path(file).parent))


def write_tokenizer(data: Data, folder: Path, vocab_size: int) -> None:
    """Trains a byte-level BPE tokenizer on the training part of the data and writes its two files.

    Raises:
        UserError: the folder has a tokenizer already; the text is too little for so large a vocabulary.
    """
    datasets = find_datasets(data)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} exists: prepare.tokenizer_vocab_size makes a new tokenizer; remove the old one, or set it to 0"
            )
    used = [dataset for dataset, weight in zip(datasets, data.weights or [1.0] * len(datasets)) if weight > 0]
    logger.info("training a tokenizer of %d tokens on %.1f MB", vocab_size, sum(dataset.num_bytes() for dataset in used) / 1e6)
    content = _in_a_process(_train_tokenizer, used, data, vocab_size)
    made = len(json.loads(content)["model"]["vocab"])
    if made < vocab_size:
        raise UserError(f"prepare.tokenizer_vocab_size = {vocab_size}: the text gives {made} tokens only; allowed: at most that")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write_whole(folder / "tokenizer.json", content)
    logger.info("written: %s", folder / "tokenizer.json")


def write_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Cuts evaluation prompts from the held-out text and writes the file that `eval.prompts` names.

    Raises:
        UserError: the file exists, or ships with the package; there is no held-out text, or too little.
    """
    path, count = Path(config.eval.prompts), config.prepare.num_prompts
    if path.exists() or config.eval.prompts == "none" or config.eval.prompts.startswith("spectitan:"):
        given = f"eval.prompts = {config.eval.prompts!r}"
        raise UserError(f"{given}: prepare.num_prompts writes a new file; allowed: a path where there is none")
    datasets, part = validation_datasets(config.data), None if config.data.val_path else HELD_OUT
    if part and not config.data.holdout:
        raise UserError("prepare.num_prompts cuts prompts from held-out text: set data.holdout or data.val_path")
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = (
        document._replace(source=document.source.removeprefix(f"{dataset.root}/"))
        for dataset in datasets
        for document in rendered(read_documents(dataset, config.data, part, Found()), tokenizer, config.data, Found(), dataset.name)
    )
    content = cut_prompts(documents, tokenizer, count, config.job.seed)
    found = content.count("\n")
    if found < count:
        raise UserError(f"prepare.num_prompts = {count}: the held-out text gives {found} only; allowed: at most that")
    write_whole(path, content)
    logger.info("written: %s, %d prompts", path, count)


def write_counts(path: Path, loader: Loader, vocab_size: int) -> None:
    """Writes how often each token of the training part is a target."""
    counts = count_targets([dataset.shards for dataset in loader.tokenised if dataset.shards], vocab_size)
    write_token_freq(path, counts)
    print(f"{(counts > 0).sum():,} of {vocab_size:,} tokens are targets, {counts.sum():,} times together: {path}")


def check_generation(config: Config) -> tuple[int, int]:
    """The base's vocabulary size, and how many prompts `prepare.generate` cuts from a sample.

    Raises:
        UserError: lengths that do not fit, or what is no base.
    """
    training = config.training
    base_config = choose_config(config.base.arch, config.base.variant, config.base.path)
    global_batch_size = training.global_batch_size if training.global_batch_size > 0 else training.micro_batch_size
    positions = base_config.max_position_embeddings
    return base_config.vocab_size, prompts_per_sample(config.stage2, global_batch_size, config.data.seq_length, positions, steps=1)


def generate_data(config: Config, tokenizer: Tokenizer, prompts: int) -> None:
    """Writes `prepare.generate`: what stage 2 of a run with these keys would sample, from sample `prepare.generate_start` on.

    Args:
        prompts: cut from each sample.

    Raises:
        UserError: samples beyond the last, a file that holds something else.
    """
    start, micro_batch_size = config.prepare.generate_start, config.training.micro_batch_size
    loader = build_loader(
        config.data, tokenizer, seed=config.job.seed, global_batch_size=micro_batch_size, micro_batch_size=micro_batch_size, position=start
    )
    samples = loader.samples_per_epoch - start if config.prepare.generate_samples == -1 else config.prepare.generate_samples
    if samples < 1:
        raise UserError(f"prepare.generate_start = {start}; allowed: below the {loader.samples_per_epoch} samples of the data")
    device = choose_device()
    dtype = resolve_compute_dtype(config.training.compute_dtype, device)
    sampling = {name: value for name, value in dataclasses.asdict(config.stage2).items() if name not in ("start_step", "batch_size")}
    settings = {
        "base": fingerprint(config.base.path, choose_config(config.base.arch, config.base.variant, config.base.path)),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "data": loader.fingerprints,
        "data.weights": config.data.weights,
        "data.seq_length": config.data.seq_length,
        "data.packing": config.data.packing,
        "data.overlong": config.data.overlong,
        "job.seed": config.job.seed,
        "prepare.generate_start": start,
        "prepare.generate_samples": samples,
        "prompts in a sample": prompts,
        "training.micro_batch_size": micro_batch_size,
        **{f"stage2.{name}": value for name, value in sampling.items()},
    }

    def make_source() -> ContinuedStates:
        base = get_model(config.base.arch, config.base.variant, config.base.path, dtype=dtype).requires_grad_(False).eval().to(device)
        return ContinuedStates(
            OnlineStates(base, (), frozen=True), config.stage2, first_sample=0, prompts=prompts, steps=1, seed=config.job.seed
        )

    write_generated(Path(config.prepare.generate), settings, samples, loader, make_source)


def _train_tokenizer(datasets: list[Dataset], data: Data, vocab_size: int) -> str:
    documents = (document for dataset in datasets for document in read_documents(dataset, data, TRAINING, Found()))
    return train_bpe((text for document in documents for text in texts_of(document.content)), vocab_size)


def _in_a_process(function, *arguments):
    """function(*arguments) in a process, so that a signal can end it: the library's training hears none, and a thread cannot be ended."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()
    try:
        result, error = receiving.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that trains the tokenizer ended with status {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    if error is not None:
        raise error
    return result


def _send_result(sending: Connection, function, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the program ends this process
    try:
        result = function(*arguments), None
    except Exception as error:
        result = None, error
    sending.send(result)


def table(loader: Loader, held_out: list[TokenisedDataset]) -> str:
    """One row a dataset: documents, tokens, bytes, samples, share of the tokens, held out; below it how full samples are, what rows
    were, what was split or dropped and why."""
    titles = ("dataset", "documents", "tokens", "supervised", "bytes", "bytes/token", "samples", "share", "held-out documents", "tokens")
    rows, notes = [titles], []
    evaluation = {name: shards.meta for name, shards in held_out}
    for name, counts in loader.counts.items():
        rows.append((*_row(name, counts), f"{counts['samples']:,}", f"{loader.shares[name]:.2%}", *_held_out(evaluation.pop(name, None))))
        notes += [f"{name}: {count:,} rows of {kind}" for kind, count in sorted(counts["kinds"].items())]
        notes.append(f"{name}: samples are {counts['fill']:.2%} filled; the longest document has {counts['longest']:,} tokens")
        notes += [f"{name}: {count:,} {what}" for what, count in counts["packed"].items()]
        notes += [f"{name}: {count:,} {what}" for what, count in sorted(counts["noted"].items())]
        notes += [f"{name}: dropped {count:,} ({reason})" for reason, count in sorted(counts["dropped"].items())]
        notes += [f"{name}: skipped {skipped}" for skipped in counts["skipped"]]
    rows += [(*_row(f"{name} (evaluation)", meta), "", "", "", "") for name, meta in evaluation.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join(lines + notes)


def _row(name: str, counts: dict) -> tuple[str, ...]:
    tokens, size = counts["tokens"], counts["bytes"]
    supervised = counts.get("supervised", tokens)
    return name, f"{counts['documents']:,}", f"{tokens:,}", f"{supervised:,}", f"{size:,}", f"{size / tokens:.3f}" if size else "-"


def _held_out(meta: dict | None) -> tuple[str, str]:
    return ("0", "0") if meta is None else (f"{meta['documents']:,}", f"{meta['tokens']:,}")


def uses_colour() -> bool:
    """On a terminal, or where FORCE_COLOR asks for it; never where NO_COLOR forbids it (no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    return os.environ.get("FORCE_COLOR", "") not in ("", "0") or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")


def show_sample(batch: TokenBatch, tokenizer: Tokenizer, datasets: list[str], colour: bool) -> str:
    """The text of a batch's first sample, document by document, with the tokens marked that training predicts.

    They are green in colour; without, the others are put in [[ ]]: the first of each document, and those the mask leaves out.
    """
    tokens, mask, documents = (tensor[0] for tensor in batch[:3])
    follows = torch.cat([torch.zeros(1, dtype=torch.bool), documents[1:] == documents[:-1]])
    supervised = mask & follows
    dataset, sample = divmod(int(batch.sample_ids[0]), 1 << SAMPLE_BITS)
    parts = documents[documents >= 0].unique()
    lines = [f"--- {datasets[dataset]}, sample {sample}: {len(tokens)} tokens, {int(supervised.sum())} supervised, documents: {len(parts)}"]
    for document in parts:
        here = documents == document
        lines.append(f"--- document of {int(here.sum())} tokens")
        lines.append(_marked(tokens[here].tolist(), supervised[here].tolist(), tokenizer, colour))
    return "\n".join(lines)


def _marked(ids: list[int], supervised: list[bool], tokenizer: Tokenizer, colour: bool) -> str:
    decoder, text = StreamDecoder(tokenizer), ""
    marks = {(True, True): (GREEN, END), (False, False): ("[[", "]]")}
    runs = [0] + [i for i in range(1, len(ids)) if supervised[i] != supervised[i - 1]] + [len(ids)]
    for start, stop in zip(runs, runs[1:]):
        before, after = marks.get((supervised[start], colour), ("", ""))
        run = ""
        for is_special, group in itertools.groupby(ids[start:stop], tokenizer.specials.__contains__):
            if is_special:
                run += "".join(map(tokenizer.specials.get, group))
            else:
                run += decoder.push(group) + decoder.finish()
        text += before + "".join(map(_visible, run)) + after
    return text


def _visible(character: str) -> str:
    """Control characters of the data are not for the terminal."""
    return character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]


def main(argv: list[str] | None = None) -> int:
    """The program: returns the exit status."""
    return program.run("prepare", prepare, argv, SPECULATOR_CONFIGS)


if __name__ == "__main__":
    program.end(main())
