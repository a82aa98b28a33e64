"""A base that is read from its files by four processes: none holds more than its share and one tensor."""

import json

import pytest

from benchmarks import loading
from tests.integration import processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    loading.write_base(folder / "base", 256_000_000)
    return folder


@pytest.mark.parametrize("strategy", loading.STRATEGIES)
def test_a_rank_reads_no_more_than_it_keeps(folder, strategy):
    started = processes.call_in_each(4, loading.measure, 4, processes.free_port(), str(folder), strategy)
    assert processes.join(started) == [0] * 4
    whole = (folder / "base" / "model.safetensors").stat().st_size
    for rank in range(4):
        row = json.loads((folder / f"{strategy}_{rank}.json").read_text())
        assert row["all_read"] and row["share"] < 0.26 * whole * (2 if strategy == "hsdp" else 1)
        assert row["grown"] < row["share"] + row["largest"]
