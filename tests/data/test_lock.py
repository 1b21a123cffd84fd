"""File locks where they fail; `test_faults.py` and `test_remote.py` hold rivals off with them."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from fino_fast.data.lock import locked
from fino_fast.errors import DataError


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = tmp_path / "ingest.lock"
    with (
        pytest.raises(DataError, match=rf"{lock}: cannot be locked: No locks available; use a"),
        locked(lock, "another ingest"),
    ):
        pytest.fail("went on without a lock")


def test_a_lock_whose_file_its_holder_removes_is_taken_on_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes away between its opening and its lock."""
    lock = tmp_path / "train.lock"
    flock, calls = fcntl.flock, []

    def after_removal(file: Any, operation: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    with locked(lock, "another training"):
        assert len(calls) == 2
        assert lock.is_file()
        with (
            pytest.raises(DataError, match="another training is writing there"),
            locked(lock, "another training"),
        ):
            pytest.fail("two hold one lock")
