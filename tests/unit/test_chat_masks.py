"""Chats as ids and masks: those of transformers, for templates of the kinds in use, with generation tags and without."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from spectitan.chats.conversation import Renderer
from spectitan.chats.template import ChatTemplate
from spectitan.data.encoding import encode
from spectitan.data.rendering import Rendered
from spectitan.data.tokenizer import load_tokenizer
from tests.unit.chat_fixtures import CHATS, SYSTEM, TEMPLATES, THOUGHTS, TOOL_CHATS, TOOLS, chat_folder, chats_of, template


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """By name of the template: transformers' tokenizer, with tags in the template, and ours with its special tokens."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = chat_folder(tmp_path_factory.mktemp("base"), template(name, True), TEMPLATES[name][1])
            made[name] = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        return made[name]

    return get


def conversation(ours, source: str, chat: list[dict], tools=None):
    return Renderer(ours.chat_template._replace(source=source)).conversation(chat, tools)


def encoded(ours, text, spans):
    ids, mask = encode(Rendered(text, spans), ours)
    return ids.tolist(), mask.astype(int).tolist()


def whole_in_a_macro(source: str) -> str:
    """The same template, of which the loop is not to be marked: turns are placed by prefixes."""
    return "{% macro whole() %}" + source + "{% endmacro %}{{ whole() }}"


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(tokenizers, name, tags):
    theirs, ours = tokenizers(name)
    for chat in chats_of(name):
        for tools in (None, TOOLS) if name == "tools" else (None,):
            result = conversation(ours, template(name, tags), chat, tools)
            expected = theirs.apply_chat_template(chat, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = encoded(ours, result.text, result.spans)
            assert ids == expected["input_ids"] and mask == expected["assistant_masks"]
            assert result.unplaced == 0 and 0 < sum(mask) < len(mask)
            assert "bos_token" not in TEMPLATES[name][1] or ids.count(theirs.bos_token_id) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_placed_by_prefixes_are_those_of_transformers_and_what_is_rewritten_is_counted(tokenizers, name):
    theirs, ours = tokenizers(name)
    for chat in chats_of(name):
        result = conversation(ours, whole_in_a_macro(template(name, False)), chat)
        expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded(ours, result.text, result.spans)
        assert ids == expected["input_ids"]
        if "thinking" not in name:
            assert mask == expected["assistant_masks"] and result.unplaced == 0
        else:  # the last turn only is written in the whole as it is written when it is said
            assert all(expected["assistant_masks"][i] for i, supervised in enumerate(mask) if supervised)
            placed = sum(message["role"] == "assistant" for message in chat) - result.unplaced
            assert len(result.spans) == placed
    assert name != "thinking" or (placed, result.unplaced) == (1, 2)


def test_what_is_supervised_of_each_kind_of_turn(tokenizers):
    _, ours = tokenizers("tools")
    said = [text[begin:end] for text, spans, _, _ in [conversation(ours, template("tools", False), TOOL_CHATS[0])] for begin, end in spans]
    call = '\n<calls>count {"x": "größe"}<end_calls>'
    assert said == [call + call + "<|im_end|>", "x = 5<|im_end|>", f"self{call}<|im_end|>", "return 0.5<|im_end|>"]
    _, ours = tokenizers("thinking")
    text, spans, unplaced, shortened = conversation(ours, template("thinking", False), THOUGHTS[0])
    said = [text[begin:end] for begin, end in spans]
    assert said == ["count<|im_end|>", "return 😀<|im_end|>", "<think>\nx = größe\n</think>\n\n0.5<|im_end|>"]
    assert (unplaced, shortened) == (0, 1), "of the first turn the thinking is left out"
    assert conversation(ours, template("thinking", False), TOOL_CHATS[0]).shortened == 2, "it has no place for tool calls"
    reasoned = [{**message, "thinking": "naïve"} if message["role"] == "assistant" else message for message in CHATS[1]]
    text, spans, _, shortened = conversation(ours, template("thinking", False), reasoned)
    assert text[slice(*spans[-1])] == "<think>\nnaïve\n</think>\n\ncount\n    return x<|im_end|>" and shortened == 1


@pytest.mark.parametrize("tags", [True, False])
def test_what_the_generation_prompt_says_is_not_supervised(tokenizers, tags):
    _, ours = tokenizers("opened thinking")
    said = "{% generation %}{{ m.content }}{% endgeneration %}" if tags else "{{ m.content }}"
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}{% else %}{{ '<A>' }}" + said + "{% endif %}{% endfor %}"
    )
    source += "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
    user = {"role": "user", "content": "x"}
    plain, thought = ({"role": "assistant", "content": content} for content in ("count", "<think>\nself</think>0.5"))
    chats = [user, thought, user, plain, user, thought], [user, plain, user, thought]
    for chat, expected in zip(chats, (["self</think>0.5", "count", "self</think>0.5"], ["count", "self</think>0.5"])):
        text, spans, unplaced, _ = conversation(ours, source, chat)
        assert [text[begin:end] for begin, end in spans] == expected and unplaced == 0


