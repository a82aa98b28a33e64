"""A vLLM server in a process of its own, started as a folder's README says, on the CPU."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

_START_SECONDS = 1800  # a loaded machine; a quiet one takes 25
_ANSWER_SECONDS = 900
# The CPU build's own settings; 0.3 is the share of the machine's memory that must be free.
_FLAGS = "--dtype float32 --enforce-eager --max-model-len 512 --gpu-memory-utilization 0.3"
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def serve_command(folder: Path) -> list[str]:
    """The words of the command in an exported folder's README."""
    (line,) = re.findall(r"^    (vllm serve .*)$", (folder / "README.md").read_text(), re.MULTILINE)
    return shlex.split(line)


class VllmServer:
    """`with VllmServer(environment, folder, log) as server`: serves an exported folder on its base.

    Args:
        environment: the virtual environment that has vLLM.
        folder: as `spectitan.export` wrote it, with export.base_name a folder that vLLM finds.
        log: file for what the server prints.
    """

    def __init__(self, environment: Path, folder: Path, log: Path):
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        program, *words = serve_command(folder)
        command = [str(environment / "bin" / program), *words, *_FLAGS.split(), "--host", "127.0.0.1", "--port", str(self.port)]
        self.model = words[1]
        with open(log, "w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, env=os.environ | _ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> "VllmServer":
        try:
            end = time.monotonic() + _START_SECONDS
            while not self._is_healthy():
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-4000:]
                time.sleep(1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """Ends the server and the processes that it has started: they are a group of their own."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass

    def complete(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The token ids that follow a prompt, greedily."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        choice = json.loads(self._ask("/v1/completions", body))["choices"][0]
        assert choice["prompt_token_ids"] == prompt
        return choice["token_ids"]

    def acceptance(self) -> tuple[float, float, list[float]]:
        """Rounds, accepted tokens, and accepted ones by position, since the server's start."""
        text = self._ask("/metrics").decode()

        def counters(name: str) -> list[float]:
            lines = re.findall(rf"^vllm:spec_decode_num_{name}_total\{{(.*)\}} (\S+)$", text, re.MULTILINE)
            by_position = {int(re.search(r'position="(\d+)"', labels)[1]) if "position" in labels else 0: value for labels, value in lines}
            return [float(value) for _, value in sorted(by_position.items())]

        return counters("drafts")[0], counters("accepted_tokens")[0], counters("accepted_tokens_per_pos")

    def _is_healthy(self) -> bool:
        try:
            self._ask("/health")
        except OSError:
            return False
        return True

    def _ask(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            return answer.read()
