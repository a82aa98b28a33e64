"""Speed of the loader alone, from a cold cache, beside what training consumes; and how long it takes to start anywhere.

    python benchmarks/loader.py
    python benchmarks/loader.py --tokens 268435456 --training-tokens-per-second 50000

The corpus is synthetic: documents of log-normal length (median 600 tokens, uint16 ids). Before each cold run its files are put
out of the page cache; "read" is what the kernel then really fetched for this process, so it shows that the run was cold (a run
with workers reads in other processes and shows none). All samples of a run are different ones. Linux.

A second corpus has the index of `--documents` documents of 210,000 tokens on average, over files of ids that are holes: 10^7 of them
are more than 10^9 samples of 2,048 tokens. Starts at sample 0 and 10^9 are timed in processes of their own, index not in memory:
opening (shards, packing, order), the first batch, and what both add to the resident memory. The very first opening of a corpus walks the
index once, for the counts of what is split.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from spectitan.config.sections import Data
from spectitan.data.corpus import TokenisedDataset
from spectitan.data.loader import Loader
from spectitan.data.shards import Shards, ShardWriter

MICRO_BATCH_TOKENS = 16_384
VOCAB_SIZE = 32_000
FAR = 10**9
HOLE_TOKENS = 210_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**26, help="size of the corpus")
    parser.add_argument("--run-tokens", type=int, default=2**24, help="at most as many are read in a run")
    parser.add_argument("--training-tokens-per-second", type=float, default=5000.0, help="what the loader is compared with")
    parser.add_argument("--documents", type=int, default=10**7, help="in the corpus of holes")
    parser.add_argument("--folder", default=None, help="where the corpus is made for the time of the run; its disk is what is measured")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "loader.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_corpus(Path(folder), arguments.tokens)
        speeds = [
            measure_speed(Path(folder), seq_length, workers, cold, arguments.run_tokens)
            for seq_length in (256, 2048)
            for workers in (0, 2)
            for cold in (True, False)
        ]
        starts = [measure_start(Path(folder), position) for position in (0, FAR)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        index = measure_index(Path(folder), arguments.documents)
    for row in speeds:
        row["times_training"] = row["tokens_per_second"] / arguments.training_tokens_per_second
    report = {
        "speed": speeds,
        "start": starts,
        "index": index,
        "corpus_tokens": arguments.tokens,
        "training_tokens_per_second": arguments.training_tokens_per_second,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print_tables(report)
    Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def make_corpus(folder: Path, tokens: int) -> None:
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, VOCAB_SIZE)
    while writer.tokens < tokens:
        length = min(int(generator.lognormal(np.log(600), 1.0)) + 2, tokens - writer.tokens)
        writer.add(generator.integers(0, VOCAB_SIZE, length, dtype=np.uint32))
    writer.finish({"bytes": 4 * tokens, "held_out": 0, "dropped": {}, "skipped": []})


class HoleWriter(ShardWriter):
    """Writes documents whose ids are zeros that take no room."""

    def add_hole(self, length: int) -> None:
        self.add(np.zeros(0, np.uint32))
        self._file.seek(length * self._dtype.itemsize, os.SEEK_CUR)
        self._in_file += length
        self.tokens += length

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.truncate()
        super()._close_file()

    def finish_with(self, lengths: np.ndarray) -> None:
        """The index gets these lengths instead of the zeros that `add` has noted."""
        self._lengths.flush()
        (self._folder / "lengths.tmp").write_bytes(lengths.astype(np.int64).tobytes())
        self.finish({"bytes": 0, "held_out": 0, "dropped": {}, "skipped": []})


def measure_index(folder: Path, documents: int) -> dict:
    """Time to write and to open an index of so many documents, and to start at sample 0 and far into its order."""
    lengths = np.random.default_rng(0).lognormal(np.log(HOLE_TOKENS), 0.3, documents).astype(np.int64) + 2
    start = time.perf_counter()
    writer = HoleWriter(folder, VOCAB_SIZE)
    for length in lengths.tolist():
        writer.add_hole(length)
    added = time.perf_counter()
    writer.finish_with(lengths)
    written = time.perf_counter()
    report = {"documents": documents, "tokens": writer.tokens, "seconds_of_adding": added - start, "seconds_of_index": written - added}
    report["bytes"] = sum((folder / f"{name}.npy").stat().st_size for name in ("offsets", "order", "stream"))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        report["very_first"] = processes.apply(measure_far_start, (folder, 0))
        samples = report["very_first"]["samples"]
        report["starts"] = [processes.apply(measure_far_start, (folder, position)) for position in (0, min(FAR, samples - 1)) * 3]
    return report


def measure_far_start(folder: Path, position: int) -> dict:
    empty_cache(folder)
    memory, start = resident_memory(), time.perf_counter()
    loader = open_loader(folder, 2048, 0, position)
    opened = time.perf_counter()
    next(loader)
    return {
        "position": position,
        "samples": loader.samples_per_epoch,
        "milliseconds_to_open": 1000 * (opened - start),
        "milliseconds_to_first_batch": 1000 * (time.perf_counter() - opened),
        "megabytes_resident": (resident_memory() - memory) / 1e6,
    }


def resident_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_loader(folder: Path, seq_length: int, workers: int, position: int) -> Loader:
    data = Data(seq_length=seq_length, loader_workers=workers)
    size = MICRO_BATCH_TOKENS // seq_length
    layout = {"global_batch_size": size, "micro_batch_size": size, "rank": 0, "world_size": 1}
    return Loader([TokenisedDataset("synthetic", Shards(folder))], data, seed=0, position=position, **layout)


def measure_speed(folder: Path, seq_length: int, workers: int, cold: bool, run_tokens: int) -> dict:
    if cold:
        empty_cache(folder)
    loader = open_loader(folder, seq_length, workers, position=0)
    samples = min(run_tokens // seq_length, loader.samples_per_epoch)
    batches = samples * seq_length // MICRO_BATCH_TOKENS
    read = bytes_read()
    start = time.perf_counter()
    seen = [next(loader).sample_ids for _ in range(batches)]
    seconds = time.perf_counter() - start
    sample_ids = torch.cat(seen)
    assert len(sample_ids.unique()) == len(sample_ids)
    return {
        "seq_length": seq_length,
        "workers": workers,
        "cache": "cold" if cold else "warm",
        "samples": len(sample_ids),
        "tokens_per_second": batches * MICRO_BATCH_TOKENS / seconds,
        "megabytes_read": (bytes_read() - read) / 1e6,
    }


def measure_start(folder: Path, position: int) -> dict:
    empty_cache(folder)
    start = time.perf_counter()
    next(open_loader(folder, 2048, 0, position))
    return {"position": position, "milliseconds_to_first_batch": 1000 * (time.perf_counter() - start)}


def empty_cache(folder: Path) -> None:
    """Puts the files out of the page cache; nothing may have them mapped."""
    for path in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def bytes_read() -> int:
    """Bytes that this process had fetched from the disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def print_tables(report: dict) -> None:
    print(f"{'seq_length':>10}{'workers':>9}{'cache':>7}{'samples':>9}{'tokens/s':>14}{'x training':>12}{'MB read':>9}")
    for row in report["speed"]:
        print(
            f"{row['seq_length']:>10}{row['workers']:>9}{row['cache']:>7}{row['samples']:>9,}{row['tokens_per_second']:>14,.0f}"
            f"{row['times_training']:>12,.0f}{row['megabytes_read']:>9.1f}"
        )
    for row in report["start"]:
        print(f"first batch from sample {row['position']:,} of the order: {row['milliseconds_to_first_batch']:.0f} ms (cold)")
    index = report["index"]
    print(
        f"index of {index['documents']:,} documents, {index['tokens']:,} tokens: {index['bytes'] / 1e6:,.0f} MB, "
        f"written in {index['seconds_of_index']:.1f} s"
    )
    for row in (index["very_first"], *index["starts"]):
        print(
            f"  at sample {row['position']:,} of {row['samples']:,}: opened in {row['milliseconds_to_open']:.1f} ms, first batch after "
            f"{row['milliseconds_to_first_batch']:.1f} ms more, {row['megabytes_resident']:.1f} MB resident{' (the very first)' * (row is index['very_first'])}"
        )


if __name__ == "__main__":
    main()
