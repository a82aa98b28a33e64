"""What is said of a speculator's folder, on the screen and in its README: how to serve it, and what takes it."""

import json
import shlex
from typing import NamedTuple


class _Server(NamedTuple):
    environment: str | None  # variables before the command; None: there is no command
    method: str  # of vLLM's --speculative-config; empty: vLLM sees it itself
    takers: list[str]


_SERVERS = {  # by export.format
    "mlp_speculator": _Server(
        "VLLM_USE_V1=0",
        "",
        [
            "vLLM 0.9 with its V0 engine, by the command above. Its V1 engine, the only one of later versions, does not.",
            "IBM's fms-extras, whose layout it is.",
            "ArcticInference takes what --export.format arctic writes instead.",
        ],
    ),
    "arctic": _Server(
        "ARCTIC_INFERENCE_ENABLED=1",
        "arctic",
        ["vLLM 0.18 with the ArcticInference plugin, by the command above. vLLM without it does not."],
    ),
    "speculators": _Server(
        "",
        "eagle3",
        [
            "vLLM, by the command above.",
            "The package speculators of the vLLM project, whose layout it is; speculators_config.verifier.name_or_path in config.json must "
            "be a folder or a name that it finds: --export.base_name.",
        ],
    ),
    "verl": _Server(
        None,
        "",
        [
            "VERL's speculator training, which keeps its checkpoints so; widths by level only for mlp, and equal ones in emb_dim and proj_dim.",
            "No server: --export.format arctic writes a folder for one, if there is a single width and one embedding for all gates.",
        ],
    ),
}


def serve_notes(format: str, folder: str, base_name: str, num_draft_tokens: int) -> list[str]:
    """Lines that say how to serve a folder: the command, if a server takes it, and what takes it."""
    environment, method, takers = _SERVERS[format]
    speculative_config = {"method": method} if method else {}
    speculative_config |= {"model": folder, "num_speculative_tokens": num_draft_tokens}
    command = f"{environment} vllm serve {shlex.quote(base_name)} --speculative-config {shlex.quote(json.dumps(speculative_config))}"
    lines = [] if environment is None else [command.strip(), ""]
    return [
        *lines,
        "What takes it:",
        *(f"- {taker}" for taker in takers),
        "- spectitan: speculator.path, to evaluate it and to train it on.",
    ]


def folder_readme(family: str, format: str, base_name: str, steps: int, parameters: int) -> str:
    """README.md of a folder.

    Args:
        family: speculator.type.
        format: export.format.
        base_name: what the folder calls the base.
        steps: tokens that it drafts in a round.
        parameters: how many it has, each shared one once.
    """
    notes = serve_notes(format, ".", base_name, steps)
    drafts = f"{steps} tokens a round" if format == "speculators" else f"{steps} heads"
    command = [] if notes[0].startswith("What") else ["In this folder:", "", f"    {notes.pop(0)}", notes.pop(0)]
    return "\n".join(
        [
            f"# {family.upper()} speculator for {base_name}",
            "",
            f"A draft model for speculative decoding: {drafts}, {parameters:,} parameters, laid out as `{format}`. Written by spectitan.",
            "It works with the base model above and no other.",
            "",
            *command,
            *notes,
            "",
        ]
    )
