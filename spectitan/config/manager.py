"""Reads the configuration of a run: command-line flags win over the TOML file, the file over the defaults."""

import dataclasses
import difflib
import os
import sys
import typing
from pathlib import Path

from spectitan.config import sections
from spectitan.config.checks import check_combinations
from spectitan.config.help import help_text
from spectitan.config.keys import Key, keys_of
from spectitan.config.tables import Config, with_selection
from spectitan.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Paths that are used as they are given; whoever reads other paths knows "~" itself.
_FROM_HOME = (
    "job.dump_folder", "checkpoint.folder", "metrics.dir", "eval.prompts", "export.path", "generate.prompt_file", "prepare.token_freq",
    "prepare.generate",
)  # fmt: skip


def load(argv: list[str] | None, program: str, speculator_configs: dict[str, type]) -> Config:
    """Reads and checks the configuration.

    Args:
        argv: command-line arguments without the program's name; None takes sys.argv's.
        program: train, evaluate, export, generate or prepare; each needs other keys.
        speculator_configs: the Config dataclass of each speculator family, by name.

    Raises:
        UserError: a mistake in a flag, in the file or between keys.
        SystemExit: with status 0, after --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    families = {name: with_selection(config) for name, config in speculator_configs.items()} | {"none": sections.SpeculatorSelection}
    if "--help" in argv or "-h" in argv:
        common = {name: keys_of(name, section) for name, section in typing.get_type_hints(Config).items()}
        common["speculator"]["type"] = _type_key(families)
        own = {name: keys_of("speculator", config) for name, config in speculator_configs.items()}
        print(help_text(program, common, own), flush=True)
        raise SystemExit(0)

    flags = _split_flags(argv)
    path = flags.get("job.config_file") or ""
    tables = _read_file(path) if path else {}
    family = _chosen_family(flags, tables, path, families)
    classes = typing.get_type_hints(Config) | {"speculator": families[family]}
    keys = {key.label: key for name, section in classes.items() for key in keys_of(name, section).values()}
    own = {other: keys_of("speculator", section) for other, section in families.items()}
    foreign = {f"speculator.{name}": [other for other in own if name in own[other]] for names in own.values() for name in names}

    values: dict[str, object] = {}
    for label, value in _file_values(tables, path, classes, keys):
        values[label] = _known(keys, label, family, foreign, path).checked(value, path)
    for label, text in flags.items():
        values[label] = _flag_value(_known(keys, label, family, foreign, "command line"), text)

    made = {name: section() for name, section in classes.items()}
    for label, value in values.items():
        setattr(made[keys[label].section], keys[label].name, os.path.expanduser(value) if label in _FROM_HOME else value)
    config = Config(**made)
    config.given = frozenset(values)
    check_combinations(config, program)
    return config


def _split_flags(argv: list[str]) -> dict[str, str | None]:
    """ "--section.key value" and "--section.key=value" as {section.key: text}; None where no value follows. The last one counts."""
    flags: dict[str, str | None] = {}
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"command line: unexpected argument {argument!r}; allowed: --section.key value (--help lists them)")
        label, equals, text = argument[2:].partition("=")
        if not equals:
            text = remaining.pop(0) if remaining and not remaining[0].startswith("--") else None
        flags[label] = text
    return flags


def _flag_value(key: Key, text: str | None) -> object:
    if text is not None:
        return key.from_text(text)
    if key.type is bool:
        return True
    raise UserError(f"command line: --{key.label} needs a value: {key.allowed()} (--{key.label}=VALUE if it begins with --)")


def _read_file(path: str) -> dict:
    content = b""
    try:
        content = Path(path).expanduser().read_bytes()
        return tomllib.loads(content.decode())
    except OSError as error:
        raise UserError(f"job.config_file = {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: not valid UTF-8 (at line {line})") from None
    except (ValueError, RecursionError) as error:
        last_line = len(content.splitlines())
        place = str(error).replace("at end of document", f"at line {last_line}, the end of the file")
        raise UserError(f"{path}: not valid TOML: {place}") from None


def _type_key(families: typing.Iterable[str]) -> Key:
    """speculator.type with the families that there are as its choices."""
    return dataclasses.replace(keys_of("speculator", sections.SpeculatorSelection)["type"], choices=tuple(families))


def _chosen_family(flags: dict, tables: dict, path: str, families: typing.Iterable[str]) -> str:
    """speculator.type, which says what other keys the table [speculator] has."""
    key = _type_key(families)
    if key.label in flags:
        return _flag_value(key, flags[key.label])
    table = tables.get("speculator", {})
    return key.checked(table.get("type", key.default), path or "default") if isinstance(table, dict) else key.default


def _file_values(tables: dict, path: str, classes: dict[str, type], keys: dict[str, Key]) -> typing.Iterator[tuple[str, object]]:
    """(section.key, value) of everything in the file."""
    for section, table in tables.items():
        if not isinstance(table, dict):
            place = "is a table" if section in classes else f"stands in no table; the nearest key is {nearest(section, keys)}"
            raise UserError(f"{path}: {section} {place}: allowed: [table], then key = value")
        if section not in classes:
            close = difflib.get_close_matches(section, classes, 1, 0.0)[0]
            raise UserError(f"{path}: unknown table [{section}]; the nearest is [{close}]")
        for name, value in table.items():
            if (section, name) == ("job", "config_file"):
                raise UserError(f"{path}: job.config_file belongs on the command line: a file names no other file")
            yield f"{section}.{name}", value


def _known(keys: dict[str, Key], label: str, family: str, foreign: dict[str, list[str]], source: str) -> Key:
    if label in keys:
        return keys[label]
    if label in foreign:
        raise UserError(f"{source}: {label} is a key of speculator.type = {' or '.join(foreign[label])}, but speculator.type is {family}")
    raise UserError(f"{source}: unknown key {label!r}; the nearest is {nearest(label, keys)}")


def nearest(label: str, known: typing.Iterable[str]) -> str:
    """The known section.key that was probably meant: alike in the same section, else the same name in another, else the most alike."""
    section, _, name = label.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    alike = difflib.get_close_matches(name, siblings, 1)
    if alike:
        return siblings[alike[0]]
    namesakes = [key for key in known if key.rpartition(".")[2] == name]
    return difflib.get_close_matches(label, namesakes or list(known), 1, 0.0)[0]
