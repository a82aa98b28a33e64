"""One configuration key: reading it from a flag, checking it, saying what is allowed, and writing it as TOML."""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass

from spectitan.errors import UserError

_ONE = {bool: "true or false", int: "an integer", float: "a number", str: "a string", int | str: "an integer or a string"}
_MANY = {bool: "true or false values", int: "integers", float: "numbers", str: "strings"}


def toml_value(value) -> str:
    """A value in TOML's notation. Floats come back bit-equal, strings with every character."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON leaves DEL as it is, TOML does not
    if isinstance(value, list):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return repr(value)


@dataclass(frozen=True)
class Key:
    """A field of a section. `type` is bool, int, float or str, or a list of one of them; or int | str, where text that is an
    integer counts as one, and what other text may say is for the section's owner to check.
    """

    section: str
    name: str
    type: type
    default: object
    help: str
    choices: tuple
    minimum: float | None
    above: float | None
    maximum: float | None

    @property
    def label(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def item_type(self) -> type:
        """bool, int, float, str or int | str: of the value, or of a list's items."""
        return typing.get_args(self.type)[0] if self.is_list else self.type

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is list

    def allowed(self) -> str:
        """What the key takes, in words."""
        bounds = [f"{word} {bound:g}" for word, bound in self._bounds() if bound is not None]
        if self.is_list:
            items = f"any of {', '.join(self.choices)}" if self.choices else _MANY[self.item_type]
            return ", ".join([f"list of {items}", *(f"each {bound}" for bound in bounds)])
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return ", ".join([_ONE[self.type], *bounds])

    def from_text(self, text: str) -> object:
        """The checked value of a command-line flag; lists are separated by commas."""
        if not self.is_list:
            return self.checked(self._item_from_text(text), "command line")
        items = [self._item_from_text(item.strip()) for item in text.split(",")] if text.strip() else []
        return self.checked(items, "command line")

    def checked(self, value: object, source: str) -> object:
        """The value in the key's own type.

        Args:
            value: as TOML gives it.
            source: where it stands, for the message: a file, or the command line.

        Raises:
            UserError: it is of another type, out of bounds, none of the choices, or not finite.
        """
        try:
            if not self.is_list:
                return self._checked_item(value)
            if not isinstance(value, list):
                raise ValueError
            return [self._checked_item(item) for item in value]
        except (ValueError, OverflowError):
            shown = toml_value(value)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise UserError(f"{source}: {self.label} = {shown}; allowed: {self.allowed()}") from None

    def _bounds(self) -> list[tuple[str, float | None]]:
        return [("at least", self.minimum), ("above", self.above), ("at most", self.maximum)]

    def _item_from_text(self, text: str) -> object:
        """The item as TOML would give it; text that does not fit its type stays text, which `checked` refuses."""
        if self.item_type is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        try:
            return (int if self.item_type == int | str else self.item_type)(text)
        except ValueError:
            return text

    def _checked_item(self, value: object) -> object:
        if self.item_type == int | str and isinstance(value, str):
            value = self._item_from_text(value)
        if isinstance(value, bool) and self.item_type is str and toml_value(value) in self.choices:
            value = toml_value(value)  # compile.enabled = true reads as it is meant
        if isinstance(value, int) and not isinstance(value, bool) and self.item_type is float:
            value = float(value)
        if type(value) not in (typing.get_args(self.item_type) or (self.item_type,)):
            raise ValueError
        if isinstance(value, str):
            value.encode()  # a lone surrogate, from bytes that are no UTF-8, could not be written again
            if "\0" in value:
                raise ValueError
        if self.choices and value not in self.choices:
            raise ValueError
        if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError
        if not isinstance(value, str) and self._out_of_bounds(value):
            raise ValueError
        return value

    def _out_of_bounds(self, value: float) -> bool:
        below = self.minimum is not None and value < self.minimum or self.above is not None and value <= self.above
        return below or self.maximum is not None and value > self.maximum


def keys_of(section: str, section_class: type) -> dict[str, Key]:
    """The keys of a section's dataclass, by name, in its order."""
    types = typing.get_type_hints(section_class)
    keys = {}
    for field in dataclasses.fields(section_class):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        keys[field.name] = Key(section, field.name, types[field.name], default, **field.metadata)
    return keys
