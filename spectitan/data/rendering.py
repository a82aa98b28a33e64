"""Documents as their text: chats and prompts through the base's chat template, ids checked. What follows only tokenises."""

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np

from spectitan.chats.process import LimitExceeded, RenderingProcess, Request
from spectitan.chats.template import Conversation
from spectitan.config.sections import Data
from spectitan.data.documents import Content, Document, Found, Ids, Messages, PromptResponse
from spectitan.data.tokenizer import Tokenizer
from spectitan.errors import UserError

logger = logging.getLogger(__name__)

_BATCH_CHATS, _BATCH_CHARACTERS = 256, 2**18  # handed to the template together
_THREADS_PER_PROCESS = 4  # that tokenise what a process renders

Batch = list[tuple[Document, Request | None]]


class Rendered(NamedTuple):
    """Text that a chat template made, special tokens and all: nothing is put before it."""

    text: str
    spans: tuple[tuple[int, int], ...]  # characters [begin, end) of it that are supervised
    response: str = ""  # tokenised on its own after the text; supervised, as is the end of text after it


def rendered(documents: Iterable[Document], tokenizer: Tokenizer, data: Data, found: Found, name: str) -> Iterator[Document]:
    """Documents whose content is a text, a prompt with its response, Rendered or Ids: no messages are left. To be closed.

    A prompt becomes the one user message of a chat, as in VERL; without a chat template it stays a text that the response follows.
    Documents that cannot be rendered are counted in `found`. The template runs in processes of its own, ahead of what is
    yielded.

    Args:
        name: of the dataset, for the log.

    Raises:
        UserError: messages, and the base has no template; one that is none or exceeds its limits often; one that fails, or an id
            out of the vocabulary, under data.on_invalid = "error": names file and row.
    """
    with closing(_Rendering(tokenizer, data, found, name)) as rendering:
        batch, size = [], 0
        for document in documents:
            request = rendering.request(document)
            if request is None and not batch and not rendering.ahead:  # nothing is before it
                yield from rendering.finished([(document, None)], [])
                continue
            batch.append((document, request))
            size += sum(map(len, texts_of(document.content)))
            if size > _BATCH_CHARACTERS or len(batch) == _BATCH_CHATS:
                yield from rendering.begin(batch)
                batch, size = [], 0
        yield from rendering.begin(batch)
        while rendering.ahead:
            yield from rendering.end_first()


class _Rendering:
    """The documents of a dataset on their way through the chat template.

    Attributes:
        ahead: batches that are being rendered, the first first, each by a process of its own; each document with its request, None
            where there is nothing to render.
    """

    def __init__(self, tokenizer: Tokenizer, data: Data, found: Found, name: str):
        self._tokenizer, self._data, self._found, self._name = tokenizer, data, found, name
        threads = data.tokenizer_threads if data.tokenizer_threads > 0 else os.cpu_count() or 1
        count = 0 if tokenizer.chat_template is None else max(1, threads // _THREADS_PER_PROCESS)
        stop = data.on_invalid == "error"
        self._processes = [RenderingProcess(tokenizer.chat_template, stop_at_failure=stop) for _ in range(count)]
        self._idle = deque(self._processes)
        self._told = False
        self.ahead: deque[tuple[Batch, RenderingProcess]] = deque()

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def request(self, document: Document) -> Request | None:
        """What the template has to do for a document."""
        content = document.content
        if self._processes and isinstance(content, Messages):
            return "conversation", content.messages, content.tools
        if self._processes and isinstance(content, PromptResponse):
            return "prompt", content.prompt
        if isinstance(content, Messages):
            raise UserError(
                f"{document.source}: messages need a chat template, and the base has none; allowed: chat_template.jinja in the base's "
                "folder, or data.prompt_key and data.response_key"
            )
        if isinstance(content, PromptResponse) and not self._told:
            logger.info("data %s: the base has no chat template: responses follow their prompts as they are", self._name)
            self._told = True
        return None

    def begin(self, batch: Batch) -> Iterator[Document]:
        """Lets a process begin with a batch; the documents of the first one, if all processes had one."""
        if not batch:
            return
        finished = () if self._idle else self._end_first()
        process = self._idle.popleft()
        process.send([request for _, request in batch if request is not None])
        self.ahead.append((batch, process))
        if finished:
            yield from self.finished(*finished)

    def end_first(self) -> Iterator[Document]:
        """The documents of the first batch."""
        yield from self.finished(*self._end_first())

    def _end_first(self) -> tuple[Batch, list]:
        batch, process = self.ahead.popleft()
        replies = process.replies()
        self._idle.append(process)
        return batch, replies

    def finished(self, batch: Batch, replies: list) -> Iterator[Document]:
        """A batch with its contents rendered, without what is dropped.

        Args:
            replies: of the requests in it, in order, up to one that ends the program.
        """
        reply_of = iter(replies)
        for document, request in batch:
            reply = None if request is None else next(reply_of)
            try:
                content = self._content(document.content, reply)
            except ValueError as error:
                reason = "chat template exceeds its limits" if isinstance(error, LimitExceeded) else "invalid row"
                self._found.invalid(document.source, str(error), self._data, reason)
                continue
            if content is not None:
                yield document._replace(content=content)

    def _content(self, content: Content, reply: str | Conversation | ValueError | None) -> Content | Rendered | None:
        """None: dropped, and counted."""
        if isinstance(reply, ValueError):
            raise reply
        if isinstance(reply, str):
            return Rendered(reply, (), content.response)
        if reply is None:
            return _checked(content, self._tokenizer.vocab_size) if isinstance(content, Ids) else content
        if reply.unplaced:
            self._found.noted["assistant turns not supervised: where they begin is not to be found"] += reply.unplaced
        if reply.shortened:
            self._found.noted["assistant turns without a part of theirs, which the template leaves out (as earlier thinking)"] += (
                reply.shortened
            )
        if not reply.spans:
            self._found.dropped["no assistant turn that can be placed"] += 1
            return None
        return Rendered(reply.text, reply.spans)


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
