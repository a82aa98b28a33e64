"""Time, memory and fill of packing documents into samples, by their lengths alone: the index of a corpus, and no ids.

    python benchmarks/packing.py
    python benchmarks/packing.py --documents 100000 --output /tmp/packing.json

Documents have log-normal lengths (median 300 tokens). Each packing is made in a process of its own: "anonymous" is the most that it
held beyond the maps of files (which the system may put out), "a document" the index's bytes on the disk. "open" is what every later start
costs. "masked" has a mask beside the ids, of which every other 512 tokens are supervised: it is read, and samples without any are left out.
Linux.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from spectitan.config.sections import Data
from spectitan.data.packing import packed
from spectitan.data.shards import FORMAT_VERSION, Shards

PACKINGS = [
    ("plain", "concat", "split"),
    ("plain", "best_fit", "split"),
    ("plain", "best_fit", "truncate"),
    ("plain", "document", "split"),
    ("masked", "concat", "split"),
    ("masked", "best_fit", "split"),
]
MASK = bytes(64) + b"\xff" * 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10**7)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--folder", default=None, help="where the index is made for the time of the run")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "packing.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_indexes(Path(folder), arguments.documents)
        rows = [in_a_process(Path(folder) / name, *packing, length) for length in arguments.seq_length for name, *packing in PACKINGS]
    report = {"documents": arguments.documents, "packings": rows, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    report["machine"] = platform.processor() or platform.machine()
    print(
        f"{'packing':<28}{'seq_length':>10}{'samples':>12}{'fill':>9}{'s to make':>11}{'of them CPU':>13}{'ms to open':>12}{'anonymous MB':>14}{'bytes a document':>18}"
    )
    for row in rows:
        print(
            f"{', '.join([row['index'], row['packing'], row['overlong']]):<28}{row['seq_length']:>10}{row['samples']:>12,}{row['fill']:>9.3%}"
            f"{row['seconds']:>11.2f}{row['processor_seconds']:>13.2f}{row['open_milliseconds']:>12.2f}{row['anonymous_bytes'] / 1e6:>14.1f}{row['index_bytes'] / arguments.documents:>18.1f}"
        )
    Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def make_indexes(folder: Path, documents: int) -> None:
    """The files of shards, of which that of the ids is a hole, without and with a mask."""
    plain, masked = folder / "plain", folder / "masked"
    plain.mkdir()
    masked.mkdir()
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(300), 0.9, documents).astype(np.int64) + 2
    order, tokens = generator.permutation(documents), int(lengths.sum())
    np.save(plain / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(plain / "order.npy", order)
    np.save(plain / "stream.npy", np.concatenate([[0], np.cumsum(lengths[order])]))
    with (plain / "tokens-00000.bin").open("wb") as file:
        file.truncate(2 * tokens)
    for path in plain.iterdir():
        os.link(path, masked / path.name)
    with (masked / "masks-00000.bin").open("wb") as file:
        for start in range(0, tokens // 8 + 1, 2**20):
            file.write((MASK * 2**13)[: min(2**20, -(-tokens // 8) - start)])
    for index in (plain, masked):
        sizes = {path.name: path.stat().st_size for path in sorted(index.iterdir())}
        meta = {"documents": documents, "tokens": tokens, "dtype": "<u2", "format": FORMAT_VERSION, "files": sizes}
        (index / "meta.json").write_text(json.dumps(meta))


def in_a_process(folder: Path, *arguments) -> dict:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sending, folder, *arguments))
    process.start()
    sending.close()
    row = receiving.recv()
    process.join()
    return row


def measure(sending, folder: Path, packing: str, overlong: str, seq_length: int) -> None:
    data = Data(packing=packing, overlong=overlong, seq_length=seq_length)
    shards, peak, done = Shards(folder), [anonymous_bytes()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(max(peak.pop(), anonymous_bytes()))

    watching = threading.Thread(target=watch)
    watching.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    samples = packed(shards, data, "synthetic")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    done.set()
    watching.join()
    start = time.perf_counter()
    packed(shards, data, "synthetic")
    opened = time.perf_counter() - start
    sizes = [path.stat().st_size for path in folder.glob(f"packing-*-{packing}-{overlong}-{seq_length}/*")]
    row = {
        "index": folder.name,
        "packing": packing,
        "overlong": overlong,
        "seq_length": seq_length,
        "samples": len(samples),
        "fill": float(samples.fill),
    }
    row |= {
        "seconds": seconds,
        "processor_seconds": cpu_seconds,
        "open_milliseconds": 1000 * opened,
        "anonymous_bytes": peak[0] - before,
        "index_bytes": sum(sizes),
    }
    sending.send(row | {"counts": samples.counts})


def anonymous_bytes() -> int:
    """Bytes that this process holds without what files are mapped for."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


if __name__ == "__main__":
    main()
