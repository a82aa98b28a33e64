"""Chat templates of model folders: messages to text, and which of its characters the assistant says.

A template is a program in Jinja that came with the base. It runs in Jinja's sandbox, for a limited time, and reads no clock:
`strftime_now` tells one date for ever, so that the same messages are the same tokens every day.
"""

import datetime
import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from spectitan.errors import UserError

LIMIT_SECONDS = 10.0  # for one sample; templates take less than a millisecond
_TODAY = datetime.datetime(2024, 7, 26)
# Marks around what {% generation %} encloses. Half surrogates: they are no characters, so no message has them.
_BEGIN, _END = "\udc00", "\udc01"
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Conversation(NamedTuple):
    text: str
    spans: tuple[tuple[int, int], ...]  # characters [begin, end) that the assistant says
    unplaced: int  # assistant turns that are in no span, because their place in the text is not to be found


class EndlessTemplate(UserError):
    """It did not come to an end within LIMIT_SECONDS."""


class ChatTemplate:
    """A template and what it is rendered with.

    Args:
        source: in Jinja, as transformers reads it.
        tokens: "bos_token", "eos_token", ...: their text, known to the template by these names.
        place: where it was found, for messages.

    Attributes:
        fingerprint: of all that decides the text.
    """

    def __init__(self, source: str, tokens: dict[str, str], place: str):
        self.place = place
        self.fingerprint = hashlib.sha256(json.dumps([source, tokens], sort_keys=True).encode()).hexdigest()[:16]
        self._source, self._tokens = source, tokens
        self._has_tags = bool(_GENERATION_TAG.search(source))

    def prompt(self, text: str) -> str:
        """What is before the assistant's answer to one user message.

        Raises:
            ValueError: the template fails; EndlessTemplate: it does not end.
        """
        with self._time_limit():
            return _without_marks(self._render([{"role": "user", "content": text}], True))[0]

    def conversation(self, messages: list[dict]) -> Conversation:
        """A whole conversation. The assistant's characters are those in {% generation %}, where the template has that tag.

        Elsewhere a turn is what comes after everything before it and the generation prompt, up to and with its last end of text
        (the eos token), if it has one. Where the template writes the same turn differently when the conversation goes on, it
        has no place; nor has a turn whose generation prompt is not in the text.

        Raises:
            ValueError: the template fails; EndlessTemplate: it does not end.
        """
        with self._time_limit():
            text = self._render(messages, False)
            if self._has_tags:
                text, spans = _without_marks(text)
                return Conversation(text, spans, 0)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            spans = tuple(span for span in (self._place(messages, turn, text) for turn in turns) if span)
        return Conversation(text, spans, len(turns) - len(spans))

    def _place(self, messages: list[dict], turn: int, text: str) -> tuple[int, int] | None:
        try:
            before = self._render(messages[:turn], True)
            up_to = text if turn == len(messages) - 1 else self._render(messages[: turn + 1], False)
        except ValueError:  # it refuses a part of what it takes as a whole
            return None
        if not (text.startswith(up_to) and up_to.startswith(before)):
            return None
        eos = self._tokens.get("eos_token")
        last = up_to.rfind(eos, len(before)) if eos else -1
        return len(before), last + len(eos) if last >= 0 else len(up_to)

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        try:
            keys = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
            return self._template.render(**keys | self._tokens)
        except UserError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"chat template {self.place}: {' '.join(str(error).split()) or type(error).__name__}") from None

    @cached_property
    def _template(self):
        from jinja2 import TemplateSyntaxError

        try:
            return _environment().from_string(self._source)
        except TemplateSyntaxError as error:
            raise UserError(f"{self.place}: not a chat template: {error.message} at line {error.lineno}") from None

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        """Raises EndlessTemplate after LIMIT_SECONDS, by a timer's signal. Outside the main thread Python has none: no limit."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame) -> None:
            raise EndlessTemplate(f"chat template {self.place}: it has not ended within {LIMIT_SECONDS:g} s")

        previous = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def load_chat_template(folder: Path, settings: dict) -> ChatTemplate | None:
    """The template of a model folder: chat_template.jinja, else that of tokenizer_config.json; None if there is none.

    Args:
        settings: the content of tokenizer_config.json.
    """
    source, place = settings.get("chat_template"), folder / "tokenizer_config.json"
    if isinstance(source, list):  # several, by name
        source = next((entry.get("template") for entry in source if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        place = folder / "chat_template.jinja"
        source = place.read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in settings.items()}
    return ChatTemplate(source, {name: token for name, token in tokens.items() if _is_token(name, token)}, str(place))


def _is_token(name: str, token: object) -> bool:
    return name.endswith("_token") and isinstance(token, str)


def _environment():
    """Jinja as transformers sets it up for chat templates, in the sandbox."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller) -> str:
            return _BEGIN + caller() + _END

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _TODAY.strftime}
    return environment


def _without_marks(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text, and the spans of it that were marked."""
    plain, begins, spans = "", [], []
    for part in re.split(f"([{_BEGIN}{_END}])", text):
        if part == _BEGIN:
            begins.append(len(plain))
        elif part == _END and begins:
            spans.append((begins.pop(), len(plain)))
        elif part != _END:
            plain += part
    return plain, tuple(span for span in sorted(spans) if span[0] < span[1])
