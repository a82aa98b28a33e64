import contextlib
import errno
import itertools
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectitan.files import naming, replace_folder, sync, write_whole


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_with_the_name_of_what_is_written(tmp_path):
    with (tmp_path / "part").open("wb", buffering=0) as file, pytest.raises(OSError) as caught, naming(tmp_path / "whole"):
        with full_disk(10):
            file.write(b"x" * 10)
            file.write(b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "whole"))
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "whole"):
        (tmp_path / "other").open()
    assert caught.value.filename == str(tmp_path / "other")


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "größe.txt"
    write_whole(path, "old")
    with path.open() as reader:
        write_whole(path, "näu\n")
        assert reader.read() == "old"
    assert path.read_bytes() == "näu\n".encode() and list(tmp_path.iterdir()) == [path]
    sync(path)
    sync(tmp_path)


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "folder", "text")
    assert caught.value.filename == str(tmp_path / "folder") and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "no" / "file", "text")
    assert caught.value.filename == str(tmp_path / "no" / "file")
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def write_folder(folder, content, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text(content)
    return folder


def test_a_folder_that_is_new_or_replaced_wherever_it_is_stopped(tmp_path, monkeypatch):
    """config.json is new only if all else is, and weights of another format are gone by then."""
    stale, calls = ("a*.bin", "z.index"), []

    def until(original, last):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) > last:
                raise InterruptedError
            return original(*args, **kwargs)

        return call

    for stop in itertools.count():
        path = write_folder(tmp_path / f"path{stop}", "old", "config.json", "a1.bin", "a2.bin", "z.index", "card.md")
        temporary, stopped = write_folder(tmp_path / f"temporary{stop}", "new", "a1.bin", "config.json", "z.txt"), False
        with monkeypatch.context() as patched:
            calls.clear()
            for name in ("replace", "unlink"):
                patched.setattr(Path, name, until(getattr(Path, name), stop))
            try:
                replace_folder(temporary, path, stale)
            except InterruptedError:
                stopped = True
        assert (path / "config.json").read_text() == ("old" if stopped else "new")
        if not stopped:
            break
    assert stop == 5  # two other files, two stale ones, config.json
    assert {file.name: file.read_text() for file in path.iterdir()} == {
        "a1.bin": "new",
        "card.md": "old",
        "config.json": "new",
        "z.txt": "new",
    }

    new = write_folder(tmp_path / "temporary", "new", "config.json", "a1.bin")
    replace_folder(new, tmp_path / "path", stale)
    assert not new.exists() and {file.name for file in (tmp_path / "path").iterdir()} == {"config.json", "a1.bin"}
