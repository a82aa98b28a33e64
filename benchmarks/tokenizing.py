"""Speed of tokenising beside what the `tokenizers` library reaches alone on the same documents; one line of 50 MB; peak memory.

    python benchmarks/tokenizing.py
    python benchmarks/tokenizing.py --tokenizer /models/Llama-3.1-8B --text /data/text --repeats 5
    python benchmarks/tokenizing.py --megabytes 2 --repeats 1     # a toy: does everything run?

Every measurement is a process of its own, and the ways take turns; ratios are medians over turns. "library" has the documents in memory
and gives their ids to nobody; "ours" is what `spectitan.prepare` does with an empty cache: reads JSON lines, hashes them, tokenises,
packs away on the disk. "line" is ours on the same characters as one JSON line. "quarter" is ours on a quarter of the documents: beside
"ours" its peak says whether memory grows with the corpus. Peaks are the largest resident memory of the process; "imports" what it had
before it did anything.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

WAYS = ("library", "library_fast", "ours", "line", "quarter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="spectitan:pystdlib", help="folder with a tokenizer.json")
    parser.add_argument("--text", default="python:stdlib+tests", help="as data.path; repeated until it is long enough")
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--document-characters", type=int, default=2000, help="the text is cut into documents of so many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "tokenizing.json"))
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way in ("ours", "line", "quarter"):
            (folder / way).mkdir()
        size = _in_a_process(write_documents, folder, arguments.text, arguments.megabytes, arguments.document_characters)
        turns = [{way: _in_a_process(measure, way, folder, arguments.tokenizer, size) for way in WAYS} for _ in range(arguments.repeats)]
    report = {
        "turns": turns,
        "of_library": median_ratio(turns, "library", "ours"),
        "of_library_fast": median_ratio(turns, "library_fast", "ours"),
        "line_of_documents": median_ratio(turns, "line", "ours"),
        "arguments": {key: value for key, value in vars(arguments).items() if key != "output"},
        "bytes": size,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.processor() or platform.machine(),
    }
    print_table(report)
    Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def median_ratio(turns: list[dict], slower: str, faster: str) -> float:
    return statistics.median(turn[slower]["seconds"] / turn[faster]["seconds"] for turn in turns)


def write_documents(folder: Path, text: str, megabytes: float, characters: int) -> int:
    """Writes the JSON lines of every way; returns the bytes of text in them."""
    documents, size = [], 0
    for document in cut_documents(text, characters):
        documents.append(document)
        size += len(document.encode())
        if size >= megabytes * 1e6:
            break
    for way, contents in (("ours", documents), ("line", ["".join(documents)]), ("quarter", documents[: len(documents) // 4])):
        with (folder / way / "text.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": content}, ensure_ascii=False) + "\n" for content in contents)
    return size


def cut_documents(path: str, characters: int) -> Iterable[str]:
    from spectitan.config.sections import Data
    from spectitan.data.documents import Found, find_datasets, read_documents
    from spectitan.data.rendering import texts_of

    data = Data(path=path, on_invalid="skip")
    while True:
        for dataset in find_datasets(data):
            for document in read_documents(dataset, data, None, Found()):
                for text in texts_of(document.content):
                    yield from (text[start : start + characters] for start in range(0, len(text), characters))


def measure(way: str, folder: Path, tokenizer: str, size: int) -> dict:
    """Seconds, and resident memory in bytes, of one way; run in a process of its own."""
    from spectitan.config.sections import Data
    from spectitan.data.corpus import tokenise_training
    from spectitan.data.tokenizer import load_tokenizer
    from spectitan.models.weights import resolve_base_path

    base, imports = resolve_base_path(tokenizer), peak_memory()
    if way.startswith("library"):
        from tokenizers import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        backend = Tokenizer.from_file(str(base / "tokenizer.json"))
        with (folder / "ours" / "text.jsonl").open(encoding="utf-8") as file:
            documents = [json.loads(line)["text"] for line in file]
        encode = backend.encode_batch if way == "library" else backend.encode_batch_fast
        start = time.perf_counter()
        for first in range(0, len(documents), 1000):  # at once they would fill the memory
            encode(documents[first : first + 1000], add_special_tokens=False)
    else:
        loaded = load_tokenizer(base)
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            ((_, shards),) = tokenise_training(Data(path=str(folder / way), cache_dir=cache), loaded)
            assert shards.num_tokens > 0
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes_per_second": size / seconds / 1e6, "peak": peak_memory(), "imports": imports}


def peak_memory() -> int:
    """Bytes. Of this process since it began; kilobytes are Linux's unit, bytes macOS's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def _in_a_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def print_table(report: dict) -> None:
    print(f"{'way':>14}{'seconds':>9}{'MB/s':>8}{'peak MB':>9}{'imports MB':>12}")
    for way in WAYS:
        seconds, speed, peak, imports = (
            statistics.median(turn[way][figure] for turn in report["turns"])
            for figure in ("seconds", "megabytes_per_second", "peak", "imports")
        )
        shown = f"{speed:.2f}" if way != "quarter" else ""
        print(f"{way:>14}{seconds:>9.2f}{shown:>8}{peak / 1e6:>9.0f}{imports / 1e6:>12.0f}")
    print(f"ours, of the library's encode_batch: {report['of_library']:.2f}, of its encode_batch_fast: {report['of_library_fast']:.2f}")
    print(f"a line of {report['bytes'] / 1e6:.0f} MB, of the same in short documents: {report['line_of_documents']:.2f} times the seconds")


if __name__ == "__main__":
    main()
