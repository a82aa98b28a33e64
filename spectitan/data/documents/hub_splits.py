"""Which files of a dataset of Hugging Face's hub are its training split, and which its evaluation: by words in their paths."""

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

TRAINING, EVALUATION = ("train",), ("validation", "test")  # the first that the dataset has
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = r"[-._ 0-9/]"
_NO_DATA = re.compile(r"(?:.*/)?README\.md|[^/]*\.py")  # cards, and scripts at the top, which load the data or made it


def choose(name: str, files: Sequence[str], wanted: tuple[str, ...]) -> list[str]:
    """The files of the first split of `wanted` that there is; all of them where no path names a split of `wanted`.

    Args:
        name: of the dataset, for the log.
        files: POSIX paths.
    """
    files = [file for file in files if not _NO_DATA.fullmatch(file)] or files
    for split in wanted:
        words = re.compile(rf"(?:^|{_SEPARATOR})(?:{'|'.join(_WORDS[split])})(?:{_SEPARATOR}|$)")
        chosen = [file for file in files if words.search(file)]
        if chosen:
            logger.info(
                "data %s: the split %s: %d of the files, %d others are left out", name, split, len(chosen), len(files) - len(chosen)
            )
            return chosen
    return list(files)
