"""What a row of a table says: a text, a prompt with its response, a chat, or token ids. Recognised by the names of its columns."""

import json
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from spectitan.config.sections import Data

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
IDS_COLUMNS = ("input", "output")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # others, as system, are called what they are


class PromptResponse(NamedTuple):
    prompt: str
    response: str  # what is supervised


class Messages(NamedTuple):
    messages: list[dict]  # {"role": ..., "content": ..., ...}; what the assistant says is supervised
    tools: list | None = None  # what the assistant may call, as JSON schemas


class Ids(NamedTuple):
    ids: np.ndarray  # integers [n]
    mask: np.ndarray | None  # bool [n], what is supervised; None: ids of a text, which is supervised and framed as texts are


Content = str | PromptResponse | Messages | Ids  # a string is a text that is supervised throughout


class Row(NamedTuple):
    number: int  # of its file, from 1: a line, or a row
    position: int  # bytes of the file read so far, about
    columns: Callable[[], dict]  # raises ValueError with what is wrong


class SkippedRow(Exception):
    """A row that says nothing to learn from. Not a mistake: it is counted by this reason."""


class Kind(NamedTuple):
    """One of the things that a row may say."""

    name: str
    columns: tuple[str, ...]  # a row with all of these says it
    keys: str  # that name the columns
    content: Callable[[dict, Data], Content]  # raises ValueError with what is wrong, or SkippedRow
    optional: tuple[str, ...] = ()  # columns that it may have as well

    def columns_in(self, names: Collection[str]) -> list[str]:
        """Those of its columns that are among the names."""
        return [*self.columns, *(column for column in self.optional if column in names and column not in self.columns)]


def kinds_of(data: Data) -> list[Kind]:
    """The kinds of rows that the configuration names columns for."""
    kinds = [
        Kind("text", (data.text_column,), "data.text_column", _text),
        Kind("prompt and response", (data.prompt_key, data.response_key), "data.prompt_key and data.response_key", _prompt_response),
        Kind("messages", (data.messages_key,), "data.messages_key", _messages, (data.tools_key,)),
        Kind("ids", (data.tokens_column,), "data.tokens_column", _ids),
        Kind(
            "ids with a mask",
            (data.input_ids_column, data.loss_mask_column),
            "data.input_ids_column and data.loss_mask_column",
            _masked_ids,
        ),
    ]
    if {data.prompt_key, data.response_key} != set(IDS_COLUMNS):  # else these are text
        kinds.append(Kind("ids of prompt and response", IDS_COLUMNS, "token ids", _ids_of_prompt_and_response))
    return [kind for kind in kinds if all(kind.columns)]


