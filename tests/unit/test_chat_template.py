"""Chat templates: where they are found, what they may use, and through `rendered` what becomes of chats, prompts and mistakes."""

import json

import pytest
from transformers import AutoTokenizer

from spectitan.chats.conversation import Renderer
from spectitan.data import rendering
from spectitan.data.documents import Found, Messages, PromptResponse
from spectitan.data.documents.reading import Document
from spectitan.data.encoding import encode
from spectitan.data.rendering import rendered
from spectitan.data.tokenizer import load_tokenizer
from spectitan.errors import UserError
from tests.unit.chat_fixtures import CHATS, TEMPLATES, THOUGHTS, TOOLS, chat_folder, template
from tests.unit.data_fixtures import make_data

ASSISTANT = {"role": "assistant", "content": "x"}


def contents_of(contents, tokenizer, tmp_path, **keys):
    """Contents that are not dropped, rendered, and what was found."""
    found = Found()
    documents = (Document(content, f"a.jsonl:{number}", 0) for number, content in enumerate(contents, 1))
    data = make_data(tmp_path, **{"on_invalid": "skip"} | keys)
    return [document.content for document in rendered(documents, tokenizer, data, found, "a")], found


def encode_all(contents, tokenizer, tmp_path):
    results, found = contents_of(contents, tokenizer, tmp_path)
    return [encode(content, tokenizer) for content in results], found


def prompt_of(tokenizer, text="x"):
    return Renderer(tokenizer.chat_template).prompt(text)


def test_what_templates_may_use_is_what_transformers_gives_them(tmp_path):
    source = (
        "{% set ns = namespace(n=0) %}{%- for m in messages -%}\n    {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {{- m | tojson(indent=2) }}{{ m.content | tojson(ensure_ascii=True) }}{% set ns.n = ns.n + 1 %}\n{%- endfor %}\n"
        "{{ ns.n }}{{ tools is none }}{{ documents is none }}{{ eos_token }}{{ nothing }}{{ messages[1:] | length }}{{ dict(a=1)['a'] }}\n"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '\\n' }}go{% endif %}\n"
    )
    folder = chat_folder(tmp_path, source, {"eos_token": "</s>"})
    messages = [
        {"role": "user", "content": 'größe "<&>"'}, {"role": "tool", "content": "x"}, {"role": "user", "content": "[1]", "thinking": "y"},
    ]  # fmt: skip
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    renderer = Renderer(load_tokenizer(folder).chat_template)
    assert renderer.conversation(messages).text == expected and "01" in expected and '"reasoning_content": "y"' in expected
    assert renderer.conversation([*messages, ASSISTANT]).text != expected


