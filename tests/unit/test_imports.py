"""Who may import whom, and that every package that is imported is declared: read from the source, nothing is run."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "spectitan").rglob("*.py"))

PROGRAMS = {"train", "evaluate", "export", "generate", "prepare"}
LEAVES = {"types", "errors", "compiled", "files", "heartbeat", "hub", "keyed_random", "signals", "config.sections", "config.loss_mixture"}
# Part -> the parts that it may import besides the leaves and itself. A part is a file or a folder of spectitan/.
MAY_IMPORT = {
    "config": set(),
    "models": set(),
    "objectives": set(),
    "data": {"chats"},
    "chats": set(),
    "distributed": set(),
    "speculators": {"models", "objectives"},
    "decoding": {"models", "speculators"},
    "states": {"models", "data", "decoding", "distributed"},
    "training": {"distributed"},
    "planning": {"models", "speculators", "states", "decoding", "distributed", "training", "trained"},
    "program": {"config"},
    # Shared by programs.
    "evaluation": {"config", "models", "data", "speculators", "decoding", "states", "distributed", "trained"},
    "exporting": {"config", "models", "speculators", "trained"},
    "filling": {"config", "models", "data", "speculators", "states", "distributed", "trained", "training", "run"},
    "trained": {"config", "models", "speculators", "training"},
    # What train.py makes a run of: all but the programs.
    "run": {"config", "models", "objectives", "data", "speculators", "decoding", "states", "distributed", "training"}
    | {"evaluation", "exporting", "trained"},
}
OURS = set(MAY_IMPORT) | LEAVES | PROGRAMS


def module_name(path: Path) -> str:
    """spectitan/models/llama.py -> models.llama; a folder's __init__.py -> the folder."""
    return ".".join(path.relative_to(ROOT / "spectitan").with_suffix("").parts).removesuffix("__init__").strip(".")


def part_of(module: str) -> str:
    return module if module in LEAVES else module.partition(".")[0]


def imports(source: str) -> set[str]:
    """Full names of all that a source imports, wherever the statement stands; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden(module: str, source: str) -> set[str]:
    """Those of our parts that the module imports and may not."""
    parts = set()
    for name in imports(source):
        if name.startswith("spectitan."):
            inner = name.removeprefix("spectitan.")
            parts.add(next((leaf for leaf in LEAVES if inner == leaf or inner.startswith(leaf + ".")), inner.partition(".")[0]))
    parts &= OURS  # `from spectitan import __version__` names no part
    part = part_of(module)
    if part in LEAVES:
        return parts - ({"errors", "heartbeat"} if part in ("signals", "hub", "files", "config.loss_mixture") else set())
    if part in PROGRAMS or not part:  # the programs, and the package's own __init__
        return parts & PROGRAMS - {part}
    return parts - LEAVES - MAY_IMPORT[part] - {part}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "spectitan")
def test_imports_keep_the_order_of_parts(path):
    module = module_name(path)
    assert not module or part_of(module) in OURS, f"{module} is a part that this test does not know"
    assert forbidden(module, path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("models.llama", "from spectitan.speculators.base import Speculator", {"speculators"}),
        ("models.llama", "from spectitan.types import BaseStates\nfrom spectitan.models import readout", set()),
        ("models.llama", "def f():\n    import spectitan.data.loader", {"data"}),
        ("models.llama", "from spectitan.config import sections", set()),
        ("models.llama", "from spectitan.config.manager import Config", {"config"}),
        ("models.llama", "from spectitan import train", {"train"}),
        ("types", "from spectitan.errors import UserError", {"errors"}),
        ("config.sections", "from spectitan.config.keys import Key", {"config"}),
        ("train", "from spectitan import evaluate, export\nfrom spectitan.models import llama", {"evaluate", "export"}),
        ("decoding.plain", "from spectitan.states.online import OnlineStates", {"states"}),
        ("", "from spectitan.train import main", {"train"}),
    ],
)
def test_the_rule_finds_what_breaks_it(module, source, found):
    assert forbidden(module, source) == found


def test_imported_packages_are_declared():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE).group(1)
    declared = set(re.findall(r'^\s*"([a-z0-9_-]+)', block, re.MULTILINE))
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE).group(1)
    declared |= {name for line in extras.splitlines() if not line.startswith("test") for name in re.findall(r'"([a-z0-9_-]+)', line)}
    imported = {name.partition(".")[0] for path in FILES for name in imports(path.read_text(encoding="utf-8"))}
    declared |= {"upath"} if "universal_pathlib" in declared else set()  # what that package is imported as
    imported -= set(sys.stdlib_module_names) | {"spectitan", "tomllib", "compression"}  # of the library since 3.11 and 3.14
    assert imported <= declared
    assert "torch" in declared
