"""Chats: the ids and masks of transformers, what cannot be placed, and templates that fail or do not end."""

import json
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from spectitan.data import chat_template
from spectitan.data.chat_template import ChatTemplate, EndlessTemplate
from spectitan.data.documents import Found, Messages, PromptResponse
from spectitan.data.documents.reading import Document
from spectitan.data.encoding import encode
from spectitan.data.rendering import rendered
from spectitan.data.tokenizer import load_tokenizer
from spectitan.errors import UserError
from tests.unit.chat_fixtures import CHATS, TEMPLATES, chat_folder, template
from tests.unit.data_fixtures import make_data


ASSISTANT = {"role": "assistant", "content": "x"}


def encode_all(contents, tokenizer, tmp_path):
    """Encoded of each content that is not dropped, and what was found."""
    found = Found()
    documents = (Document(content, f"a.jsonl:{number}", 0) for number, content in enumerate(contents, 1))
    return [encode(d.content, tokenizer) for d in rendered(documents, tokenizer, make_data(tmp_path, on_invalid="skip"), found, "a")], found


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(tmp_path, name, tags):
    tokens = TEMPLATES[name][1]
    ours = load_tokenizer(chat_folder(tmp_path / "ours", template(name, tags), tokens))
    theirs = AutoTokenizer.from_pretrained(chat_folder(tmp_path / "theirs", template(name, True), tokens))
    systems = [] if name == "brackets" else [[{"role": "system", "content": "0.5"}, *CHATS[1]]]
    chats = CHATS + systems
    results, found = encode_all(map(Messages, chats), ours, tmp_path)
    assert not found.dropped and not found.noted and len(results) == len(chats)
    for chat, (ids, mask) in zip(chats, results):
        expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == expected["input_ids"]
        assert mask.astype(int).tolist() == expected["assistant_masks"] and 0 < mask.sum() < len(mask)
        said = [message["content"].strip() for message in chat if message["role"] == "assistant"]
        assert ours.decode(ids[mask].tolist()).replace(" ", "") == "".join(said).replace(" ", "")


