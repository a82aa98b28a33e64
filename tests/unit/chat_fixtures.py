"""Chat templates of the kinds in use, with and without generation tags, and a tokenizer folder that has one."""

import json
from pathlib import Path

from tokenizers import Tokenizer as Backend

from tests.unit.data_fixtures import tokenizer_folder

SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "<turn>", "<end_turn>", "<U>",
    "<A>", "<calls>", "<end_calls>",
]  # fmt: skip

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
    # The system's words stand in the first user turn; the turn's end is not the end of text.
    "preamble": (
        "{{ bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set preamble = messages[0]['content'] | trim + '\n\n' %}\n"
        "    {%- set turns = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set preamble = '' %}\n"
        "    {%- set turns = messages %}\n"
        "{%- endif %}\n"
        "{%- for message in turns -%}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\n"
        "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}\n"
        "    {{- '<turn>' + role + '\n' + (preamble if loop.first else '') }}\n"
        "    {%- if role == 'model' %}@{{- message['content'] | trim + '<end_turn>' }}$\n"
        "    {%- else %}{{- message['content'] | trim + '<end_turn>' }}{% endif %}\n"
        "    {{- '\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<turn>model\n' }}{% endif %}\n",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    # Tools in the system's turn, calls as JSON, what tools answer in turns of the user, of which several in a row are one.
    "tools": (
        "{%- if tools %}\n"
        "    {{- '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') + 'Tools:' }}\n"
        "    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{% endfor %}\n"
        "    {{- '<|im_end|>\n' }}\n"
        "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'system' %}{% continue %}{% endif %}\n"
        "    {%- if message.role == 'tool' %}\n"
        "        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}\n"
        "        {{- '\n<result>\n' + message.content + '\n</result>' }}\n"
        "        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}\n"
        "    {%- elif message.role == 'assistant' %}\n"
        "        {{- '<|im_start|>assistant\n' }}@\n"
        "        {%- if message.content %}{{- message.content }}{% endif %}\n"
        "        {%- for call in message.tool_calls or [] %}\n"
        "            {%- set function = call.function if call.function is defined else call %}\n"
        "            {{- '\n<calls>' + function.name + ' ' }}\n"
        "            {{- function.arguments if function.arguments is string else function.arguments | tojson }}{{ '<end_calls>' }}\n"
        "        {%- endfor %}{{- '<|im_end|>' }}$\n"
        "        {{- '\n' }}\n"
        "    {%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}\n",
        {"eos_token": "<|im_end|>"},
    ),
    # Thinking is kept after the last user turn only, where there are tags for it even if there is none.
    "thinking": (
        "{%- set ns = namespace(last=-1, looking=true) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- if ns.looking and message.role == 'user' %}\n"
        "        {%- set ns.looking = false %}{% set ns.last = messages | length - 1 - loop.index0 %}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- for message in messages %}\n"
        "    {%- set content = message.content if message.content is string else '' %}\n"
        "    {%- if message.role == 'assistant' %}\n"
        "        {%- set thoughts = '' %}\n"
        "        {%- if message.reasoning_content is string %}{% set thoughts = message.reasoning_content %}\n"
        "        {%- elif '</think>' in content %}\n"
        "            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}\n"
        "            {%- set content = content.split('</think>')[-1].lstrip('\n') %}\n"
        "        {%- endif %}\n"
        "        {{- '<|im_start|>assistant\n' }}@\n"
        "        {%- if loop.index0 > ns.last %}{{- '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}\n"
        "        {{- content + '<|im_end|>' }}$\n"
        "        {{- '\n' }}\n"
        "    {%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}\n",
        {"eos_token": "<|im_end|>"},
    ),
    # The generation prompt opens the thinking, which no turn keeps; after a tool there is no generation prompt.
    "opened thinking": (
        "{{ bos_token }}{%- set ns = namespace(tool=false) -%}\n"
        "{%- for message in messages -%}\n"
        "    {%- if message.role == 'user' %}{% set ns.tool = false %}{{ '<U>' + message.content }}{% endif -%}\n"
        "    {%- if message.role == 'tool' %}{% set ns.tool = true %}{{ '<result>' + message.content + '</result>' }}{% endif -%}\n"
        "    {%- if message.role == 'assistant' %}\n"
        "        {%- if not ns.tool %}{{ '<A>' }}{% endif %}@\n"
        "        {{- (message.content or '').split('</think>')[-1] }}\n"
        "        {%- if message.tool_calls %}\n"
        "            {%- for call in message.tool_calls %}{{ '<calls>' + call.function.name + '<end_calls>' }}{% endfor %}\n"
        "        {%- endif %}{{ eos_token }}$\n"
        "    {%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt and not ns.tool %}{{ '<A><think>\n' }}{% endif %}\n",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
}
NO_SYSTEM = ("brackets", "opened thinking")


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

SYSTEM = {"role": "system", "content": "0.5"}
CALL = {"type": "function", "function": {"name": "count", "arguments": {"x": "größe"}}}
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}]
TOOL_CHATS = [
    [
        {"role": "user", "content": "count größe"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "日本語"},
        {"role": "assistant", "content": "x = 5"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "self", "tool_calls": [CALL]},
        {"role": "tool", "content": "0.5"},
        {"role": "assistant", "content": "return 0.5"},
    ]
]
THOUGHTS = [
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>\nself\n</think>\n\ncount"},
        {"role": "user", "content": "naïve"},
        {"role": "assistant", "content": "return 😀"},
        {"role": "user", "content": "0.5"},
        {"role": "assistant", "content": "<think>\nx = größe\n</think>\n\n0.5"},
    ]
]


def chats_of(name: str) -> list[list[dict]]:
    """Chats that a template takes."""
    chats = CHATS if name in NO_SYSTEM else [*CHATS, [SYSTEM, *CHATS[1]]]
    if name in ("tools", "opened thinking"):
        chats = chats + TOOL_CHATS
    return chats + THOUGHTS if "thinking" in name else chats
