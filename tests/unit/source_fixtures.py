"""Data files as other programs write them: fms-fsdp's shards, what `datasets` saves, packed JSON lines."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa

try:
    from compression import zstd
except ImportError:  # before Python 3.14
    from backports import zstd


def write_fms_shard(path: Path, documents: list[list[int]]) -> Path:
    """As fms-fsdp's own tests make them: the file format, a record batch a document, the column `tokens` of plain uint32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field("tokens", pa.uint32())])
    with pa.ipc.new_file(str(path), schema) as writer:
        for ids in documents:
            writer.write(pa.record_batch([pa.array(ids, pa.uint32())], schema=schema))
    return path


def write_stream(path: Path, columns: dict[str, pa.Array], rows_a_batch: int = 3) -> Path:
    """Arrow's stream format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return path


def save_to_disk(folder: Path, shards: list[dict[str, pa.Array]]) -> Path:
    """The layout of datasets.Dataset.save_to_disk, written from its source: shards of the stream format, state.json, dataset_info.json."""
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, columns in zip(names, shards):
        write_stream(folder / name, columns)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0" * 16, "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": "torch", "_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    features = {name: {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"} for name in shards[0]}
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": features}, indent=2))
    return folder


def save_splits(folder: Path, splits: dict[str, dict[str, pa.Array]]) -> Path:
    """The layout of datasets.DatasetDict.save_to_disk."""
    for name, columns in splits.items():
        save_to_disk(folder / name, [columns])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def packed(content: bytes, suffix: str) -> bytes:
    """In two members (gzip) or frames (Zstandard), as programs that append write them."""
    half = len(content) // 2
    if suffix == ".gz":
        parts = io.BytesIO()
        for part in (content[:half], content[half:]):
            with gzip.GzipFile(fileobj=parts, mode="wb") as file:
                file.write(part)
        return parts.getvalue()
    return zstd.compress(content[:half]) + zstd.compress(content[half:])


def hub_snapshot(cache: Path, kind: str, name: str, files: dict[str, bytes]) -> Path:
    """A snapshot in the cache of huggingface_hub: blobs, and links to them by the name of a commit."""
    repository, commit = cache / f"{kind}s--{name.replace('/', '--')}", "5" * 40
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir(exist_ok=True)
    for number, (file, content) in enumerate(files.items()):
        blob, link = repository / "blobs" / f"{number:040x}", repository / "snapshots" / commit / file
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return repository / "snapshots" / commit
