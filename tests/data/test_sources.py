"""What a worker fetches ahead from a store."""

import threading

import pytest

from fino_fast.data import sources
from fino_fast.data.remote import Remote
from fino_fast.data.sources import RemoteRoot

FILES = {f"{i:02d}.png": bytes([i]) * (40 + i) for i in range(12)}


@pytest.fixture
def root() -> RemoteRoot:
    folder = Remote("memory://ahead")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return RemoteRoot(folder)


@pytest.mark.parametrize("room", [1, 100, 1 << 20])
def test_bytes_fetched_ahead_are_bounded_and_all_come_in_order(
    root: RemoteRoot, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """An object that is larger than the room comes by itself; where there is room for all, all are
    fetched at the same time.
    """
    asked: list[int] = []
    lock, read = threading.Lock(), root.read
    together = threading.Barrier(len(FILES) if room == 1 << 20 else 1)

    def counted(path: str, size: int, mtime_ns: int) -> bytes:
        with lock:
            asked.append(size)
        together.wait(30)
        return read(path, size, mtime_ns)

    monkeypatch.setattr(root, "read", counted)
    monkeypatch.setattr(sources, "_AHEAD_BYTES", room)
    given, ahead = [], []
    for fetch in root.reads([root.find(name) for name in FILES]):
        given.append(fetch())
        ahead.append(sum(asked) - sum(map(len, given[:-1])))
    assert given == list(FILES.values())
    assert max(ahead) <= max(room, 51)
