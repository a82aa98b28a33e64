"""README and docs/ against the program: links lead somewhere, keys exist, commands are taken."""

import re
import shlex
import typing
from pathlib import Path

import pytest

from spectitan.config.keys import keys_of
from spectitan.config.manager import load
from spectitan.config.tables import Config
from spectitan.speculators.registry import SPECULATOR_CONFIGS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = typing.get_type_hints(Config)
KEYS = {f"{name}.{key}" for name, section in SECTIONS.items() for key in keys_of(name, section)} | {
    f"speculator.{key}" for config in SPECULATOR_CONFIGS.values() for key in keys_of("speculator", config)
}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page):
    quoted = re.findall(r"`(?:--)?(\w+)\.(\w+)\b", page.read_text(encoding="utf-8"))
    own = page.name == "migration.md"  # names of other systems, which test_migration_tables.py tells from ours
    named = {f"{section}.{key}" for section, key in quoted if section in SECTIONS and not own}
    named = {name for name in named if not (ROOT / "spectitan" / name.replace(".", "/")).with_suffix(".py").exists()}  # a module's
    assert named <= KEYS, named - KEYS


def commands() -> list[tuple[str, list[str]]]:
    """(program, arguments) of every command in a block of code."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                found += [
                    (word.removeprefix("spectitan."), words[i + 1 :]) for i, word in enumerate(words) if word.startswith("spectitan.")
                ]
    return [(program, arguments) for program, arguments in found if "CONFIG" not in arguments]


@pytest.mark.parametrize(("program", "arguments"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_are_taken(monkeypatch, program, arguments):
    monkeypatch.chdir(ROOT)
    load(arguments, program, SPECULATOR_CONFIGS)


def test_there_are_commands_of_every_program_that_trains():
    assert len(commands()) >= 9 and {"train", "prepare", "generate"} <= {program for program, _ in commands()}