def test_templates_are_found_as_transformers_finds_them(tmp_path):
    folder = chat_folder(tmp_path, "config", {"eos_token": {"__type": "AddedToken", "content": "</s>"}})
    assert prompt_of(load_tokenizer(folder)) == "config"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default {{ eos_token }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    before = load_tokenizer(folder)
    assert prompt_of(before) == "default </s>"
    theirs = AutoTokenizer.from_pretrained(folder)
    for tools in (None, TOOLS):
        text = Renderer(before.chat_template).conversation([ASSISTANT], tools).text
        assert text == theirs.apply_chat_template([ASSISTANT], tools=tools, tokenize=False) and (text == "tools") == (tools is not None)
    (folder / "chat_template.jinja").write_text("file {{ messages[0]['content'] | tojson }} {{ strftime_now('%Y') }}")
    after = load_tokenizer(folder)
    assert prompt_of(after, 'größe "<') == 'file "größe \\"<" 2024'
    assert after.fingerprint == before.fingerprint and after.chat_template.fingerprint != before.chat_template.fingerprint
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("more tools")
    assert Renderer(load_tokenizer(folder).chat_template).conversation([ASSISTANT], TOOLS).text == "more tools"


def test_a_template_of_a_processor_and_tokens_of_a_file_of_their_own(tmp_path):
    folder = chat_folder(tmp_path, None, {})
    assert load_tokenizer(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}processor"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    assert prompt_of(load_tokenizer(folder)) == "<s>processor"
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(UserError, match=r"chat_template.json: not valid JSON"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: byte 0xff is not UTF-8"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["ChatML", "header ids", "brackets"])
def test_a_prompt_is_one_user_message_and_its_response_follows_with_one_end(tmp_path, name):
    folder = chat_folder(tmp_path / "base", template(name, False), TEMPLATES[name][1])
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    pairs = [PromptResponse("count größe", "x = 0.5\n"), PromptResponse("count größe", "x = 0.5\n" + theirs.eos_token)]
    ((ids, mask), (ended, _)), _ = encode_all(pairs, ours, tmp_path)
    text = theirs.apply_chat_template([{"role": "user", "content": "count größe"}], tokenize=False, add_generation_prompt=True)
    prompt, response = (theirs(part, add_special_tokens=False).input_ids for part in (text, "x = 0.5\n" + theirs.eos_token))
    assert ids.tolist() == prompt + response and mask.tolist() == [False] * len(prompt) + [True] * len(response)
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


def test_a_bos_that_the_template_writes_is_not_doubled(tmp_path):
    tokens = TEMPLATES["brackets"][1] | {"add_bos_token": True}
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", template("brackets", False), tokens))
    results, _ = encode_all([Messages(CHATS[0]), PromptResponse("x", "count")], tokenizer, tmp_path)
    for ids, _ in results:
        assert ids[0] == tokenizer.bos_id and ids.tolist().count(tokenizer.bos_id) == 1


@pytest.mark.parametrize(("threads", "chats"), [(1, 256), (13, 7)], ids=["one process", "three processes"])
def test_chats_prompts_and_texts_keep_their_order_and_what_is_left_out_is_counted(tmp_path, monkeypatch, threads, chats):
    monkeypatch.setattr(rendering, "_BATCH_CHATS", chats)
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", template("thinking", False), TEMPLATES["thinking"][1]))
    contents, expected = [], []
    for number in range(600):  # more than one batch
        kind = number * 2654435761 % 7
        content = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "x"}]
        if kind < 2:
            contents.append(f"{number}")
        elif kind < 4:
            contents.append(PromptResponse(f"{number}", "x"))
        else:
            contents.append(Messages(THOUGHTS[0] if kind == 4 else content))
        expected.append("naïve" if kind == 4 else f"{number}")
    results, found = contents_of(contents, tokenizer, tmp_path, tokenizer_threads=threads)
    assert len(results) == 600
    for content, said in zip(results, expected):
        assert content == said if isinstance(content, str) else f"user\n{said}<|im_end|>" in content.text
    reason = "assistant turns without a part of theirs, which the template leaves out (as earlier thinking)"
    assert found.noted == {reason: expected.count("naïve")} and not found.dropped


def test_chats_of_which_no_turn_is_placed_are_dropped_and_counted(tmp_path):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", source, {}))
    results, found = contents_of([Messages(CHATS[1]), "text"], tokenizer, tmp_path)
    assert results == ["text"] and found.dropped == {"no assistant turn that can be placed": 1}
    assert found.noted == {"assistant turns not supervised: where they begin is not to be found": 2}


def test_a_template_that_is_none_names_file_and_line(tmp_path):
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", "{{ 1 }}\n{% for %}", {}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: not a chat template: .* at line 2"):
        encode_all([Messages(CHATS[0])], tokenizer, tmp_path)


def test_a_row_that_the_template_refuses_is_one_line_with_file_and_row(tmp_path):
    source = "{% if messages | length > 2 %}{{ raise_exception('one turn\nonly') }}{% endif %}" + template("ChatML", False)
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", source, {}))
    contents = [Messages(CHATS[0]), Messages(CHATS[1]), Messages(CHATS[0])]
    with pytest.raises(UserError, match=r"^a\.jsonl:2: chat template .*tokenizer_config\.json: one turn only; mend the file, or set data"):
        contents_of(contents, tokenizer, tmp_path, on_invalid="error")
    results, found = contents_of(contents, tokenizer, tmp_path)
    assert len(results) == 2 and found.dropped == {"invalid row": 1} and found.skipped_names == ["a.jsonl:2"]
