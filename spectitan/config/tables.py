"""The configuration of a run, resolved: every key has its value."""

import dataclasses
import functools
from dataclasses import dataclass

from spectitan.config import sections
from spectitan.config.keys import toml_value
from spectitan.errors import UserError


@dataclass
class Config:
    """Every key of a run, one attribute per TOML table.

    `speculator` has the keys of SpeculatorSelection and, as an instance of the family's own Config class, the family's.
    """

    job: sections.Job
    base: sections.Base
    parallelism: sections.Parallelism
    plan: sections.Plan
    speculator: sections.SpeculatorSelection
    data: sections.Data
    training: sections.Training
    stage2: sections.Stage2
    states: sections.States
    objective: sections.Objective
    optimizer: sections.Optimizer
    lr_scheduler: sections.LRScheduler
    checkpoint: sections.Checkpoint
    metrics: sections.Metrics
    compile: sections.Compile
    eval: sections.Eval
    export: sections.Export
    generate: sections.Generate
    prepare: sections.Prepare

    given = frozenset()  # section.key of all that the file or the command line set; no field, so that it is no table

    def given_in(self, table: str) -> set[str]:
        """The names of a table's keys that a flag or the file gives."""
        return {name for section, _, name in (label.partition(".") for label in self.given) if section == table}

    def adopt_speculator(self, type: str, family_config, source: str) -> None:
        """Takes speculator.type and the family's keys from a trained speculator.

        Args:
            family_config: an instance of the family's Config class.
            source: where it was found, for the message.

        Raises:
            UserError: a key was given another value. -1, "work it out", agrees with all, and what concerns training alone
                (the family's `of_training`) is taken as given.
        """
        of_training = getattr(family_config, "of_training", ()) if type == self.speculator.type else ()
        for label in sorted(self.given):
            table, _, name = label.partition(".")
            if table != "speculator" or name == "path" or name in of_training:
                continue
            given, theirs = getattr(self.speculator, name), type if name == "type" else getattr(family_config, name, None)
            if given != -1 and str(given) != str(theirs):
                found = "no such key" if theirs is None else toml_value(theirs)
                raise UserError(f"{label} = {toml_value(given)}; {source} has {found}: leave {label} out, or start from another speculator")
        values = dataclasses.asdict(family_config)
        values |= {name: getattr(self.speculator, name) for name in of_training if f"speculator.{name}" in self.given}
        self.speculator = with_selection(family_config.__class__)(**values, type=type, path=self.speculator.path)

    def to_toml(self) -> str:
        """The resolved configuration as a TOML file that, loaded, gives this configuration again.

        job.config_file is left out: it says where values came from, and here they all are.
        """
        tables = []
        for section in dataclasses.fields(self):
            values = dataclasses.asdict(getattr(self, section.name))
            lines = [f"{name} = {toml_value(value)}" for name, value in values.items() if (section.name, name) != ("job", "config_file")]
            tables.append("\n".join([f"[{section.name}]", *lines, ""]))
        return "\n".join(tables)


@functools.cache  # one class a family, so that configurations of two loads compare equal
def with_selection(family_config: type) -> type:
    """A family's keys, and the two that every family has."""
    return dataclasses.make_dataclass("Speculator", (), bases=(family_config, sections.SpeculatorSelection))