def test_what_templates_may_use_is_what_transformers_gives_them(tmp_path):
    source = (
        "{% set ns = namespace(n=0) %}{%- for m in messages -%}\n    {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {{- m | tojson(indent=2) }}{{ m.content | tojson(ensure_ascii=True) }}{% set ns.n = ns.n + 1 %}\n{%- endfor %}\n"
        "{{ ns.n }}{{ tools is none }}{{ documents is none }}{{ eos_token }}{{ nothing }}{{ messages[1:] | length }}\n"
        "{% if add_generation_prompt %}{{ '\\n' }}go{% endif %}\n"
    )
    folder = chat_folder(tmp_path, source, {"eos_token": "</s>"})
    messages = [{"role": "user", "content": 'größe "<&>"'}, {"role": "tool", "content": "x"}, {"role": "user", "content": "[1]"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert load_tokenizer(folder).chat_template.conversation([*messages, ASSISTANT]).text != expected
    assert load_tokenizer(folder).chat_template.conversation(messages).text == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_one_user_message_and_its_response_follows_with_one_end(tmp_path, name):
    folder = chat_folder(tmp_path / "base", template(name, False), TEMPLATES[name][1])
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ((ids, mask),), _ = encode_all([PromptResponse("count größe", "x = 0.5\n")], ours, tmp_path)
    text = theirs.apply_chat_template([{"role": "user", "content": "count größe"}], tokenize=False, add_generation_prompt=True)
    prompt, response = (theirs(part, add_special_tokens=False).input_ids for part in (text, "x = 0.5\n" + theirs.eos_token))
    assert ids.tolist() == prompt + response and mask.tolist() == [False] * len(prompt) + [True] * len(response)
    ((ended, _),), _ = encode_all([PromptResponse("count größe", "x = 0.5\n" + theirs.eos_token)], ours, tmp_path)
    assert ended.tolist() == ids.tolist()


def test_without_a_template_the_response_follows_the_prompt_and_no_bos_is_doubled(tmp_path, caplog):
    folder = chat_folder(tmp_path / "base", None, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    tokenizer = load_tokenizer(folder)
    caplog.set_level("INFO")
    pairs = [PromptResponse("self ", "return"), PromptResponse("<s>self ", "return"), PromptResponse("", "x")]
    results, _ = encode_all(pairs, tokenizer, tmp_path)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    prompt, response = [bos, *tokenizer.encode("self ")], [*tokenizer.encode("return"), eos]
    for ids, mask in results[:2]:
        assert ids.tolist() == prompt + response and mask.tolist() == [False] * len(prompt) + [True] * len(response)
    assert results[2].ids.tolist() == [bos, *tokenizer.encode("x"), eos] and results[2].mask.tolist() == [False, True, True]
    assert caplog.text.count("no chat template") == 1
    with pytest.raises(UserError, match=r"a.jsonl:1: messages need a chat template, and the base has none; allowed: chat_template.jinja"):
        encode_all([Messages(CHATS[0])], tokenizer, tmp_path)


def test_a_token_that_begins_in_the_prompt_is_not_supervised(tmp_path):
    # The prompt ends in a space, which the tokenizer joins with the answer's first word.
    source = "{% for m in messages %}{{ '|' + m.role + ': ' }}{% if m.role == 'assistant' or true %}{{ m.content }}{% endif %}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '|assistant: ' }}{% endif %}"
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", source, {}))
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "count self"}]
    ((ids, mask),), _ = encode_all([Messages(chat)], tokenizer, tmp_path)
    text = "|user: x|assistant: count self"
    starts = np.cumsum([0] + [len(tokenizer.decode([i])) for i in ids[:-1].tolist()])
    assert tokenizer.decode(ids.tolist()) == text and len(text) - len("count self") not in starts, "a token spans the border"
    assert mask.tolist() == (starts >= len(text) - len("count self")).tolist() and mask.any()


# An older turn loses what is before </think>, as in models that think.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_of_a_template_that_rewrites_history_only_what_can_be_placed_is_supervised(tmp_path):
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", THINKING, {"eos_token": "<|im_end|>"}))
    user = {"role": "user", "content": "x"}
    thought, plain, last = (
        {"role": "assistant", "content": content} for content in ("<think>self</think>count", "return", "<think>x</think>0.5")
    )
    (whole,), found = encode_all([Messages([user, thought, user, plain, user, last])], tokenizer, tmp_path)
    assert tokenizer.decode(whole.ids[whole.mask].tolist()) == "return<think>x</think>0.5" and not found.dropped
    assert found.noted == {"assistant turns not supervised: the template rewrites them": 1}
    nothing, found = encode_all([Messages([user, thought, user])], tokenizer, tmp_path)
    assert nothing == [] and found.dropped == {"no assistant turn that can be placed": 1}


def test_a_generation_prompt_that_is_not_in_the_text_leaves_the_turn_unsupervised(tmp_path):
    source = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", source, {"eos_token": "<|im_end|>"}))
    chats = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": content}] for content in ("count", "<think>\nself")]
    (placed,), found = encode_all(map(Messages, chats), tokenizer, tmp_path)
    assert tokenizer.decode(placed.ids[placed.mask].tolist()) == "self", "what the generation prompt says is not supervised"
    assert found.dropped == {"no assistant turn that can be placed": 1}


def test_templates_are_found_as_transformers_finds_them(tmp_path):
    folder = chat_folder(tmp_path, "config", {"eos_token": {"content": "</s>"}})
    assert load_tokenizer(folder).chat_template.prompt("x") == "config"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": "default {{ eos_token }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    before = load_tokenizer(folder)
    assert before.chat_template.prompt("x") == "default </s>"
    (folder / "chat_template.jinja").write_text("file {{ messages[0]['content'] | tojson }} {{ strftime_now('%Y') }}")
    after = load_tokenizer(folder)
    assert after.chat_template.prompt('größe "<') == 'file "größe \\"<" 2024'
    assert after.fingerprint == before.fingerprint and after.chat_template.fingerprint != before.chat_template.fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7]['role'] }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_is_one_line_with_file_and_row(tmp_path, source, message):
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", source, {}))
    documents = [Document(Messages(CHATS[0]), "a.jsonl:7", 0)]
    with pytest.raises(UserError, match=rf"^a\.jsonl:7: chat template .*tokenizer_config\.json: .*({message})") as error:
        list(rendered(documents, tokenizer, make_data(tmp_path), Found(), "a"))
    assert "\n" not in str(error.value)
    _, found = encode_all([Messages(CHATS[0])], tokenizer, tmp_path)
    assert found.dropped == {"invalid row": 1} and found.skipped_names == ["a.jsonl:1"]


def test_a_template_that_is_none_names_file_and_line(tmp_path):
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", "{{ 1 }}\n{% for %}", {}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: not a chat template: .* at line 2"):
        encode_all([Messages(CHATS[0])], tokenizer, tmp_path)


def test_a_template_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "LIMIT_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}"
    endless = loop * 3 + "{% endfor %}" * 3
    begin = time.monotonic()
    for call in (lambda template: template.prompt("x"), lambda template: template.conversation(CHATS[0])):
        with pytest.raises(EndlessTemplate, match=r"chat template here: it has not ended within 0.2 s"):
            call(ChatTemplate(endless, {}, "here"))
    assert time.monotonic() - begin < 5
    time.sleep(0.3)  # no timer is left
