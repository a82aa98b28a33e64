"""Settings of every test: small tensors on one thread, nothing from the network, no cache outside temporary folders."""

import os
from pathlib import Path

# Before torch and transformers are imported; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("SPECTITAN_TRACEBACK", None)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Tokenised shards of tests are shared by the tests of a run and are gone after it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SPECTITAN_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, text and configuration for tests of whole programs, once a file of tests."""
    from tests.integration import tiny

    return tiny.make(tmp_path_factory.mktemp("tiny"))


def pytest_xdist_auto_num_workers(config) -> int:
    """Processes that run the tests, of `-n auto`: one for each processor, four at the most; tests that are named run in this one."""
    tests = Path(__file__).parent
    if any(Path(argument.partition("::")[0]).resolve().is_relative_to(tests) for argument in config.invocation_params.args):
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(processors, 4) if processors > 1 else 0


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
