"""The chat template of a model folder, found as transformers finds it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from spectitan.errors import UserError
from spectitan.files import read_json

_VERSION = 2  # of how chats become tokens and masks; another number, another cache


Span = tuple[int, int]


class Conversation(NamedTuple):
    """A chat as a template writes it."""

    text: str
    spans: tuple[Span, ...]  # characters [begin, end) that the assistant says
    unplaced: int  # assistant turns that are in no span, because their place in the text is not to be found
    shortened: int  # assistant turns of which the text has a part only


class ChatTemplate(NamedTuple):
    """A template, not yet run, and what it is run with.

    Attributes:
        source: in Jinja, as transformers reads it.
        tokens: "bos_token", "eos_token", ...: their text, known to the template by these names.
        ends: texts of the special tokens; one of them ends what the assistant says.
        place: where it was found, for messages.
        tool_source: for chats that have tools; None: the same.
    """

    source: str
    tokens: dict[str, str]
    ends: tuple[str, ...]
    place: str
    tool_source: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that decides text and masks."""
        decides = [_VERSION, self.source, self.tool_source, self.tokens, sorted(self.ends)]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def load_chat_template(folder: Path, settings: dict, specials: Iterable[str] = ()) -> ChatTemplate | None:
    """The template of a model folder; None if there is none.

    chat_template.jinja (with additional_chat_templates/NAME.jinja), else that of tokenizer_config.json, a string or a list by
    names, else that of chat_template.json. Of several the one named "default" is taken, "tool_use" for chats with tools.

    Args:
        settings: the content of tokenizer_config.json.
        specials: texts of the tokenizer's special tokens.

    Raises:
        UserError: a file that is no UTF-8 or no JSON.
    """
    if "added_tokens_decoder" not in settings:  # written by older transformers: the tokens' texts may be in a file of their own
        settings = settings | read_json(folder / "special_tokens_map.json")
    sources, place = _sources(folder, settings)
    if "default" not in sources:
        return None
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in settings.items()}
    tokens = {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
    ends = tuple(sorted({*specials, *tokens.values()} - {""}))
    return ChatTemplate(sources["default"], tokens, ends, str(place), sources.get("tool_use"))


def _sources(folder: Path, settings: dict) -> tuple[dict[str, str], Path]:
    """Templates by name, and the file that they, or the first of them, are in."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    files = {name: file for name, file in files.items() if file.is_file()}
    if files:
        return {name: _read_text(file) for name, file in files.items()}, next(iter(files.values()))
    for place, content in ((folder / "tokenizer_config.json", settings), (folder / "chat_template.json", None)):
        found = (read_json(place) if content is None else content).get("chat_template")
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        sources = found if isinstance(found, dict) else {"default": found}
        sources = {name: source for name, source in sources.items() if isinstance(source, str)}
        if sources:
            return sources, place
    return {}, folder


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