def kind_of(names: Collection[str], kinds: Sequence[Kind]) -> Kind:
    """The one kind that columns of these names make.

    Raises:
        ValueError: none does, or several do.
    """
    fitting = [kind for kind in kinds if all(column in names for column in kind.columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        both = " and ".join(f"{kind.name} ({kind.keys})" for kind in fitting)
        raise ValueError(f'its columns could be {both}; allowed: one of them. Set the key that is not meant to ""')
    wanted = ", or ".join(f"{' and '.join(map(repr, kind.columns))} ({kind.keys})" for kind in kinds)
    raise ValueError(f"no column {wanted}; its columns: {', '.join(repr(name)[:80] for name in list(names)[:12]) or 'none'}")


def _text(row: dict, data: Data) -> str:
    text = row[data.text_column]
    if not isinstance(text, str):
        raise ValueError(f"{data.text_column!r} is of type {type(text).__name__}; allowed: a string")
    return characters(text, repr(data.text_column))


def _prompt_response(row: dict, data: Data) -> PromptResponse:
    prompt = _nested(row, data.prompt_key, data.prompt_dict_keys, "prompt")
    response = _nested(row, data.response_key, data.response_dict_keys, "response")
    if not response.strip():
        raise SkippedRow(f"empty {data.response_key!r} (data.response_key)")
    return PromptResponse(characters(prompt, repr(data.prompt_key)), characters(response, repr(data.response_key)))


def _nested(row: dict, key: str, dict_keys: Sequence[str], name: str) -> str:
    """The string at row[key][dict_keys[0]][...]. On the way a list of one item stands for its item, as in VERL."""
    value, path = _only_item(row[key]), repr(key)
    for inner in dict_keys:
        if not isinstance(value, dict) or inner not in value:
            there = (
                f"its keys: {', '.join(map(repr, value)) or 'none'}" if isinstance(value, dict) else f"it is of type {type(value).__name__}"
            )
            raise ValueError(f"no {inner!r} in {path} (data.{name}_dict_keys); {there}")
        value, path = _only_item(value[inner]), f"{path}.{inner!r}"
    if not isinstance(value, str):
        raise SkippedRow(f"no string in {path} (data.{name}_key)")
    return value


def _only_item(value):
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _messages(row: dict, data: Data) -> Messages:
    messages, place = row[data.messages_key], f"{data.messages_key!r} (data.messages_key)"
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SkippedRow(f"no list of messages in {place}")
    messages = [_of_sharegpt(message) if message.keys() >= {"from", "value"} else message for message in messages]
    roles = [message.get("role") for message in messages]
    if not all(isinstance(role, str) and role in ROLES for role in roles):
        raise SkippedRow(f"unknown role in {place}")
    if not all(isinstance(message.get("content"), str | list | None) for message in messages):
        raise SkippedRow(f"a message without text in {place}")
    if not any(message["role"] == "assistant" and (message.get("content") or message.get("tool_calls")) for message in messages):
        raise SkippedRow(f"no assistant turn in {place}")
    characters(json.dumps(messages, ensure_ascii=False, default=str), place)
    # A key without a value is none to a template, as in transformers.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return Messages(messages, _tools(row.get(data.tools_key), f"{data.tools_key!r} (data.tools_key)"))


def _of_sharegpt(message: dict) -> dict:
    """{"from": "human", "value": ...}, as ShareGPT's chats are written, in the usual names."""
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT_ROLES.get(str(message["from"]), message["from"]), "content": message["value"]} | rest


def _tools(value: object, place: str) -> list[dict] | None:
    """A list of schemas, of which it or each may be written as JSON."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools] if isinstance(tools, list) else tools
    except ValueError:
        raise ValueError(f"{place} is not valid JSON") from None
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place} is no list of JSON schemas")
    characters(json.dumps(tools, ensure_ascii=False, default=str), place)
    return tools


def _ids(row: dict, data: Data) -> Ids:
    return Ids(_some(_id_array(row[data.tokens_column], data.tokens_column), f"{data.tokens_column!r} (data.tokens_column)"), None)


def _masked_ids(row: dict, data: Data) -> Ids:
    name, mask_name = data.input_ids_column, data.loss_mask_column
    ids, mask = _some(_id_array(row[name], name), f"{name!r} (data.input_ids_column)"), _array(row[mask_name])
    if mask is None or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{mask_name!r} is no list of 0 and 1 (data.loss_mask_column)")
    if len(mask) != len(ids):
        raise ValueError(f"{mask_name!r} has {len(mask)} numbers and {name!r} {len(ids)}; allowed: as many")
    return Ids(ids, mask.astype(bool))


def _ids_of_prompt_and_response(row: dict, data: Data) -> Ids:
    prompt, response = (_id_array(row[column], column) for column in IDS_COLUMNS)
    _some(response, repr(IDS_COLUMNS[1]))
    return Ids(np.concatenate([prompt, response], dtype=np.int64, casting="unsafe"), np.arange(len(prompt) + len(response)) >= len(prompt))


def _some(values: np.ndarray, place: str) -> np.ndarray:
    if not len(values):
        raise SkippedRow(f"empty {place}")
    return values


def _id_array(value: object, column: str) -> np.ndarray:
    ids = _array(value)
    if ids is None or ids.dtype == bool:
        other = ", or text that data.prompt_key and data.response_key name" if column in IDS_COLUMNS else ""
        raise ValueError(f"{column!r} is no list of token ids; allowed: one{other}")
    return ids


def _array(value: object) -> np.ndarray | None:
    """Integers or truth values [n], from an array or a list; None if it is neither."""
    if isinstance(value, list) and all(type(item) is int for item in value):
        try:
            return np.array(value, np.int64)
        except OverflowError:
            return None
    if isinstance(value, list) and all(type(item) is bool for item in value):
        return np.array(value, bool)
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "iub" else None


def characters(text: str, place: str) -> str:
    """The text; ValueError if it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} has half of a surrogate pair, which is no character") from None
    return text
