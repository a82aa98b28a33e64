"""Messages to text, and which of its characters the assistant says.

They begin where the generation prompt ends, which a server writes for the model, and end with the token that ends the turn. Where the
template has {% generation %} tags, they are what these enclose. Elsewhere the template is run once over the whole chat, with marks
where its loop over the messages begins and ends a turn; the generation prompt is seen by running it on what is before a turn, the
first and the last after each role: as cheap for a long chat as for a short one. A template in which no such loop is found is run
on what is before and on what is up to each turn.

The text is that of the whole chat. What the template leaves out of it, as the thinking of earlier turns, cannot be supervised; what
it keeps of such a turn is.
"""

import re
from collections.abc import Callable

from jinja2 import TemplateSyntaxError

from spectitan.chats.environment import Marked, Program
from spectitan.chats.template import ChatTemplate, Conversation, Span
from spectitan.errors import UserError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names in use; the first is the usual one
_THINKING = re.compile(r"[<\[◁][^<>\[\]◁▷]*think", re.IGNORECASE)  # <think>, [THINK], <|think|>
_ROOM = 2**20  # characters that a text may have beyond what its messages explain
_ROOM_FACTOR = 16


class Renderer:
    """Runs a template.

    Raises:
        UserError: it is no template.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._eos = template.tokens.get("eos_token", "")
        self._programs: dict[str, Program] = {}

    def prompt(self, text: str) -> str:
        """What is before the assistant's answer to one user message. Raises ValueError if the template fails."""
        return self._run([{"role": "user", "content": text}], None, True).text

    def conversation(self, messages: list[dict], tools: list | None = None) -> Conversation:
        """A whole chat.

        Args:
            tools: what the assistant may call, as JSON schemas.

        Raises:
            ValueError: the template fails.
        """
        messages = [_with_reasoning(message) for message in messages]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._run(messages, tools, False)
        chat = _Chat(messages, turns, whole, lambda part, prompt: self._run(part, tools, prompt).text, self._template.ends, self._eos)
        if self._program(tools).has_generation_tags:
            return Conversation(whole.text, chat.tagged(), 0, chat.shortened())
        placed = [span for span in chat.placed() if span]
        return Conversation(whole.text, tuple(placed), len(turns) - len(placed), chat.shortened())

    def _run(self, messages: list[dict], tools: list | None, add_generation_prompt: bool) -> Marked:
        try:
            marked = self._program(tools).run(messages, tools, add_generation_prompt)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        longest = _ROOM + _ROOM_FACTOR * (_length(messages) + _length(tools))
        if len(marked.text) > longest:
            raise ValueError(f"it writes {len(marked.text)} characters; allowed: {longest} for such messages")
        return marked

    def _program(self, tools: list | None) -> Program:
        source = self._template.tool_source if tools and self._template.tool_source is not None else self._template.source
        if source not in self._programs:
            try:
                self._programs[source] = Program(source, self._template.tokens)
            except TemplateSyntaxError as error:
                raise UserError(f"{self._template.place}: not a chat template: {error.message} at line {error.lineno}") from None
        return self._programs[source]


