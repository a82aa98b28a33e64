"""Documents as their text: chats and prompts through the base's chat template, ids checked. What follows only tokenises."""

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from spectitan.config.sections import Data
from spectitan.data.chat_template import ChatTemplate
from spectitan.data.documents import Content, Document, Found, Ids, Messages, PromptResponse
from spectitan.data.tokenizer import Tokenizer
from spectitan.errors import UserError

logger = logging.getLogger(__name__)


class Rendered(NamedTuple):
    """Text that a chat template made, special tokens and all: nothing is put before it."""

    text: str
    spans: tuple[tuple[int, int], ...]  # characters [begin, end) of it that are supervised
    response: str = ""  # tokenised on its own after the text; supervised, as is the end of text after it


def rendered(documents: Iterable[Document], tokenizer: Tokenizer, data: Data, found: Found, name: str) -> Iterator[Document]:
    """Documents whose content is a text, a prompt with its response, Rendered or Ids: no messages are left.

    A prompt becomes the one user message of a chat, as in VERL; without a chat template it stays a text that the response follows.
    Documents that cannot be rendered are counted in `found`. Runs in the main thread, so that a template's time can be limited.

    Args:
        name: of the dataset, for the log.

    Raises:
        UserError: messages, and the base has no template; one that does not end; one that fails, or an id out of the vocabulary,
            under data.on_invalid = "error": names file and row.
    """
    template, told = tokenizer.chat_template, False
    for document in documents:
        if isinstance(document.content, str):
            yield document
            continue
        if isinstance(document.content, PromptResponse) and template is None and not told:
            logger.info("data %s: the base has no chat template: responses follow their prompts as they are", name)
            told = True
        try:
            content = _rendered(document.content, template, tokenizer, found)
        except UserError as error:
            raise UserError(f"{document.source}: {error}") from None
        except ValueError as error:
            found.invalid(document.source, str(error), data, "invalid row")
            continue
        if content is not None:
            yield document._replace(content=content)


def _rendered(content: Content, template: ChatTemplate | None, tokenizer: Tokenizer, found: Found) -> Content | Rendered | None:
    """None: dropped, and counted."""
    if isinstance(content, Ids):
        return _checked(content, tokenizer.vocab_size)
    if isinstance(content, PromptResponse) and template is not None:
        return Rendered(template.prompt(content.prompt), (), content.response)
    if not isinstance(content, Messages):
        return content
    if template is None:
        raise UserError(
            "messages need a chat template, and the base has none; allowed: chat_template.jinja in the base's folder, or "
            "data.prompt_key and data.response_key"
        )
    text, spans, unplaced = template.conversation(content.messages)
    if unplaced:
        found.noted["assistant turns not supervised: the template rewrites them"] += unplaced
    if not spans:
        found.dropped["no assistant turn that can be placed"] += 1
        return None
    return Rendered(text, spans)


def _checked(content: Ids, vocab_size: int) -> Ids:
    wrong = content.ids[(content.ids < 0) | (content.ids >= vocab_size)]
    if len(wrong):
        raise ValueError(f"token id {wrong[0]}; this tokenizer's are 0 .. {vocab_size - 1}")
    return content


def texts_of(content: Content | Rendered) -> list[str]:
    """The texts in a content; ids are none."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, Messages):
        return [message["content"] for message in content.messages if isinstance(message.get("content"), str)]
    return [part for part in content if isinstance(part, str)]


def mask_of(starts: np.ndarray | list[int], spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    """bool [n]: whether a token is supervised, by the character it begins at: one that begins in the prompt is not."""
    places, mask = np.array(starts, np.int64), np.zeros(len(starts), bool)
    for begin, end in spans:
        mask |= (places >= begin) & (places < end)
    return mask
