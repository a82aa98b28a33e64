import pytest

from spectitan.files import sync, write_whole


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
