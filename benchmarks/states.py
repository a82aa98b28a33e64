"""Hidden states from disk: how fast they are read, beside training; and what int8 costs in acceptance.

    python benchmarks/states.py
    python benchmarks/states.py --steps 12 --parts reading --output /tmp/states.json    # a toy: does everything run?
    python benchmarks/states.py --parts acceptance

EAGLE-3 for the base that ships (3 layers and the final state, 256 numbers each, samples of 256 tokens). *training* is `spectitan.train`
on states of the base in the job, and on states from the cache; *reading* is what the trainer calls for each micro-batch, `begin` and
`states`, checksums and the comparison of token ids included, by a loader that has its batches ready; *cold* after the system has
been told to forget the files. Goal: reading at least 20 times training. *acceptance*: the same run with
the cache in bfloat16 and in int8, measured by drafting and verifying in float32; goal: at most 2% less.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from spectitan import prepare, train
from spectitan.config.manager import load
from spectitan.config.tables import Config
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.models.registry import choose_config
from spectitan.models.weights import fingerprint, resolve_base_path
from spectitan.speculators.registry import SPECULATOR_CONFIGS, build_speculator
from spectitan.states.cache import open_cache
from spectitan.states.cached import CachedStates
from spectitan.types import TokenBatch

RECIPE = Path(__file__).parents[1] / "train_configs" / "eagle3_offline.toml"
DTYPES = ("float32", "bfloat16", "int8")
FIRST = 2  # reports that are left out: memory is taken, files are opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="steps of 4 samples that are trained when speed is measured")
    parser.add_argument("--acceptance-steps", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5, help="passes over the cache, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=("reading", "acceptance"), default=["reading", "acceptance"])
    parser.add_argument("--folder", default=None, help="where caches are made for the time of the run")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "states.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    output = Path(arguments.output)
    report = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for part in arguments.parts:
            report[part] = {"reading": reading, "acceptance": acceptance}[part](Path(folder), arguments)
            report[part]["machine"] = {"platform": platform.platform(), "cores": os.cpu_count(), "threads": arguments.threads}
            report[part]["machine"] |= {"torch": torch.__version__, "load_average": os.getloadavg()[0]}
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def flags(folder: Path, name: str, arguments: argparse.Namespace, **changes) -> list[str]:
    keys = {
        "job.config_file": RECIPE,
        "job.dump_folder": folder / name,
        "job.threads": arguments.threads,
        "training.num_steps": arguments.steps,
        "lr_scheduler.warmup_steps": 2,
        "checkpoint.interval": 10**6,
        "metrics.report_interval": 4,
        "metrics.loggers": "",
        "eval.loss_samples": 0,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in keys.items()]


def run(program, given: list[str]) -> None:
    if program.main(given):
        raise SystemExit(f"{program.__name__} has failed")


# ---- reading ----


def reading(folder: Path, arguments: argparse.Namespace) -> dict:
    short = {"eval__at_end": "false", "export__format": "none", "eval__prompts": "none", "states__noise_std": 0}
    rows = {}
    online = trained_speed(folder, arguments, "online", **short, states__source="online")
    for dtype in DTYPES:
        cache = {"states__hidden_states_path": folder / f"states_{dtype}", "states__dtype": dtype}
        run(prepare, flags(folder, f"fill_{dtype}", arguments, **cache, prepare__states="true", prepare__show=0))
        offline = trained_speed(folder, arguments, f"offline_{dtype}", **short, **cache)
        rows[dtype] = read_speed(load(flags(folder, "read", arguments, **cache), "train", SPECULATOR_CONFIGS), arguments)
        rows[dtype] |= {"training_offline": offline}
    print(f"training, states of the base in the job: {online:,.0f} tokens/s")
    print("cache     bytes a token  training tokens/s  reading tokens/s  of training     GB/s  cold tokens/s")
    for dtype, row in rows.items():
        row["of_training"] = row["warm"] / row["training_offline"]
        gigabytes = row["warm"] * row["token_bytes"] / 1e9
        print(
            f"{dtype:9} {row['token_bytes']:13,} {row['training_offline']:18,.0f} {row['warm']:17,.0f} {row['of_training']:12.0f}"
            f" {gigabytes:8.2f} {row['cold']:14,.0f}"
        )
    return {"steps": arguments.steps, "training_online": online, "caches": rows}


def trained_speed(folder: Path, arguments: argparse.Namespace, name: str, **changes) -> float:
    """Tokens a second of spectitan.train, the median of its reports."""
    run(train, flags(folder, name, arguments, **changes))
    reports = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(report["tokens_per_second"] for report in reports[FIRST:])


def read_speed(config: Config, arguments: argparse.Namespace) -> dict:
    path = resolve_base_path(config.base.path)
    base_config = choose_config("auto", "auto", path)
    with torch.device("meta"):
        taps = build_speculator("eagle3", config.speculator, base_config, config.objective).taps
    folder, device = Path(config.states.hidden_states_path), torch.device("cpu")
    loader = build_loader(config.data, load_tokenizer(path), seed=config.job.seed, global_batch_size=4, micro_batch_size=4)
    batches = [next(loader) for _ in range(arguments.steps)]
    forget(folder)
    store = open_cache(
        folder, base=fingerprint(path), layers=taps, hidden_size=base_config.hidden_size, dtype=config.states.dtype, make=False
    )
    source = CachedStates(store, loader.samples, taps, None, resolve_compute_dtype(config.training.compute_dtype, device), device)
    cold = one_pass(source, batches)
    warm = statistics.median(one_pass(source, batches) for _ in range(arguments.rounds))
    source.close()
    return {"token_bytes": store.token_bytes, "warm": warm, "cold": cold, "tokens": sum(batch.tokens.numel() for batch in batches)}


def one_pass(source: CachedStates, batches: list[TokenBatch]) -> float:
    """Tokens a second. A micro-batch at a time, as one optimizer step has them: nothing is read ahead."""
    start = time.perf_counter()
    for batch in batches:
        source.states(source.begin(batch))
    return sum(batch.tokens.numel() for batch in batches) / (time.perf_counter() - start)


def forget(folder: Path) -> None:
    """Asks the system to drop the files, which no process has mapped yet, from its memory."""
    for path in folder.glob("*.states"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- acceptance ----


def acceptance(folder: Path, arguments: argparse.Namespace) -> dict:
    changes = {"training__num_steps": arguments.acceptance_steps, "lr_scheduler__warmup_steps": 40, "export__format": "none"}
    changes |= {"eval__speed_prompts": 1}
    rows = {}
    for dtype in ("bfloat16", "int8"):
        cache = {"states__hidden_states_path": folder / f"accepted_{dtype}", "states__dtype": dtype}
        run(prepare, flags(folder, f"fill_all_{dtype}", arguments, **changes, **cache, prepare__states="true", prepare__show=0))
        run(train, flags(folder, f"accepted_run_{dtype}", arguments, **changes, **cache))
        measured = json.loads((folder / f"accepted_run_{dtype}" / "report.json").read_text())
        size = sum(path.stat().st_size for path in (folder / f"accepted_{dtype}").iterdir())
        rows[dtype] = {"acceptance_length": measured["acceptance_length"], "cache_bytes": size}
    lost = 1 - rows["int8"]["acceptance_length"] / rows["bfloat16"]["acceptance_length"]
    print("cache     acceptance_length     size")
    for dtype, row in rows.items():
        print(f"{dtype:9} {row['acceptance_length']:17.4f} {row['cache_bytes'] / 1e6:7.0f} MB")
    share = rows["int8"]["cache_bytes"] / rows["bfloat16"]["cache_bytes"]
    print(f"int8 loses {lost:.2%} of the acceptance length and takes {share:.1%} of the size")
    return {"steps": arguments.acceptance_steps, "caches": rows, "lost": lost, "size_of_bfloat16": share}


if __name__ == "__main__":
    main()
