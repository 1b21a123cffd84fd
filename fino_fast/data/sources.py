"""Source files: where a table's path leads, whether it may, and whether the file is still the one
that was planned."""

import errno
import os
import stat
import unicodedata
from pathlib import Path
from typing import NamedTuple

from .stored import ImageRejected


class Source(NamedTuple):
    """A file as it was found: its real path, bytes and time of last change."""

    path: str
    size: int
    mtime_ns: int


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
        if "\0" in path:
            raise ImageRejected("missing_file", "the path holds a NUL character")
        if path.startswith("/") or (".." in path and ".." in path.split("/")):
            raise ImageRejected("path_escape", "only paths below the image folder are taken")
        folder, _, name = path.rpartition("/")
        real_folder = self._real_folder(folder)
        if real_folder is None:
            raise ImageRejected("path_escape", f"{folder!r} leads out of the image folder")
        full = f"{real_folder}/{name}"
        try:
            found = os.lstat(full)
            if stat.S_ISLNK(found.st_mode):
                full = os.path.realpath(full)
                if not self._inside(full):
                    raise ImageRejected("path_escape", "a symbolic link out of the image folder")
                found = os.lstat(full)
        except OSError as error:
            raise _rejection(error, path, real_folder, name) from error
        if not stat.S_ISREG(found.st_mode):
            raise ImageRejected("not_a_file", "is no regular file")
        return Source(full, found.st_size, found.st_mtime_ns)

    def read(self, path: str, size: int, mtime_ns: int) -> bytes:
        """The content of a planned file.

        Raises:
            ImageRejected: it cannot be read, or is not what was planned.
        """
        source = self.find(path)
        try:
            # The path was resolved above: a link here was put in between.
            descriptor = os.open(source.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                state = os.fstat(descriptor)
                data = file.readall()
        except OSError as error:
            raise _rejection(error, path, "", "") from error
        if (state.st_size, state.st_mtime_ns) != (size, mtime_ns) or len(data) != size:
            raise ImageRejected(
                "source_changed",
                f"planned with {size} bytes, now {len(data)} bytes or another time of change",
            )
        return data

    def _real_folder(self, folder: str) -> str | None:
        """The real path of a folder below the root, None where it lies outside."""
        if folder not in self._folders:
            real = os.path.realpath(os.path.join(self._real, folder))  # noqa: PTH118 - hot path
            self._folders[folder] = real if self._inside(real) else None
        return self._folders[folder]

    def _inside(self, real: str) -> bool:
        return real == self._real or real.startswith(self._real.rstrip("/") + "/")


def _rejection(error: OSError, path: str, folder: str, name: str) -> ImageRejected:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return ImageRejected("unreadable", f"{error.strerror}")
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if other != name and os.path.lexists(f"{folder}/{other}"):
            return ImageRejected(
                "missing_file", f"no such file, but one whose name is the {form} form of {path!r}"
            )
    return ImageRejected("missing_file", "no such file")
