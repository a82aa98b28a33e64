"""Evaluation prompts: JSON lines, each {"tokens": [ids]} or {"text": "..."}."""

import json
from importlib import resources
from pathlib import Path

from spectitan.data.documents.rows import characters
from spectitan.data.tokenizer import Tokenizer, load_tokenizer
from spectitan.errors import UserError

SHIPPED = "spectitan:"


def load_prompts(name: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The prompts of a file, as token ids; a text is tokenised as a prompt is.

    Args:
        name: a path, or "spectitan:NAME" for those that ship with the base of that name.

    Raises:
        UserError: no such file, no prompt in it, a line that is none; ids that the tokenizer does not have; prompts that ship
            with a base of another tokenizer.
    """
    path = _path(name)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{name}: prompts file {path}: {error.strerror}") from None
    if name.startswith(SHIPPED) and load_tokenizer(path.parent).fingerprint != tokenizer.fingerprint:
        allowed = "allowed: a file of your own (eval.prompts, data.drop_overlap), or none (eval.prompts)"
        raise UserError(f"{name}: these prompts are token ids of another tokenizer than this base has; {allowed}")
    prompts = [_prompt(line, f"{path}:{number}", tokenizer) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path}: no prompts; allowed: JSON lines with the key tokens or text")
    return prompts


def _path(name: str) -> Path:
    if not name.startswith(SHIPPED):
        return Path(name).expanduser()
    return Path(str(resources.files("spectitan"))) / "assets" / name[len(SHIPPED) :] / "prompts.jsonl"


def _prompt(line: bytes, place: str, tokenizer: Tokenizer) -> list[int]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("text"), str) and row["text"]:
        try:
            text = characters(row["text"], "'text'")
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        return tokenizer.prompt(tokenizer.encode(text))
    ids = row.get("tokens")
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise UserError(f'{place}: not a prompt; allowed: {{"tokens": [ids]}} or {{"text": "..."}}, not empty')
    if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < tokenizer.vocab_size)
        raise UserError(f"{place}: token id {wrong}; this tokenizer's are 0 .. {tokenizer.vocab_size - 1}")
    return ids
