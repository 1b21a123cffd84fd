"""Source files: where a table's path leads, whether it may, and whether the file is still the one
that was planned."""

import errno
import os
import stat
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from .files import Location
from .remote import Entry, Remote
from .stored import ImageRejected

_CALL_BYTES = 1 << 30
_CONNECTIONS = 16
"""Objects that a worker fetches at the same time."""
_AHEAD_BYTES = 256 << 20
"""Bytes of objects that a worker fetches ahead; a single larger one is fetched by itself."""


class Source(NamedTuple):
    """A file as it was found: its real path, bytes and time of last change."""

    path: str
    size: int
    mtime_ns: int


class Finding(NamedTuple):
    """What the plan notes of a file: bytes and time of last change, or why it cannot be taken."""

    size: int
    mtime_ns: int
    code: str | None = None
    detail: str | None = None


def open_root(images: Location) -> "Root | RemoteRoot":
    """Where the table's paths start from, on a disk or in an object store."""
    return RemoteRoot(images) if isinstance(images, Remote) else Root(images)


class Root:
    """The folder that a table's paths start from, and must not leave."""

    def __init__(self, folder: Path) -> None:
        self._real = os.path.realpath(folder)
        self._folders: dict[str, str | None] = {}

    def find(self, path: str) -> Source:
        """Look a path up without opening it.

        Raises:
            ImageRejected: it leaves the root, does not exist, or is no file.
        """
        full = self._place(path)
        try:
            found = os.lstat(full)
            if stat.S_ISLNK(found.st_mode):
                full = os.path.realpath(full)
                if not self._inside(full):
                    raise ImageRejected("path_escape", "a symbolic link out of the image folder")
                if not os.path.exists(full):  # noqa: PTH110 - a string, as all of them here
                    raise ImageRejected("missing_file", "a symbolic link to what is not there")
                found = os.lstat(full)
        except OSError as error:
            raise _rejection(error, path, full) from error
        if not stat.S_ISREG(found.st_mode):
            raise ImageRejected("not_a_file", "is no regular file")
        return Source(full, found.st_size, found.st_mtime_ns)

    def read(self, path: str, size: int, mtime_ns: int) -> bytes:
        """The content of a planned file.

        Raises:
            ImageRejected: it cannot be read, or is not what was planned.
        """
        full = self._place(path)
        try:
            descriptor = self._open(path, full)
            try:
                state = os.fstat(descriptor)
                if not stat.S_ISREG(state.st_mode):
                    raise ImageRejected("not_a_file", "is no regular file")
                data = _read_all(descriptor, size + 1)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _rejection(error, path, full) from error
        _check_unchanged((size, mtime_ns), (state.st_size, state.st_mtime_ns), data)
        return data

    def open(self, path: str) -> IO[bytes]:
        """A file to read a part of.

        Raises:
            ImageRejected: it leaves the root, does not exist, or cannot be opened.
        """
        full = self._place(path)
        try:
            return os.fdopen(self._open(path, full), "rb")
        except OSError as error:
            raise _rejection(error, path, full) from error

    def _open(self, path: str, full: str) -> int:
        """Open a file, or what a link inside the root leads to."""
        # What is no file, a pipe say, must not make the opening wait.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(full, flags)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        # A link there was put in between, after it was followed and looked at.
        return os.open(self.find(path).path, flags)

    def _place(self, path: str) -> str:
        """A table's path below the real path of its folder.

        Raises:
            ImageRejected: it leaves the root.
        """
        _check_path(path)
        folder, _, name = path.rpartition("/")
        real_folder = self._real_folder(folder)
        if real_folder is None:
            raise ImageRejected("path_escape", f"{folder!r} leads out of the image folder")
        return f"{real_folder}/{name}"

    def reads(self, sources: Sequence[Source]) -> Iterator[Callable[[], bytes]]:
        """For each planned file, what gives its content when called (see `read`)."""
        return (partial(self.read, *source) for source in sources)

    def _real_folder(self, folder: str) -> str | None:
        """The real path of a folder below the root, None where it lies outside."""
        if folder not in self._folders:
            real = os.path.realpath(os.path.join(self._real, folder))  # noqa: PTH118 - hot path
            self._folders[folder] = real if self._inside(real) else None
        return self._folders[folder]

    def _inside(self, real: str) -> bool:
        return real == self._real or real.startswith(self._real.rstrip("/") + "/")


