"""Templates of strangers: what does not end, takes all memory or reaches for Python's internals is refused in one line."""

import os
import signal
import time
from contextlib import closing

import pytest

from spectitan.chats import process as module
from spectitan.chats.process import LimitExceeded, RenderingProcess
from spectitan.chats.template import ChatTemplate
from spectitan.data.documents import Found, Messages
from spectitan.data.documents.reading import Document
from spectitan.data.rendering import rendered
from spectitan.errors import UserError
from tests.unit.chat_fixtures import CHATS
from tests.unit.data_fixtures import ByteTokenizer, make_data

ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
HOSTILE = {
    "loops": (ENDLESS, "it has not ended within 0.3 s"),
    "a number that one instruction of Python works on for ever": (
        "{{ 10 ** (10 ** (messages | length * 10)) }}",
        "it has not ended within 0.3 s",
    ),
    "lipsum": ("{{ lipsum(n=10 ** 9) }}", "it has not ended within 0.3 s|it needs more than"),
    "a long string": ("{{ 'x' * 10 ** 10 }}", "it needs more than 0.25 GB of memory"),
    "a padded string": ("{{ '%10000000000d' | format(1) }}", "it needs more than 0.25 GB of memory"),
    "a string that doubles": (
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "it needs more than 0.25 GB of memory",
    ),
    "a long text": ("{{ 'x' * 10 ** 7 }}", r"it writes 10000003 characters; allowed: 10\d+ for such messages"),
    "a long range": ("{{ range(10 ** 9) | list }}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "internals": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "internals by a filter": ("{{ (messages | attr('__class__')).__subclasses__() }}", "unsafe|undefined"),
    "internals by a format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "internals of a function": ("{{ raise_exception.__globals__ }}{{ lipsum.__globals__['os'] }}", "unsafe"),
    "internals of a namespace": ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "unsafe"),
    "what is changed": ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    "what is changed by a type": ("{{ dict.update(messages[0], {'role': 'x'}) }}", "no attribute 'update'|undefined"),
    "its own refusal": ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
    "what is not there": ("{{ messages[7]['role'] }}", "has no element 7"),
    "a division": ("{{ 1 / 0 }}", "division by zero"),
}
GOOD = "{{ messages[0].content }}"


def made(source: str, seconds: float = 10):
    return closing(RenderingProcess(ChatTemplate(source, {}, (), "here"), seconds))


def ask(process, *prompts):
    process.send([("prompt", prompt) for prompt in prompts])
    return process.replies()


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_hostile_template_does_is_one_line(monkeypatch, kind):
    monkeypatch.setattr(module, "LIMIT_BYTES", 2**28)
    source, message = HOSTILE[kind]
    seconds = 0.3 if "0.3 s" in message else 10
    begin = time.monotonic()
    with made("{% if messages[0].content == 'bad' %}" + source + "{% endif %}" + GOOD, seconds) as process:
        good, bad, after = ask(process, "größe 😀", "bad", "x\n")
    assert (good, after) == ("größe 😀", "x\n")
    with pytest.raises(ValueError, match=f"^chat template here: .*({message})") as error:
        raise bad
    assert "\n" not in str(error.value) and not isinstance(bad, UserError)
    assert time.monotonic() - begin < 60


def test_a_template_that_exceeds_its_limits_again_and_again_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_TOLERATED_SHARE", 0.1)
    with (
        made("{{ 10 ** (10 ** 10) }}", 0.1) as process,
        pytest.raises(UserError, match=r"here: it has not ended within 0.1 s, in 3 chats; mend the tem"),
    ):
        ask(process, *"abcdefgh")
    with made("{% if messages[0].content == 'bad' %}" + ENDLESS + "{% endif %}" + GOOD, 0.1) as process:
        for _ in range(3):  # a few of many are not the template's fault
            assert isinstance(ask(process, *["x"] * 10, "bad")[-1], LimitExceeded)


def test_chats_that_exceed_the_limits_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LIMIT_SECONDS", 0.3)
    tokenizer = ByteTokenizer()
    source = "{% if messages | length > 3 %}" + ENDLESS + "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = ChatTemplate(source, {}, (), "here")
    found = Found()
    documents = [Document(Messages(chat), f"a.jsonl:{number}", 0) for number, chat in enumerate(CHATS, 1)]
    results = list(rendered(documents, tokenizer, make_data(tmp_path, on_invalid="skip"), found, "a"))
    with pytest.raises(
        UserError, match=r"^a.jsonl:2: chat template here: it has not ended within 0.3 s; mend the file, or set data.on_inv"
    ):
        list(rendered(documents, tokenizer, make_data(tmp_path), found, "a"))
    assert len(results) == 2 and found.dropped == {"chat template exceeds its limits": 1} and found.skipped_names == ["a.jsonl:2"]


@pytest.mark.parametrize("source", [ENDLESS, "{{ 1 / 0 }}"])
def test_after_a_failure_that_ends_the_program_nothing_is_run(source):
    with closing(RenderingProcess(ChatTemplate(source, {}, (), "here"), 0.2, stop_at_failure=True)) as process:
        (failure,) = ask(process, "x", "x", "x")
        assert isinstance(failure, ValueError) and process._process is None


def test_a_process_that_is_killed_is_started_again_and_none_is_left():
    with made(GOOD) as process:
        assert ask(process, "a") == ["a"]
        child = process._process
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        lost, after = ask(process, "b", "c")
        assert str(lost) == "chat template here: it ended its process with signal 9" and after == "c"
        child = process._process
    assert child.poll() is not None
    with made(GOOD) as process:
        assert ask(process) == [] and process._process is None, "none is started for nothing"
