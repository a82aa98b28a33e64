"""A folder's config.json, its values checked one by one as they are read."""

import copy
import json
import math
from pathlib import Path

from spectitan.errors import UserError

_LARGEST = 2**31 - 1  # no dimension of a model is larger, and products of a few of them still fit 64 bits


class ConfigFile:
    """Reads `folder`/config.json.

    Args:
        folder: of a base or of a speculator.
        holds: what such a folder has, for the message if there is no config.json.

    Raises:
        UserError: no such file, or no JSON object in it.
    """

    def __init__(self, folder: Path, holds: str):
        self.file: Path | str = folder / "config.json"
        self.place = ""  # of the object in the file
        try:
            self._parse(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.file}: no such file; {holds}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file}: not JSON: {error}") from None

    @classmethod
    def of_text(cls, source: Path | str, text: str) -> "ConfigFile":
        """The JSON object of a text; `source` says in messages where it stands."""
        self = cls.__new__(cls)
        self.file, self.place = source, ""
        self._parse(text)
        return self

    def _parse(self, text: str) -> None:
        try:
            self.content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.file}: not JSON: {error}") from None
        if not isinstance(self.content, dict):
            raise UserError(f"{self.file}: a JSON object is expected, found {type(self.content).__name__}")

    def inside(self, name: str) -> "ConfigFile":
        """An object in it."""
        self.must(isinstance(self.content.get(name), dict), name, "an object is expected")
        inner = copy.copy(self)
        inner.content, inner.place = self.content[name], f"{self.place}{name}."
        return inner

    def must(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise UserError(f"{self.file}: {self.place}{name} = {json.dumps(self.content.get(name))}: {allowed}")

    def get(self, name: str, default=None):
        """A value as it stands, unchecked; null is null."""
        return self.content.get(name, default)

    def _required(self, name: str, default):
        """null and absent mean the default, and are refused where there is none."""
        value = self.content.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.file}: {self.place}{name} is missing")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._required(name, default)
        self.must(isinstance(value, str), name, "a string is expected")
        return value

    def count(self, name: str, default: int | None = None, at_least: int = 1, at_most: int = _LARGEST) -> int:
        value = self._required(name, default)
        self.must(type(value) is int and at_least <= value <= at_most, name, f"an integer from {at_least} to {at_most} is expected")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._required(name, default)
        self.must(type(value) in (int, float) and math.isfinite(value) and value >= 0, name, "a number of at least 0 is expected")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; absent means false."""
        value = self._required(name, False)
        self.must(isinstance(value, bool), name, "true or false is expected")
        return value
