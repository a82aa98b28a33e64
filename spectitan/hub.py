"""Models and datasets of Hugging Face's hub: fetched into its own cache by the package huggingface_hub, which is an extra."""

import functools
import logging
import re
from pathlib import Path

from spectitan import heartbeat
from spectitan.errors import UserError

logger = logging.getLogger(__name__)

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_CARDS = ["README.md", ".git*"]


def could_be_model(text: str) -> bool:
    """Whether it reads as organisation/name."""
    return re.fullmatch(f"{_PART}/{_PART}", text) is not None


def could_be_dataset(text: str) -> bool:
    """Whether it reads as organisation/name, perhaps with a folder or file below it."""
    return re.fullmatch(f"{_PART}/{_PART}(/[^/]+)*", text) is not None and ".." not in text.split("/")


def fetch_model(name: str, patterns: tuple[str, ...], problem: str) -> Path:
    """The folder of a model's files that match `patterns`.

    Args:
        problem: what is said first where it cannot be had.

    Raises:
        UserError: no package, no network, no such model, no right to it.
    """
    return _snapshot("model", name, patterns, problem)


def fetch_dataset(path: str, suffixes: tuple[str, ...], problem: str) -> Path:
    """The folder of a dataset's files that end in `suffixes`, or the folder or file that `path` names below it.

    Raises:
        UserError: as fetch_model; nothing there.
    """
    organisation, name, *below = path.split("/")
    folder = "/".join(below)
    patterns = (folder, *(f"{folder}/*{suffix}" for suffix in suffixes)) if below else tuple(f"*{suffix}" for suffix in suffixes)
    snapshot = _snapshot("dataset", f"{organisation}/{name}", patterns, problem)
    if not (snapshot / folder).exists():
        raise UserError(f"{problem}; the dataset {organisation}/{name} of the hub has no {folder!r}")
    return snapshot / folder


def name_of_snapshot(folder: Path) -> str:
    """organisation/name of a folder in the hub's cache of models; "" for any other."""
    repository = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return repository.removeprefix("models--").replace("--", "/") if repository.startswith("models--") else ""


@functools.cache
def _snapshot(kind: str, name: str, patterns: tuple[str, ...], problem: str) -> Path:
    given = f"{problem}; {name} as a {kind} of Hugging Face's hub"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UserError(f'{given} needs the package huggingface_hub: pip install "spectitan[hub]", or give a path') from None
    try:
        with heartbeat.covered():
            folder = Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns), ignore_patterns=_CARDS))
    except GatedRepoError:
        raise UserError(f"{given} is open to those only who asked for access and logged in (hf auth login); or give a path") from None
    except RepositoryNotFoundError:
        raise UserError(f"{given} is not there, or private (hf auth login); or give a path") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{given} is not in its cache, and the hub cannot be reached; give a path") from None
    except Exception as error:  # the network has many ways to fail, and so have the libraries that stand before it
        raise UserError(f"{given} cannot be fetched ({type(error).__name__}: {' '.join(str(error).split())[:200]}); give a path") from None
    logger.info("%s %s of the hub: %s", kind, name, folder)
    return folder
