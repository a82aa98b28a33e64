"""A draft vocabulary: the tokens that a drafter can draft, as speculators and vLLM write it.

`d2t` int64 [draft vocab] holds token id - draft id, `t2d` bool [vocab] whether a token is among them; draft ids ascend with token ids.
"""

import dataclasses
import pickle
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectitan.errors import UserError


def maps_of(token_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """d2t and t2d of token ids, int64 [draft vocab], ascending."""
    t2d = torch.zeros(vocab_size, dtype=torch.bool, device=token_ids.device)
    t2d[token_ids] = True
    return token_ids - torch.arange(len(token_ids), device=token_ids.device), t2d


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """int64 [size], ascending: the tokens with the highest counts, int64 [vocab]; of equals, and of those never seen, the lowest ids."""
    return torch.sort(counts, descending=True, stable=True).indices[:size].sort().values


def check_maps(d2t: Tensor, t2d: Tensor, where: str) -> None:
    """Raises UserError, beginning with `where`, if d2t and t2d are not of one vocabulary."""
    ids = torch.arange(len(d2t)) + d2t
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < len(t2d)):
        raise UserError(f"{where}: d2t maps to the tokens {int(ids.min())} to {int(ids.max())}; allowed: 0 to {len(t2d) - 1}, as t2d has")
    if len(ids) > 1 and not bool((ids[1:] > ids[:-1]).all()):
        raise UserError(f"{where}: d2t does not ascend: draft id {int((ids[1:] <= ids[:-1]).nonzero()[0]) + 1} repeats or precedes a token")
    if int(t2d.sum()) != len(ids) or not bool(t2d[ids].all()):
        raise UserError(
            f"{where}: d2t and t2d contradict each other: {len(ids)} and {int(t2d.sum())} tokens, {int(t2d[ids].sum())} in both"
        )


def read_vocabulary(config, vocab_size: int) -> tuple[Tensor, Tensor] | None:
    """d2t and t2d of a new drafter, from the files that its keys name; None for the whole vocabulary.

    Sets draft_vocab_size, where it is -1, to what d2t_path holds.

    Args:
        config: the keys draft_vocab_size, token_freq_path, d2t_path and t2d_path.
        vocab_size: of the base.

    Raises:
        UserError: keys that exclude each other, files that cannot be read, or of another vocabulary.
    """
    paths = (config.d2t_path, config.t2d_path)
    if any(paths):
        if not all(paths):
            raise UserError(f"speculator.d2t_path = {paths[0]!r} and speculator.t2d_path = {paths[1]!r}; allowed: both, or neither")
        if config.token_freq_path:
            raise UserError("speculator.token_freq_path beside speculator.d2t_path, which already says which tokens; allowed: one of them")
        return _read_maps(config, vocab_size)
    if config.draft_vocab_size in (-1, vocab_size):
        if config.token_freq_path:
            raise UserError(
                "speculator.token_freq_path without speculator.draft_vocab_size, and all tokens are drafted; allowed: both, or neither"
            )
        return None
    if not config.token_freq_path:
        raise UserError(
            f"speculator.draft_vocab_size = {config.draft_vocab_size} needs speculator.token_freq_path (spectitan.prepare writes such a "
            "file), or d2t_path and t2d_path"
        )
    path = Path(config.token_freq_path)
    if torch.get_default_device().type == "meta" and not path.exists():  # a plan asks for sizes, perhaps before tokens are counted
        counts = torch.zeros(vocab_size, dtype=torch.int64)
    else:
        counts = read_counts(path, vocab_size)
    return maps_of(most_frequent(counts, config.draft_vocab_size), vocab_size)