class RemoteRoot:
    """The folder of an object store that a table's paths start from.

    Objects have no links, so a path cannot leave the root but by `..`, which is refused.
    """

    def __init__(self, folder: Remote) -> None:
        self._folder = folder
        self._entries: dict[str, dict[str, Entry]] = {}
        self._lock = threading.Lock()

    def find(self, path: str) -> Source:
        """Look a path up, in one listing for all files of a folder.

        Raises:
            ImageRejected: it leaves the root, does not exist, or is no file.
            OSError: the store does not answer.
        """
        _check_path(path)
        folder, _, name = path.rpartition("/")
        with self._lock:
            if folder not in self._entries:
                place = self._folder / folder if folder else self._folder
                self._entries[folder] = place.entries()
        entry = self._entries[folder].get(name)
        if entry is None:
            raise _missing(path, name, self._entries[folder].__contains__)
        if not entry.is_file:
            raise ImageRejected("not_a_file", "is a folder")
        return Source(path, entry.size, entry.modified_ns)

    def read(self, path: str, size: int, mtime_ns: int) -> bytes:
        """The content of a planned file.

        Raises:
            ImageRejected: it is gone, or is not what was planned.
            OSError: the store does not answer; a store that is down rejects no image.
        """
        _check_path(path)
        source = self._folder / path
        try:
            entry = source.stat()
            data = source.read_bytes()
        except FileNotFoundError as error:
            raise ImageRejected("missing_file", "no such object") from error
        _check_unchanged((size, mtime_ns), (entry.size, entry.modified_ns), data)
        return data

    def open(self, path: str) -> IO[bytes]:
        """A file to read a part of.

        Raises:
            ImageRejected: it leaves the root, or does not exist.
            OSError: the store does not answer.
        """
        _check_path(path)
        try:
            return (self._folder / path).open()
        except FileNotFoundError as error:
            raise ImageRejected("missing_file", "no such object") from error

    def reads(self, sources: Sequence[Source]) -> Iterator[Callable[[], bytes]]:
        """For each planned file, what gives its content when called (see `read`).

        Some are fetched ahead, because a store answers late but many at once.
        """
        ahead: deque[tuple[int, Future[bytes]]] = deque()
        held = 0
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fino-fetch") as pool:
            for source in sources:
                while ahead and (
                    len(ahead) == 2 * _CONNECTIONS or held + source.size > _AHEAD_BYTES
                ):
                    held -= ahead[0][0]
                    yield ahead.popleft()[1].result
                held += source.size
                ahead.append((source.size, pool.submit(self.read, *source)))
            while ahead:
                yield ahead.popleft()[1].result


def _read_all(descriptor: int, size: int) -> bytes:
    """The first `size` bytes of a file, or as many as it has; a single call gives 2 GiB at most."""
    data = os.read(descriptor, min(size, _CALL_BYTES))
    if len(data) < _CALL_BYTES:
        return data
    parts = [data]
    while len(parts[-1]) == _CALL_BYTES:
        parts.append(os.read(descriptor, _CALL_BYTES))
    return b"".join(parts)


def _check_path(path: str) -> None:
    """Refuse what names no file below the image folder.

    Raises:
        ImageRejected: an absolute path, `..`, or a NUL character.
    """
    if "\0" in path:
        raise ImageRejected("missing_file", "the path holds a NUL character")
    if path.startswith("/") or (".." in path and ".." in path.split("/")):
        raise ImageRejected("path_escape", "only paths below the image folder are taken")


def _check_unchanged(planned: tuple[int, int], found: tuple[int, int], data: bytes) -> None:
    """Compare size and time of change with what was planned.

    Raises:
        ImageRejected: they differ.
    """
    if found != planned or len(data) != planned[0]:
        raise ImageRejected(
            "source_changed",
            f"planned with {planned[0]} bytes, now {len(data)} bytes or another time of change",
        )


def _rejection(error: OSError, path: str, full: str) -> ImageRejected:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return ImageRejected("unreadable", f"{error.strerror}")
    folder, _, name = full.rpartition("/")
    return _missing(path, name, lambda other: os.path.lexists(f"{folder}/{other}"))


def _missing(path: str, name: str, is_there: Callable[[str], bool]) -> ImageRejected:
    """Say what is wrong with a path that leads to no file."""
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if other != name and is_there(other):
            return ImageRejected(
                "missing_file", f"no such file, but one whose name is the {form} form of {path!r}"
            )
    return ImageRejected("missing_file", "no such file")