def test_a_turn_without_its_generation_prompt_is_not_placed(tokenizers):
    _, ours = tokenizers("ChatML")
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
    )
    for other in (source, whole_in_a_macro(source)):
        result = conversation(ours, other, CHATS[1])
        assert result.spans == () and result.unplaced == 2


def test_a_chat_that_the_assistant_begins(tokenizers):
    _, ours = tokenizers("ChatML")
    result = conversation(ours, template("ChatML", False), CHATS[1][1:])
    assert [result.text[begin:end] for begin, end in result.spans] == ["return self 😀<|im_end|>", "count\n    return x<|im_end|>"]


@pytest.mark.parametrize("turns", [1, 2, 7, 200])
def test_a_long_chat_costs_as_many_runs_of_its_template_as_a_short_one(tokenizers, monkeypatch, turns):
    _, ours = tokenizers("header ids")
    chat = [SYSTEM] + [
        message for i in range(turns) for message in ({"role": "user", "content": f"x {i}"}, {"role": "assistant", "content": f"{i}"})
    ]
    renderer, runs = Renderer(ours.chat_template._replace(source=template("header ids", False))), []
    run = renderer._run
    monkeypatch.setattr(renderer, "_run", lambda *arguments: runs.append(arguments) or run(*arguments))
    text, spans, unplaced, _ = renderer.conversation(chat)
    assert [text[begin:end] for begin, end in spans] == [f"{i}<|eot_id|>" for i in range(turns)] and unplaced == 0
    assert len(runs) == (2 if turns == 1 else 3)


def test_marks_do_not_change_what_a_template_writes():
    """A template that looks at what it has written, in every way that Jinja has."""
    loop = "{% for m in messages %}{{ m.content }},{% endfor %}"
    source = (
        "{% set a %}LOOP{% endset %}{{ a | length }} {% filter center(12) %}LOOP{% endfilter %} "
        "{% macro b() %}LOOP{% endmacro %}{{ b() | length }} {% for m in messages recursive %}{{ loop.index }}{% endfor %} LOOP"
    )
    messages = [{"role": "user", "content": "größe"}, {"role": "user", "content": "x"}]
    assert (
        Renderer(ChatTemplate(source.replace("LOOP", loop), {}, (), "here")).conversation(messages).text == "8   größe,x,   8 12 größe,x,"
    )


@pytest.mark.parametrize("trimmed", [False, True], ids=["", "begins of words are told, not of their spaces"])
def test_a_token_that_begins_in_the_prompt_is_not_supervised(tmp_path, trimmed):
    # The prompt ends in a space, which the tokenizer joins with the answer's first word.
    source = "{% for m in messages %}{{ '|' + m.role + ': ' + m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '|assistant: ' }}{% endif %}"
    folder = chat_folder(tmp_path, source, {})
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    backend.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    text, spans, _, _ = conversation(ours, source, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "count self"}])
    assert [text[begin:end] for begin, end in spans] == ["count self"]
    ids, mask = encoded(ours, text, spans)
    starts = np.cumsum([0] + [len(ours.decode([i])) for i in ids[:-1]])
    assert ours.decode(ids) == text and len(text) - len("count self") not in starts, "a token spans the border"
    assert mask == (starts >= len(text) - len("count self")).astype(int).tolist() and any(mask)
