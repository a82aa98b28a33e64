"""What finding the assistant's turns in a chat costs beside writing the chat's text, for short and long chats.

    python benchmarks/chats.py

Milliseconds of processor time a chat, the median of rounds in which the ways take turns. text: the template is run once over the
whole chat, which any way does. ours: text and turns. prefixes: the template is run on what is before and on what is up to each turn,
as is done for a template whose loop is not found (here because it stands in a macro). tags: a template with generation tags. In the
last column the chats go through the process that templates run in, there and back, in batches as `rendered` sends them.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

from spectitan.chats.conversation import Renderer
from spectitan.chats.process import RenderingProcess
from spectitan.chats.template import ChatTemplate

SAID = "{{ message['content'] | trim + '<|eot_id|>' }}"
LOOP = (
    "{{- bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if message['role'] == 'assistant' %}SAID{% else %}" + SAID + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "<|eot_id|>"}
WORDS = "The state at a row predicts the token after next, so that a drafter learns what it will be asked. " * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--turns", type=int, nargs="+", default=[2, 8, 20, 60, 200], help="messages of a chat, half of them the assistant's"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "chats.json"))
    arguments = parser.parse_args()
    rows = [measure(turns, arguments.rounds) for turns in arguments.turns]
    report = {
        "milliseconds_of_processor_time_a_chat": rows,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }
    print("".join(f"{name:>12}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:>12.3f}" if isinstance(value, float) else f"{value:>12}" for value in row.values()))
    Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(turns: int, rounds: int) -> dict:
    chat = [{"role": ("user", "assistant")[i % 2], "content": f"{i} {WORDS}"} for i in range(turns)]
    plain = template(LOOP.replace("SAID", SAID))
    tagged = template(LOOP.replace("SAID", "{% generation %}" + SAID + "{% endgeneration %}"))
    hidden = template("{% macro whole() %}" + plain.source + "{% endmacro %}{{ whole() }}")
    ours, tags, prefixes = (Renderer(one) for one in (plain, tagged, hidden))
    results = [renderer.conversation(chat) for renderer in (ours, tags, prefixes)]
    assert results[0] == results[1] == results[2] and len(results[0].spans) == turns // 2
    ways = {
        "text": lambda: ours._run(chat, None, False),
        "ours": lambda: ours.conversation(chat),
        "prefixes": lambda: prefixes.conversation(chat),
        "tags": lambda: tags.conversation(chat),
    }
    repeats = max(1, 400 // turns)
    taken: dict[str, list[float]] = {name: [] for name in [*ways, "process"]}
    process = RenderingProcess(plain)
    try:
        through_process(process, chat, 1)
        for _ in range(rounds):
            for name, way in ways.items():
                taken[name].append(milliseconds(way, max(1, repeats // turns) if name == "prefixes" else repeats))
            taken["process"].append(through_process(process, chat, repeats))
    finally:
        process.close()
    return {"messages": turns, "characters": len(results[0].text)} | {name: statistics.median(times) for name, times in taken.items()}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, TOKENS, ("<|eot_id|>",), "here")


def milliseconds(function, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        function()
    return 1000 * (time.process_time() - start) / repeats


def through_process(process: RenderingProcess, chat: list[dict], repeats: int) -> float:
    """Wall-clock milliseconds a chat, of both processes."""
    start = time.perf_counter()
    process.send([("conversation", chat, None)] * repeats)
    process.replies()
    return 1000 * (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
