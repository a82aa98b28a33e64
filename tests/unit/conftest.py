"""Fixtures of several files of unit tests."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Only what names the base matters; its sizes do not have to be those of the drafter.
BASE_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 29,
    "hidden_size": 20,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}


@pytest.fixture
def base_path(tmp_path) -> Path:
    """The folder of a base, as far as an export reads it."""
    folder = tmp_path / "a-base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE_CONFIG))
    return folder


@pytest.fixture
def one_rank_mesh() -> DeviceMesh:
    """In a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
