"""Compiled runs through the trainer, on one process and under tensor parallelism: equal to eager ones, compiled once, the same checkpoints."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from spectitan import train
from spectitan.run import model
from spectitan.training.checkpoint_reading import read_tensors
from spectitan.training.compile import apply_compile
from spectitan.training.optimizer import step_if_finite
from tests.distributed.test_layouts import BASES, CONFIG, JOINT, write_bases
from tests.integration import processes, tiny

STEPS = 5
RUN = {"training__num_steps": STEPS, "checkpoint__interval": STEPS, "metrics__report_interval": 1, "training__micro_batch_size": 1}
RUN |= {"training__compute_dtype": "bfloat16", "eval__at_end": "false", "export__format": "none", "objective__loss": "kl_div"}
KINDS = {
    "joint": JOINT,
    "lstm": {"speculator__type": "lstm"},
    "eagle3": {"speculator__type": "eagle3", "speculator__ttt_steps": 2},
    "mixtral": JOINT,
}
TP = {"parallelism__sharding_strategy": "tp", "parallelism__tp_size": 2, "training__compute_dtype": "float64"}
LAYOUTS = {"alone": (1, {}, ("joint", "lstm", "eagle3"), 2e-2), "tp_2": (2, TP, ("joint", "mixtral"), 1e-9)}  # the last: relative tolerance


def worker(rank: int, output: str, runs: dict[str, list[list[str]]]) -> None:
    """Makes each run eagerly and compiled; in output.RANK.json, after how many steps each graph was made."""
    found = {}
    for kind, (eager, compiled) in runs.items():
        assert train.main(eager) == 0
        found[kind] = graphs_of(compiled)
    Path(f"{output}.{rank}.json").write_text(json.dumps(found))


def graphs_of(flags: list[str]) -> list[int]:
    """Makes a compiled run. Of each graph, the number of optimizer steps that were done before it was made."""
    steps, graphs = [], []

    def backend(graph, inputs):
        graphs.append(len(steps))
        return aot_eager(graph, inputs)

    def counted(*args):
        steps.append(step_if_finite(*args))
        return steps[-1]

    def compiling(enabled, *given):
        return apply_compile("true", *given, backend=backend)

    torch.compiler.reset()
    with mock.patch.object(train, "step_if_finite", counted), mock.patch.object(model, "apply_compile", compiling):
        assert train.main(flags) == 0
    return graphs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    world = tiny.make(tmp_path_factory.mktemp("compile"), CONFIG)
    write_bases(world)
    for number in range(60):  # short texts: none to three begin in a sample
        (world.root / "data" / f"short{number:02}.txt").write_text("\n".join(tiny.text(number).splitlines()[: 1 + number % 4]))
    return world


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_runs_equal_eager_ones_and_are_compiled_in_two_steps(world, layout):
    world_size, keys, kinds, tolerance = LAYOUTS[layout]
    output = world.root / layout
    folders = {kind: [world.root / f"{layout}_{kind}_{name}" for name in ("eager", "compiled")] for kind in kinds}
    runs = {}
    for kind in kinds:
        base = {"base__path": world.root / f"base_{kind}"} if kind in BASES else {}
        runs[kind] = [world.flags(folder, **RUN | KINDS[kind] | base | keys) for folder in folders[kind]]
    processes.run_group(world_size, output, worker, str(output), runs)
    assert Path(f"{output}.0").read_text().count(f"compiled: {CONFIG.num_layers} blocks of the base") == len(kinds)
    for kind in kinds:
        for rank in range(world_size):
            graphs = json.loads(Path(f"{output}.{rank}.json").read_text())[kind]
            assert graphs and max(graphs) < 2, (kind, graphs)
        eager, compiled = (tiny.reports(folder) for folder in folders[kind])
        assert len({report["supervised_tokens"] for report in eager}) > 2  # rows and documents do vary
        for our, their in zip(compiled, eager, strict=True):
            for key in ("loss", "grad_norm", *(key for key in their if key in ("base_loss", "base_grad_norm"))):
                torch.testing.assert_close(torch.tensor(our[key]), torch.tensor(their[key]), rtol=tolerance, atol=0, msg=f"{kind} {key}")
        saved = [read_tensors(tiny.checkpoint(folder, STEPS)).keys() for folder in folders[kind]]
        assert saved[0] == saved[1]