class _Chat:
    """Finds the assistant's turns in the text of a chat.

    Args:
        turns: numbers of the assistant's messages.
        whole: of all messages.
        run: the template: messages and whether the generation prompt is added -> text. Raises ValueError.
        ends: special tokens; one of them ends a turn.
        eos: the end of text.
    """

    def __init__(self, messages: list[dict], turns: list[int], whole: Marked, run: Callable, ends: tuple[str, ...], eos: str):
        self._messages, self._turns, self._whole, self._run, self._ends, self._eos = messages, turns, whole, run, ends, eos
        self._text = whole.text

    def tagged(self) -> tuple[Span, ...]:
        """What {% generation %} encloses, without what the generation prompt says of it."""
        prompt = self._added_by_prompt(self._turns[0]) if self._turns else None
        spans = ((begin + self._given(prompt or "", begin), end) for begin, end in self._whole.said)
        return tuple(span for span in spans if span[0] < span[1])

    def _given(self, prompt: str, begin: int) -> int:
        """How many characters from `begin` on are the end of a generation prompt that begins before."""
        there = (k for k in range(len(prompt)) if self._text.startswith(prompt[k:], begin) and self._text.endswith(prompt[:k], 0, begin))
        return max((len(prompt) - k for k in there), default=0)

    def placed(self) -> list[Span | None]:
        """Of each turn, where it is; None where it is not to be found."""
        if not all(turn in self._whole.messages for turn in self._turns):
            return [self._by_prefixes(turn) for turn in self._turns]
        spans: dict[int, Span | None] = {}
        for turns in self._by_role_before():
            prompts = {turn: self._generation_prompt(turn) for turn in {turns[0], turns[-1]}}
            usual = prompts[turns[0]] if len(set(prompts.values())) == 1 else None
            for turn in turns:
                spans[turn] = self._after(prompts.get(turn, usual), turn)
                if spans[turn] is None and turn not in prompts:
                    spans[turn] = self._after(self._generation_prompt(turn), turn)
        return [spans[turn] for turn in self._turns]

    def shortened(self) -> int:
        """How many turns say something that is not in the text."""
        return sum(not all(self._is_in_text(said, turn) for said in _strings(self._messages[turn])) for turn in self._turns)

    def _is_in_text(self, said: str, turn: int) -> bool:
        begin, end = self._whole.messages.get(turn, (0, len(self._text)))
        if self._text.find(said.strip(), begin, end) >= 0:
            return True
        return "".join(said.split()) in "".join(self._text[begin:end].split())  # spaces and line ends are the template's to choose

    def _by_role_before(self) -> list[list[int]]:
        """The turns, by the role of the message before them: it may decide whether there is a generation prompt."""
        groups: dict[str, list[int]] = {}
        for turn in self._turns:
            groups.setdefault(self._messages[turn - 1]["role"] if turn else "", []).append(turn)
        return list(groups.values())

    def _generation_prompt(self, turn: int) -> str | None:
        """What the text has, or should have, from the turn's begin on; None if the template refuses the messages before it."""
        before = self._prefix(turn, True)
        if before is None:
            return None
        begin = self._whole.messages[turn][0]
        if len(before) >= begin and self._text.startswith(before):
            return before[begin:]
        return self._added_by_prompt(turn, before)  # they are written otherwise when the chat goes on

    def _added_by_prompt(self, turn: int, before: str | None = None) -> str | None:
        before = self._prefix(turn, True) if before is None else before
        without = None if before is None else self._prefix(turn, False)
        return before[len(without) :] if without is not None and before.startswith(without) else None

    def _after(self, prompt: str | None, turn: int) -> Span | None:
        """The turn behind its generation prompt; None if that is not there.

        Of a prompt that opens the thinking what is before that is enough: the text has no thinking then.
        """
        if prompt is None:
            return None
        begin, end = self._whole.messages[turn]
        if not self._text.startswith(prompt, begin, end):
            opened = _THINKING.search(prompt)
            prompt = prompt[: opened.start()] if opened else ""
            if not prompt or not self._text.startswith(prompt, begin, end):
                return None
        begin = begin + len(prompt)
        end = self._end(begin, end)
        return (begin, end) if begin < end else None

    def _by_prefixes(self, turn: int) -> Span | None:
        """A turn that comes after all before it and its generation prompt; None if it is written otherwise when the chat goes on."""
        before, up_to = self._prefix(turn, True), self._text
        if turn < len(self._messages) - 1:
            up_to = self._prefix(turn + 1, False)
        if before is None or up_to is None or not (self._text.startswith(up_to) and up_to.startswith(before)):
            return None
        begin, end = len(before), self._end(len(before), len(up_to))
        return (begin, end) if begin < end else None

    def _prefix(self, length: int, add_generation_prompt: bool) -> str | None:
        """The text of the first messages; None if the template refuses them."""
        try:
            return self._run(self._messages[:length], add_generation_prompt)
        except UserError:
            raise
        except ValueError:
            return None

    def _end(self, begin: int, end: int) -> int:
        """Where the turn in [begin, end) ends: with its last special token, which the assistant says, not the space behind it."""
        turn = self._text[begin:end]
        said = turn.rstrip()
        if said.endswith(self._ends):
            return begin + len(said)
        last = turn.rfind(self._eos) if self._eos else -1
        return begin + last + len(self._eos) if last >= 0 else end


def _with_reasoning(message: dict) -> dict:
    """A copy, with what the assistant thinks under every name that templates read, as transformers gives it to them."""
    said = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return {**message} if said is None else {"thinking": said, **message, "reasoning_content": said}


def _strings(message: dict) -> list[str]:
    """What an assistant's message says in words, and the names of the tools that it calls."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)] + [message.get("reasoning_content")]
    calls = message.get("tool_calls")
    calls = [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    texts += [function.get("name") for function in calls if isinstance(function, dict)]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _length(value: object) -> int:
    """Characters in all strings of a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value)) + sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 1
