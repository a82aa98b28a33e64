"""Chat templates of the kinds in use, with and without generation tags, and a tokenizer folder that has one."""

import json
from pathlib import Path

from tokenizers import Tokenizer as Backend

from tests.unit.data_fixtures import tokenizer_folder

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]

# Each is a template, with @ and $ around what the assistant says, and the tokens of the model that has it.
TEMPLATES = {
    "ChatML": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
        "{% if message.role == 'assistant' %}@{{ message.content + '<|im_end|>' }}${{ '\\n' }}"
        "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        {"eos_token": "<|im_end|>"},
    ),
    "header ids": (
        "{{- bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
        "    {%- if message['role'] == 'assistant' %}\n"
        "        @{{- message['content'] | trim + '<|eot_id|>' }}$\n"
        "    {%- else %}\n"
        "        {{- message['content'] | trim + '<|eot_id|>' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
        "{%- endif %}\n",
        {"bos_token": "<s>", "eos_token": "<|eot_id|>"},
    ),
    "brackets": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
        "{% elif message.role == 'assistant' %}@{{ ' ' + message.content + eos_token }}$"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
}


def template(name: str, tags: bool) -> str:
    begin, end = ("{% generation %}", "{% endgeneration %}") if tags else ("", "")
    return TEMPLATES[name][0].replace("@", begin).replace("$", end)


def chat_folder(folder: Path, source: str | None, tokens: dict[str, str]) -> Path:
    """A folder with a tokenizer that knows the special tokens, and a chat template."""
    tokenizer_folder(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(SPECIALS)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False} | tokens
    settings |= {} if source is None else {"chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


CHATS = [
    [{"role": "user", "content": "count größe"}, {"role": "assistant", "content": "x = 0.5"}],
    [
        {"role": "user", "content": "日本語?"},
        {"role": "assistant", "content": "return self 😀"},
        {"role": "user", "content": "  naïve\n"},
        {"role": "assistant", "content": "count\n    return x"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "größe"}, {"role": "user", "content": "and no answer"}],
]
