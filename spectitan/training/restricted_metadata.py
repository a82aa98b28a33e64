"""Reads torch.distributed.checkpoint folders without running what they say.

DCP's `.metadata` is a plain pickle, which may name any function of any module, and its byte entries are pickles again. Here
only the record types that describe tensors can be made from it, every entry must be a tensor, and every size and file name
is checked against what lies in the folder before anything is allocated or opened.
"""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from spectitan.errors import UserError
from spectitan.files import is_remote

_ALLOWED = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorStorageMetadata,
        TensorProperties,
        ChunkStorageMetadata,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
}
_ALLOWED["torch.serialization", "_get_layout"] = torch.serialization._get_layout  # a look-up in a table of layouts


class _TensorRecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a description of tensors")


def remote_file_system():
    """torch.distributed.checkpoint's access to what fsspec knows."""
    from torch.distributed.checkpoint._fsspec_filesystem import FileSystem  # needs the package fsspec

    return FileSystem()


class RestrictedReader(FileSystemReader):
    """A FileSystemReader of tensors only. `read_metadata` raises UserError, naming the file, if it is anything else.

    Args:
        folder: as files.to_path gives it.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self._folder = folder
        if is_remote(folder):
            self.fs = remote_file_system()
            self.path = self.fs.init_path(str(folder))

    def read_metadata(self, *args, **kwargs) -> Metadata:
        path = self._folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _TensorRecordUnpickler(file).load()
            _check(metadata, {entry.name: entry.stat().st_size for entry in self._folder.iterdir() if entry.is_file()})
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # a pickle stream can fail in any way
            raise UserError(f"{path}: not the metadata of a checkpoint of tensors: {error}") from error
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _check(metadata: Metadata, file_sizes: dict[str, int]) -> None:
    """Raises ValueError (or what a wrong type happens to raise) unless the records fit together and fit the files."""
    total = 0
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"entry {name!r} is not a tensor")
        if min((0, *entry.size, *(number for chunk in entry.chunks for number in (*chunk.offsets, *chunk.sizes)))) < 0:
            raise ValueError(f"{name}: negative size")
        for chunk in entry.chunks:
            fits = len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
            if not fits or any(offset + size > full for offset, size, full in zip(chunk.offsets, chunk.sizes, entry.size)):
                raise ValueError(f"{name}: a part lies outside of its shape {tuple(entry.size)}")
        if sum(_numel(chunk.sizes) for chunk in entry.chunks) != _numel(entry.size):
            raise ValueError(f"{name}: its parts do not make up its shape {tuple(entry.size)}")
        total += _numel(entry.size) * entry.properties.dtype.itemsize
    if total > sum(file_sizes.values()):
        raise ValueError(f"it describes {total} bytes of tensors, the folder holds {sum(file_sizes.values())}")
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or info.relative_path not in file_sizes:
            raise ValueError(f"file {info.relative_path!r} is not in the folder")
        if info.offset < 0 or info.length < 0 or info.offset + info.length > file_sizes[info.relative_path]:
            raise ValueError(f"{index.fqn}: bytes outside of file {info.relative_path}")
        if info.transform_descriptors:
            raise ValueError(f"{index.fqn}: stored in a form that spectitan never writes")


def _numel(size) -> int:
    count = 1
    for number in size:  # Python's integers do not overflow
        count *= number
    return count
