"""Tokenizers of model folders: tokenizer.json, or a tokenizer.model in sentencepiece's or tiktoken's format."""

import base64
import binascii
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from spectitan.chats.template import ChatTemplate, load_chat_template
from spectitan.data.neighbours import Neighbours
from spectitan.errors import UserError
from spectitan.files import read_json

END_OF_TEXT = "<|endoftext|>"
SPACE = "\u2581"  # what sentencepiece writes for a space

# How Llama 3 cuts text into words, and its 256 special tokens, which follow the ranks in its file.
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_NAMED_SPECIALS = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id"}
LLAMA3_NAMED_SPECIALS |= {8: "eom_id", 9: "eot_id", 10: "python_tag"}
LLAMA3_NUM_SPECIALS = 256


class Tokenizer(ABC):
    """Text to ids and back.

    A document is `[bos_id] + encode(text) + [eos_id]`, a prompt is `[bos_id] + encode(text)`, without the ids that are None.

    Attributes:
        vocab_size: largest id + 1.
        bos_id: what this tokenizer puts before a text, None if it puts nothing there (though a token of that name may exist).
        eos_id: the end of a text; None if there is none.
        fingerprint: hash of the files that decide ids of text; caches of token ids are keyed by it.
        chat_template: of the same folder; None if there is none.
        specials: text of the tokens that `decode` leaves out, by id.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    chat_template: ChatTemplate | None = None
    specials: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without bos_id and eos_id."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. Releases the interpreter while it works, so that threads may call it side by side."""

    @abstractmethod
    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Text that a chat template made: its ids, special tokens in it as theirs, and the character at which each id begins."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and ids that only the model has; bytes that are not UTF-8 become U+FFFD."""

    def words(self, text: str) -> list[str]:
        """The text as the model of the tokenizer is given it: no token crosses from one word into the next."""
        return [text] if text else []

    def word_starts(self, text: str) -> list[int]:
        """The characters at which `words` begin, as far as that can be said of the text before it is normalised."""
        return []

    def document(self, ids: list[int]) -> list[int]:
        """ids of a text with what begins and ends a document."""
        return [*self.prompt(ids), *(() if self.eos_id is None else (self.eos_id,))]

    def prompt(self, ids: list[int]) -> list[int]:
        """ids of a text with what begins a document."""
        return [*(() if self.bos_id is None else (self.bos_id,)), *ids]


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, the format of Hugging Face's `tokenizers`."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Backend
        from tokenizers import processors

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json that `tokenizers` reads: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._normalizer, self._pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        self._splits_words = len(self._pre_tokens("a b a b")) > 1  # or its tokens alone keep words apart, as sentencepiece's
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.specials = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        settings = read_json(path.parent / "tokenizer_config.json")
        self.bos_id = self._first_id(settings)
        # That is what it says of ids. It may also move where ids begin behind their spaces, and so from a prompt into its answer.
        self._backend.post_processor = processors.Sequence([])
        self.eos_id = self._end_id(settings, path.parent)
        self.fingerprint = _fingerprint(path, self.bos_id, self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids  # a batch would start the library's threads

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)  # a batch releases the interpreter
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def words(self, text: str) -> list[str]:
        words = self._pre_tokens(text)
        return words if self._splits_words else [part for word in words for part in self._vocabulary.parts(word)]

    def word_starts(self, text: str) -> list[int]:
        if self._splits_words:
            return [start for _, (start, _) in self._pre_tokenizer.pre_tokenize_str(text)]
        return self._vocabulary.starts(text.replace(" ", SPACE))

    def _pre_tokens(self, text: str) -> list[str]:
        text = self._normalizer.normalize_str(text) if self._normalizer else text
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)] if self._pre_tokenizer else [text] if text else []

    @cached_property
    def _vocabulary(self) -> Neighbours:
        return Neighbours(self._backend.get_vocab(with_added_tokens=False))

    def _first_id(self, settings: dict) -> int | None:
        """add_bos_token decides where it is set, as in transformers; else what the file's own post-processor puts first."""
        if isinstance(settings.get("add_bos_token"), bool):
            return self._id_of(settings.get("bos_token")) if settings["add_bos_token"] else None
        plain = self._backend.encode("a", add_special_tokens=False).ids
        processed = self._backend.encode("a").ids
        return processed[0] if processed[1 : 1 + len(plain)] == plain and processed[: len(plain)] != plain else None

    def _end_id(self, settings: dict, folder: Path) -> int | None:
        named = self._id_of(settings.get("eos_token"))
        return named if named is not None else _end_id_of_configs(folder)

    def _id_of(self, token: object) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(content) if isinstance(content, str) else None


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model of sentencepiece, as of Llama 2; begins documents with its bos, as Llama does."""

    def __init__(self, path: Path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UserError(f"{path}: reading it needs the package sentencepiece (pip install sentencepiece)") from None
        content = path.read_bytes()
        try:
            if not content:  # the library takes this for "no model yet"
                raise RuntimeError
            self._backend = SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise UserError(f"{path}: neither a sentencepiece model nor a tiktoken file") from None
        self.vocab_size = self._backend.vocab_size()
        settings = read_json(path.parent / "tokenizer_config.json")
        bos, eos = self._backend.bos_id(), self._backend.eos_id()
        self.bos_id = bos if bos >= 0 and settings.get("add_bos_token", True) else None
        self.eos_id = eos if eos >= 0 else None
        self.specials = {i: self._backend.id_to_piece(i) for i in (bos, eos) if i >= 0}
        self.fingerprint = _fingerprint(path, self.bos_id, self.eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), num_threads=1)

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """As transformers does for such models: what is between bos and eos is tokenised part by part."""
        specials = {text: i for i, text in self.specials.items()}
        ids, starts, place = [], [], 0
        for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text) if specials else [text]:
            if part in specials:
                ids.append(specials[part])
                starts.append(place)
            elif part:
                part_ids = self._backend.encode(part)
                ids += part_ids
                starts += [place + start for start in self._starts(part_ids, len(part))]
            place += len(part)
        return ids, starts

    def _starts(self, ids: list[int], length: int) -> list[int]:
        """The character at which each id of a text of `length` characters begins."""
        starts, place = [], 0
        for id in ids:
            # A byte that goes on with a character begins where that does.
            byte = int(self._backend.id_to_piece(id)[1:-1], 16) if self._backend.is_byte(id) else None
            goes_on = byte is not None and byte & 0xC0 == 0x80
            starts.append(place - goes_on)
            place += not goes_on if byte is not None else len(self._backend.id_to_piece(id))
        added = place - length  # the space that such models put before a text
        if added not in (0, 1):
            raise UserError("this sentencepiece model changes the text that it tokenises: chats need the base's tokenizer.json")
        return [max(0, start - added) for start in starts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([i for i in ids if i < self.vocab_size])

    def words(self, text: str) -> list[str]:
        return self._vocabulary.parts(self._backend.normalize(text))

    def word_starts(self, text: str) -> list[int]:
        return self._vocabulary.starts(text.replace(" ", SPACE))

    @cached_property
    def _vocabulary(self) -> Neighbours:
        return Neighbours(map(self._backend.id_to_piece, range(self._backend.vocab_size())))


class TiktokenTokenizer(Tokenizer):
    """A tokenizer.model in tiktoken's format, one "base64 rank" a line, with Llama 3's words and special tokens."""

    def __init__(self, path: Path):
        try:
            import regex  # tiktoken needs it as well
            import tiktoken
        except ImportError:
            raise UserError(f"{path}: reading it needs the package tiktoken (pip install tiktoken)") from None
        ranks = _read_ranks(path)
        names = [LLAMA3_NAMED_SPECIALS.get(i, f"reserved_special_token_{i}") for i in range(LLAMA3_NUM_SPECIALS)]
        specials = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
        self._backend = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
        self._pattern = regex.compile(LLAMA3_PATTERN)
        self._first_special = len(ranks)
        self.specials = {i: text for text, i in specials.items()}
        self.vocab_size = len(ranks) + LLAMA3_NUM_SPECIALS
        self.bos_id = specials["<|begin_of_text|>"]
        self.eos_id = specials["<|end_of_text|>"]
        self.fingerprint = _fingerprint(path, self.bos_id, self.eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._backend.encode(text, allowed_special="all") for text in texts]

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        ids = self._backend.encode(text, allowed_special="all")
        return ids, self._backend.decode_with_offsets(ids)[1]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([i for i in ids if i < self._first_special])

    def words(self, text: str) -> list[str]:
        return self._pattern.findall(text)

    def word_starts(self, text: str) -> list[int]:
        return [match.start() for match in self._pattern.finditer(text)]


class StreamDecoder:
    """Decodes ids as they are generated: what `push` returns, put together, is the text; an unfinished character waits.

    Args:
        tokenizer: whose ids these are.
        context: ids already shown (the prompt), so that a first word keeps the space before it.
    """

    # A character has at most four bytes, so at most four ids; more that do not decode are invalid and shown as such.
    _MAX_HELD = 4
    _CONTEXT = 8

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._shown = list(context)[-self._CONTEXT :]
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become certain with these further ids; may be empty."""
        self._held += ids
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._held) <= self._MAX_HELD:
            return ""
        self._shown, self._held = (self._shown + self._held)[-self._CONTEXT :], []
        return text

    def finish(self) -> str:
        """The text that was still held back."""
        text, self._held = self._new_text(), []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def load_tokenizer(folder: str | Path, model_vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder; tokenizer.json is preferred to tokenizer.model.

    Raises:
        UserError: no such folder, no file that can be read, a file that cannot be understood; more tokens than the model has.
    """
    folder = Path(folder)
    tokenizer = _read_tokenizer(folder)
    tokenizer.chat_template = load_chat_template(folder, read_json(folder / "tokenizer_config.json"), tokenizer.specials.values())
    if model_vocab_size is not None and tokenizer.vocab_size > model_vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model {model_vocab_size}"
        raise UserError(f"{folder}: the tokenizer has {sizes}; allowed: at most as many")
    return tokenizer


def _read_tokenizer(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json")
    model = folder / "tokenizer.model"
    if model.is_file():
        with model.open("rb") as file:
            head = file.read(200)
        return TiktokenTokenizer(model) if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", head) else SentencePieceTokenizer(model)
    problem = "no tokenizer in this folder" if folder.is_dir() else "no such folder"
    raise UserError(f"{folder}: {problem}; allowed: one with tokenizer.json, or tokenizer.model (sentencepiece or tiktoken)")


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Trains a byte-level BPE tokenizer (words cut as GPT-2's, which suits source code); returns tokenizer.json's text.

    `<|endoftext|>` is id 0, the 256 bytes are always in the vocabulary, so that no text is out of it.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise UserError(f"vocabulary of {vocab_size} tokens; allowed: at least {len(alphabet) + 1}, the bytes and {END_OF_TEXT}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend.to_str(pretty=True)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: not a line of a tiktoken file; allowed: base64 of a token, a space, its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: ranks are not 0 .. {len(ranks) - 1}, each once")
    return ranks


def _end_id_of_configs(folder: Path) -> int | None:
    """eos_token_id of generation_config.json or config.json; the first, where there are several."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _fingerprint(path: Path, *ids: int | None) -> str:
    return hashlib.sha256(path.read_bytes() + repr(ids).encode()).hexdigest()[:16]
