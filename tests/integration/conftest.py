"""What most tests of whole programs begin with, once a file of tests."""

from pathlib import Path

import pytest

from spectitan import train
from tests.integration import tiny


@pytest.fixture(scope="module")
def run(world) -> Path:
    """A finished run, whose folder no mistake may touch."""
    assert train.main(world.flags(world.root / "run", **tiny.SHORT)) == 0
    return world.root / "run"


@pytest.fixture
def refused(world, run, capsys):
    """Calls a program, which must refuse in one line and touch nothing, and returns that line."""
    return lambda flags, program="train": tiny.refusal(tiny.PROGRAMS[program], flags, capsys, world.root)
