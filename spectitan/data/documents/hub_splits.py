"""Which files of a dataset of Hugging Face's hub are its training split, and which its evaluation: by words in their paths."""

import logging
import re
from collections.abc import Sequence

from spectitan.errors import UserError

logger = logging.getLogger(__name__)

TRAINING, EVALUATION = ("train",), ("validation", "test")  # the first that the dataset has
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = r"[-._ 0-9/]"
_PATTERNS = {split: re.compile(rf"(?:^|{_SEPARATOR})(?:{'|'.join(words)})(?:{_SEPARATOR}|$)") for split, words in _WORDS.items()}
_NO_DATA = re.compile(r"(?:.*/)?README\.md|[^/]*\.py")  # cards, and scripts at the top, which load the data or made it


def choose(name: str, files: Sequence[str], wanted: tuple[str, ...]) -> list[str]:
    """The files of the first split of `wanted` that there is; where no path names one, those that belong to no split.

    Args:
        name: of the dataset, for messages.
        files: POSIX paths.

    Raises:
        UserError: all of them belong to other splits.
    """
    files = [file for file in files if not _NO_DATA.fullmatch(file)] or files
    of_split = {split: [file for file in files if words.search(file)] for split, words in _PATTERNS.items()}
    split = next((split for split in wanted if of_split[split]), None)
    of_any = set().union(*of_split.values())
    chosen = of_split[split] if split else [file for file in files if file not in of_any]
    if not chosen:
        there = ", ".join(split for split, others in of_split.items() if others)
        raise UserError(
            f"{name}: of the splits {there} none is {' or '.join(wanted)}; allowed: the path of a file or folder after the name"
        )
    if len(chosen) < len(files):
        what = f"the split {split}" if split else "what is of no split"
        logger.info("data %s: %s: %d files; %d others are left out", name, what, len(chosen), len(files) - len(chosen))
    return chosen
