"""Hidden states cached by several processes at once, for a base that they share: fully sharded, and split by tensor parallelism."""

from dataclasses import replace

import pytest

from spectitan import train
from tests.integration import processes, tiny
from tests.integration.test_states import assert_same, counts, losses, online

STEPS, SAMPLES = 8, 16
RUN = {"training__num_steps": STEPS, "checkpoint__interval": STEPS, "metrics__report_interval": 1, "training__micro_batch_size": 1}
RUN |= {"eval__at_end": "false", "export__format": "none", "objective__loss": "kl_div", "eval__prompts": "none"}
RUN |= {"speculator__type": "eagle3", "states__dtype": "float32", "training__global_batch_size": 2}
EPOCHS = RUN | {"training__num_steps": -1, "training__epochs": 2, "data__holdout": 0.5, "eval__interval": 9}
LAYOUTS = {"fsdp": {"sharding_strategy": "fsdp"}, "tp": {"sharding_strategy": "tp", "tp_size": 2}}


def worker(_rank: int, runs: list[tuple[str, list[str]]]) -> None:
    for program, flags in runs:
        assert tiny.PROGRAMS[program].main(flags) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny"), replace(tiny.CONFIG, num_heads=4, num_kv_heads=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_share_a_cache(world, tmp_path, layout):
    """Online, hybrid and from a cache filled ahead: the same training, bit for bit; of two epochs, the second reads the cache alone,
    also what the other process has written. One process reads the cache of two."""
    keys = {f"parallelism__{name}": value for name, value in LAYOUTS[layout].items()}
    hybrid, filled = ({"states__hidden_states_path": tmp_path / name, "states__source": "hybrid"} for name in ("states", "filled"))
    offline = filled | {"states__source": "offline"}

    def flags(name: str, changes: dict) -> list[str]:
        return world.flags(tmp_path / name, **keys | changes)

    runs = [
        ("train", flags("online", online(RUN))),
        ("train", flags("hybrid", RUN | hybrid)),
        ("prepare", flags("fill", RUN | filled | {"prepare__states": "true"})),
        ("train", flags("refilled", RUN | filled)),
        ("train", flags("epochs", EPOCHS | {"states__source": "hybrid"})),
    ]
    if layout == "fsdp":
        runs.append(("train", flags("offline", RUN | offline)))
    processes.run_group(2, tmp_path / "output", worker, runs)

    assert counts(tmp_path / "hybrid") == {"cached": 0, "generated": SAMPLES, "kept": SAMPLES, "skipped": 0}
    assert counts(tmp_path / "refilled") == {"cached": SAMPLES, "generated": 0, "kept": 0, "skipped": 0}
    for name in ("hybrid", "refilled", *(["offline"] if layout == "fsdp" else [])):
        assert_same(tmp_path / name, tmp_path / "online", STEPS)
    reports = tiny.reports(tmp_path / "epochs")
    generated = [report["state_counts"]["generated"] for report in reports]
    half = len(reports) // 2
    assert generated[:half] == [2] * half and generated[half + 1 :] == [0] * len(generated[half + 1 :]) and half > 5

    one = {"states__hidden_states_path": tmp_path / "filled", "states__source": "offline"}
    assert train.main(world.flags(tmp_path / "one", **RUN | one)) == 0
    for (ours, *_), (theirs, *_) in zip(losses(tmp_path / "one"), losses(tmp_path / "online")):
        assert ours == pytest.approx(theirs, rel=1e-4)
