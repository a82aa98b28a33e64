"""Folders that Hugging Face's `datasets` saved (save_to_disk): which of their files are the data.

A Dataset is a folder with state.json, whose `_data_files` are its shards, of Arrow's stream format; other Arrow files beside them are
caches, or left from an earlier save. A DatasetDict is a folder of Datasets, named by `splits` in its dataset_dict.json.
"""

import json
from pathlib import Path

from spectitan.errors import UserError

_STATE, _DICT = FILES = ("state.json", "dataset_dict.json")


def without_leftovers(folder: Path, names: list[str], readable: list[str]) -> list[str]:
    """The readable files of a folder; of a saved Dataset, only those that are its data.

    Args:
        names: of all the folder's files.

    Raises:
        UserError: a file is missing; rows that are not simply the files' rows; a DatasetDict of several splits: train and test
            would be one text.
    """
    if _DICT in names:
        splits = _read(folder / _DICT).get("splits")
        if isinstance(splits, list) and len(splits) > 1:
            known = ", ".join(map(str, splits))
            raise UserError(f"{folder}: a saved DatasetDict of the splits {known}; allowed: one split's folder, or splits in data.datasets")
    shards = _shards(folder) if _STATE in names else None
    return readable if shards is None else [file for file in readable if not file.endswith(".arrow") or file in shards]


def _shards(folder: Path) -> list[str] | None:
    """Names of the files that are a saved Dataset's data; None for a folder that is none."""
    state = _read(folder / _STATE)
    if not isinstance(state.get("_data_files"), list):
        return None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder / _STATE}: its rows are chosen by a file of indices, as datasets before 1.16 wrote them; save it again")
    names = [str(entry.get("filename")) for entry in state["_data_files"] if isinstance(entry, dict)]
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing:
        raise UserError(f"{folder / missing}: no such file, but {_STATE} names it: the dataset is not whole")
    return names


def _read(path: Path) -> dict:
    """{} if the file holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
