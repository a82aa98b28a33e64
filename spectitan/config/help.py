"""The text of --help: every key with its meaning, what it takes, and its default."""

import shutil
import textwrap

from spectitan.config.keys import Key, toml_value


def help_text(program: str, tables: dict[str, dict[str, Key]], families: dict[str, dict[str, Key]]) -> str:
    """
    Args:
        program: name of the program.
        tables: keys by table.
        families: each speculator family's own keys, of the table [speculator].
    """
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 100), 140)
    introduction = (
        f"usage: python -m spectitan.{program} [--job.config_file FILE.toml] [--section.key value ...]",
        "Flags win over the file, the file over the defaults. In the file, each section is a TOML table: [training], then num_steps = 100. "
        "On the command line, a list is separated by commas (--data.weights 0.5,0.5), and true may be left out (--job.deterministic).",
    )
    parts = ["\n".join(textwrap.fill(line, width) for line in introduction)]
    for table, keys in tables.items():
        parts.append(_table(f"[{table}]", keys, width))
        if table == "speculator":
            parts += [_table(f'[speculator], type = "{name}"', own, width) for name, own in families.items()]
    return "\n\n".join(parts)


def _table(title: str, keys: dict[str, Key], width: int) -> str:
    lines = [title]
    for key in keys.values():
        meaning = f"{key.help} ({key.allowed()}; default {toml_value(key.default)})"
        first, *rest = textwrap.wrap(meaning, width - 37, break_long_words=False, break_on_hyphens=False)
        lines.append(f"  --{key.label:<32} {first}")
        lines += [" " * 37 + line for line in rest]
    return "\n".join(lines)
