import hashlib
import os
from pathlib import Path

import pytest

from phase4_bitnet.durable_folder import recover, remove_folder, sweep, write_file, write_folder


def content(text: str):
    return lambda folder: write_file(folder / "file", [text.encode()])


def test_a_file_is_written_in_pieces_and_its_hash_is_of_the_whole(tmp_path: Path) -> None:
    found = write_file(tmp_path / "a", [b"one", memoryview(b"two"), b""])
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert found == {"bytes": 6, "sha256": hashlib.sha256(b"onetwo").hexdigest()}


def test_a_write_that_takes_only_a_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Slow(io.FileIO):
        def write(self, data) -> int:
            return super().write(bytes(data)[:2])

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Slow(path, "w"))
    write_file(tmp_path / "a", [b"abcdefg"])
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"abcdefg"


def test_made_replaced_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    for text in ("first", "second"):
        write_folder(folder, content(text))
        assert (folder / "file").read_text() == text
        assert [p.name for p in folder.parent.iterdir()] == ["a"]
    remove_folder(folder)
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    write_folder(tmp_path / "a", content("old"))
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "a", content("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "old"


def test_a_reader_that_recovers_in_between_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a", content("old"))
    rename, calls = os.rename, []

    def with_a_reader(source: Path, target: Path) -> None:
        calls.append(source)
        rename(source, target)
        if len(calls) == 1:
            recover(tmp_path, "a")

    monkeypatch.setattr(os, "rename", with_a_reader)
    write_folder(tmp_path / "a", content("new"))
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_killed_processes_left(tmp_path: Path) -> None:
    for name in (".a.1.new.tmp", ".a.1.old.tmp", ".b.2.old.tmp", ".b.3.gone.tmp", "b", ".c.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sweep(tmp_path, "a")
    left = {".b.2.old.tmp", ".b.3.gone.tmp", "b", ".c.old.tmp"}
    assert {p.name for p in tmp_path.iterdir()} == {"a", *left}
    assert (tmp_path / "a" / "file").read_text() == ".a.1.old.tmp"
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", ".c.old.tmp"}
    assert (tmp_path / "b" / "file").read_text() == "b"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".a.1.new.tmp").symlink_to(tmp_path / "elsewhere")
    sweep(tmp_path)
    assert (tmp_path / "elsewhere").is_dir()