def check_vocabulary_given(config, given: Collection[str], d2t: Tensor | None, vocab_size: int) -> None:
    """Refuses files of another draft vocabulary than that of weights that were read.

    Args:
        config: as `read_vocabulary`; draft_vocab_size is that of the weights.
        given: names of keys. Files that others of the keys name were those of an earlier run.
        d2t: of the weights; None: they draft all tokens.

    Raises:
        UserError: names the first such key; or as `read_vocabulary`.
    """
    names = ("token_freq_path", "d2t_path", "t2d_path")
    files = [name for name in names if name in given and getattr(config, name)]
    if not files:
        return
    maps = read_vocabulary(dataclasses.replace(config, **{name: "" for name in names if name not in files}), vocab_size)
    if (maps is None) != (d2t is None) or (maps is not None and not torch.equal(maps[0], d2t)):
        raise UserError(
            f"speculator.{files[0]} = {getattr(config, files[0])!r}: another draft vocabulary than the speculator at speculator.path has; "
            "allowed: its own, or none"
        )


def read_counts(path: Path, vocab_size: int) -> Tensor:
    """int64 [vocab] of a token_freq.pt: such a tensor, or a dictionary token id -> count."""
    try:
        stored = torch.load(path.expanduser(), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"speculator.token_freq_path = {str(path)!r}: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"{path}: no file of torch.save with counts alone: {reason}") from None
    if isinstance(stored, dict) and all(type(token) is int and type(count) is int for token, count in stored.items()):
        outside = [token for token in stored if not 0 <= token < vocab_size]
        if outside:
            raise UserError(f"{path}: token {outside[0]}; allowed: 0 to {vocab_size - 1}: it was counted with another tokenizer")
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        counts[list(stored)] = torch.tensor(list(stored.values()), dtype=torch.int64)
        return _checked(counts, path)
    if not isinstance(stored, Tensor) or stored.dtype != torch.int64 or stored.dim() != 1:
        raise UserError(f"{path}: int64 counts of tokens are expected, or a dictionary token id -> count")
    if len(stored) != vocab_size:
        raise UserError(f"{path}: counts of {len(stored)} tokens; the base has {vocab_size}: it was counted with another tokenizer")
    return _checked(stored, path)


def _checked(counts: Tensor, path: Path) -> Tensor:
    if bool((counts < 0).any()):
        token = int((counts < 0).nonzero()[0])
        raise UserError(f"{path}: token {token} is counted {int(counts[token])} times; allowed: 0 and more")
    if not bool(counts.any()):
        raise UserError(f"{path}: no token is counted; allowed: counts of the tokens to be drafted (spectitan.prepare writes such a file)")
    return counts


def _read_maps(config, vocab_size: int) -> tuple[Tensor, Tensor] | None:
    d2t = _read_array("d2t_path", config.d2t_path, np.integer)
    t2d = _read_array("t2d_path", config.t2d_path, np.bool_)
    if len(t2d) != vocab_size:
        raise UserError(f"speculator.t2d_path = {config.t2d_path!r} is of {len(t2d)} tokens; the base has {vocab_size}")
    if config.draft_vocab_size not in (-1, len(d2t)):
        raise UserError(
            f"speculator.draft_vocab_size = {config.draft_vocab_size}; speculator.d2t_path = {config.d2t_path!r} holds {len(d2t)}: "
            "leave one of them out"
        )
    check_maps(d2t, t2d, f"{config.d2t_path}, {config.t2d_path}")
    config.draft_vocab_size = len(d2t)
    return None if len(d2t) == vocab_size else (d2t, t2d)


def _read_array(key: str, path: str, kind: type) -> Tensor:
    try:
        array = np.load(Path(path).expanduser(), allow_pickle=False)
    except OSError as error:
        raise UserError(f"speculator.{key} = {path!r}: {error.strerror or 'no .npy file'}") from None
    except ValueError as error:
        raise UserError(f"speculator.{key} = {path!r}: no .npy file of numbers: {str(error).splitlines()[0]}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, kind):
        shown = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"speculator.{key} = {path!r} is {shown}; allowed: one dimension of {'bool' if kind is np.bool_ else 'int64'}")
    return torch.from_numpy(array if kind is np.bool_ else array.astype(np.int64))


def write_maps(folder: Path, d2t: Tensor, t2d: Tensor) -> None:
    """d2t.npy and t2d.npy, as speculators reads them."""
    np.save(folder / "d2t.npy", d2t.cpu().numpy())
    np.save(folder / "t2d.npy", t2d.cpu().numpy())
