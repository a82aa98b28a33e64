"""Jinja as transformers sets it up for chat templates, in the sandbox, and the marks that say where in the text a template is.

A template reads no clock: `strftime_now` tells one date for ever, so that the same messages are the same tokens every day.
"""

import datetime
import itertools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_TODAY = datetime.datetime(2024, 7, 26)
# Marks are written with halves of surrogate pairs: they are no characters, so no message has them.
_SAID, _SAID_END, _MESSAGE, _MESSAGE_END, _STOP = "\udc00", "\udc01", "\udc02", "\udc03", "\udc04"
_MARK = re.compile(f"({_SAID})|({_SAID_END})|{_MESSAGE}([0-9]+),([0-9]+){_STOP}|{_MESSAGE_END}([0-9]+){_STOP}")
_CAPTURING = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)


class Marked(NamedTuple):
    """What a template wrote, and where in it."""

    text: str
    said: tuple[tuple[int, int], ...]  # characters [begin, end) that {% generation %} encloses
    messages: dict[int, tuple[int, int]]  # by number of the message: the characters that a loop over messages wrote for it


class Program:
    """A compiled template.

    Attributes:
        has_generation_tags: says itself what the assistant says.

    Raises:
        jinja2.TemplateSyntaxError
    """

    def __init__(self, source: str, tokens: dict[str, str]):
        environment = _environment()
        tree = environment.parse(source)
        self._marks = environment.extensions[Marks.identifier]
        self.has_generation_tags = self._marks.has_generation_tags
        if not self.has_generation_tags:
            _mark_loops(tree, self._marks, itertools.count())
            tree.set_environment(environment)
        self._template = environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))
        self._tokens = tokens

    def run(self, messages: list[dict], tools: list | None, add_generation_prompt: bool) -> Marked:
        """Raises whatever a program may raise."""
        self._marks.numbers = {id(message): number for number, message in enumerate(messages)}
        keys = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        return _read_marks(self._template.render(**keys | self._tokens))


class Marks(Extension):
    """{% generation %} ... {% endgeneration %}, and calls that `_mark_loops` puts into loops."""

    tags = {"generation"}
    has_generation_tags = False

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.numbers: dict[int, int] = {}  # of the messages, by id()

    def parse(self, parser):
        self.has_generation_tags = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller) -> str:
        return _SAID + caller() + _SAID_END

    def message(self, value: object, loop: int) -> str:
        number = self.numbers.get(id(value))
        return "" if number is None else f"{_MESSAGE}{loop},{number}{_STOP}"

    def message_end(self, loop: int) -> str:
        return f"{_MESSAGE_END}{loop}{_STOP}"


def _mark_loops(node: nodes.Node, marks: Marks, numbers: Iterator[int]) -> None:
    """Lets every loop of one variable say which message its turn is for, and where the turn ends.

    Not where what is written goes through the template's hands once more (macros, blocks that are assigned or filtered): there
    marks could change what it does. So the text without marks is what the template writes without them.
    """
    if isinstance(node, _CAPTURING):
        return
    for child in node.iter_child_nodes():
        _mark_loops(child, marks, numbers)
    if isinstance(node, nodes.For) and isinstance(node.target, nodes.Name) and not node.recursive:
        loop, line = nodes.Const(next(numbers)), node.lineno
        value = nodes.Name(node.target.name, "load")
        node.body.insert(0, nodes.Output([marks.call_method("message", [value, loop], lineno=line)], lineno=line))
        node.body.append(nodes.Output([marks.call_method("message_end", [loop], lineno=line)], lineno=line))


def _read_marks(text: str) -> Marked:
    """Raises ValueError for a template that cuts to pieces what is in {% generation %}."""
    parts, length, place = [], 0, 0
    begins: list[int] = []
    said: list[tuple[int, int]] = []
    turns: dict[str, list[list[int]]] = {}  # by loop: [number of the message, begin, end], the end -1 while it is not known
    for mark in _MARK.finditer(text):
        parts.append(text[place : mark.start()])
        length, place = length + mark.start() - place, mark.end()
        begin, end, loop, number, ended_loop = mark.groups()
        ended = turns.get(loop or ended_loop, [])
        if ended and ended[-1][2] < 0:  # before a next turn as well: {% continue %} leaves one without its end mark
            ended[-1][2] = length
        if begin:
            begins.append(length)
        elif end and not begins:
            raise ValueError("it takes {% generation %} apart")
        elif end:
            said.append((begins.pop(), length))
        elif loop:
            turns.setdefault(loop, []).append([int(number), length, -1])
    parts.append(text[place:])
    return Marked("".join(parts), tuple(span for span in sorted(said) if span[0] < span[1]), _written(list(turns.values())))


def _written(loops: list[list[list[int]]]) -> dict[int, tuple[int, int]]:
    """The turns of the one loop that writes messages, each once; none where that is not so."""
    writing = [turns for turns in loops if any(begin < end for _, begin, end in turns)]
    if len(writing) != 1 or len({number for number, _, _ in writing[0]}) < len(writing[0]):
        return {}
    return {number: (begin, end) for number, begin, end in writing[0] if end >= 0}


class _Namespace(Namespace):
    """Stores no names of Python's own, which transformers refuses as well."""

    def __init__(*args, **kwargs):  # `self` is a name that a template may use
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace: unsafe name {name!r}")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def new_dict(*args, **kwargs) -> dict:  # not the type itself, whose methods change what they are given
        return dict(*args, **kwargs)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Marks, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _TODAY.strftime, "dict": new_dict}
    environment.globals["namespace"] = _Namespace
    return environment
