"""The config.json of a serving folder, its values checked one by one as a family reads them."""

import json
from pathlib import Path

from spectitan.errors import UserError

_LARGEST = 2**31 - 1  # no dimension of a model is larger, and products of a few of them still fit 64 bits


class FolderConfig:
    """Reads `folder`/config.json.

    Raises:
        UserError: no such file, or no JSON object in it.
    """

    def __init__(self, folder: Path):
        self.file = folder / "config.json"
        try:
            self.content = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.file}: no such file; a speculator's folder has config.json and model.safetensors") from None
        except (ValueError, RecursionError) as error:  # undecodable, or no JSON
            raise UserError(f"{self.file}: not JSON: {error}") from None
        if not isinstance(self.content, dict):
            raise UserError(f"{self.file}: a JSON object is expected, found {type(self.content).__name__}")

    def count(self, name: str, at_least: int = 1, at_most: int = _LARGEST) -> int:
        """A whole number that must be there."""
        value = self.content.get(name)
        if type(value) is not int or not at_least <= value <= at_most:
            raise UserError(f"{self.file}: {name} = {json.dumps(value)}: allowed: a whole number from {at_least} to {at_most}")
        return value

    def flag(self, name: str) -> bool:
        """true or false; absent means false, as servers read it."""
        value = self.content.get(name, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.file}: {name} = {json.dumps(value)}: allowed: true or false")
        return value

    def architecture(self) -> str:
        """The one entry of `architectures`."""
        value = self.content.get("architectures")
        if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)):
            raise UserError(f"{self.file}: architectures = {json.dumps(value)}: allowed: a list with one name")
        return value[0]
