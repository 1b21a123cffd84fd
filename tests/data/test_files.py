"""Files that are whole or absent: where a folder or disk does not take them, the error says so."""

import os
import sys
from pathlib import Path
from typing import IO

import pytest

from fino_fast.data.files import committed, committed_folder, make_folder
from fino_fast.errors import DataError, DiskFullError

from .mounts import in_own_mounts

# In mounts of its own, where root may not write to "$1" either.
READ_ONLY = """
mount -t tmpfs none "$1" && mount -o remount,ro "$1" || exit 77
exec "$2" -c "$3" "$1"
"""
COMMIT = """
import pathlib, sys
from fino_fast.data.files import committed
with committed(pathlib.Path(sys.argv[1], "report.md")) as file:
    file.write(b"text")
"""


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    done = in_own_mounts(READ_ONLY, str(tmp_path), sys.executable, COMMIT)
    assert done.stderr.splitlines()[-1] == (
        f"fino_fast.errors.DataError: {tmp_path}/report.md: cannot be written: "
        "Read-only file system"
    )


def replaced_by(device: str, flags: int, file: IO[bytes]) -> None:
    """Let an open file's descriptor lead to a device."""
    other = os.open(device, flags)
    os.dup2(other, file.fileno())
    os.close(other)


def test_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut cannot be made here: what the system is asked for, and in which order, can be
    seen."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor: int) -> None:
        synced = Path(f"/proc/self/fd/{descriptor}").resolve()
        size = synced.stat().st_size if synced.is_file() else 0
        calls.append(f"fsync of {'the folder' if synced == tmp_path.resolve() else size}")
        fsync(descriptor)

    def seen_replace(path: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    with committed(tmp_path / "shard.tar") as file:
        file.write(b"text")
    assert calls == ["fsync of 4", "rename", "fsync of the folder"]


def test_a_disk_that_fails_in_the_middle_is_named(tmp_path: Path) -> None:
    """The file turns read-only under it: an error of the system's that is no full disk."""
    path = tmp_path / "shard.tar"
    path.write_bytes(b"the former")

    def write() -> None:
        with committed(path) as file:
            file.write(b"half")
            replaced_by("/dev/null", os.O_RDONLY, file)

    with pytest.raises(DataError, match=r"shard\.tar: cannot be written: Bad file descriptor"):
        write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard.tar"]
    assert path.read_bytes() == b"the former"


def test_a_full_disk_leaves_no_draft(tmp_path: Path) -> None:
    def write() -> None:
        with committed(tmp_path / "shard.tar") as file:
            replaced_by("/dev/full", os.O_WRONLY, file)
            file.write(b"text")

    with pytest.raises(DiskFullError, match=r"shard\.tar: no room left .*No space left"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_came_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "report"

    def write() -> None:
        with committed_folder(folder) as draft:
            (draft / "ours.md").write_text("ours")
            folder.mkdir()
            (folder / "theirs.md").write_text("theirs")

    with pytest.raises(DataError, match=r"report: cannot be made: Directory not empty"):
        write()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "report",
        "report/theirs.md",
    ]


def test_new_folders_are_on_the_disk_and_old_ones_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def seen_fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    root = tmp_path.resolve()
    make_folder(tmp_path / "a" / "b")
    assert sorted(synced) == [root, root / "a"]
    synced.clear()
    make_folder(tmp_path / "a" / "b")
    assert synced == []
