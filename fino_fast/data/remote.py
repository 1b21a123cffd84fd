"""Object stores: what lies behind an fsspec URL, with the few methods of a path that are needed.

Whatever a store's client raises arrives as an `OSError` whose `strerror` says why, so that callers
handle a path and a URL alike.
"""

import contextlib
import errno
import hashlib
import io
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from fino_fast.errors import ConfigError, FinoError, MissingExtraError

_BUFFER = 4 << 20
_MD5 = re.compile(r"[0-9a-f]{32}")
# Under what name stores tell when an object was last written.
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")


class Entry(NamedTuple):
    """What a store says about an object."""

    size: int
    modified_ns: int
    """Time of the last change as the store tells it, 0 where it does not."""
    is_file: bool


class Remote:
    """An object or a folder of objects, such as `Remote("s3://bucket/shards")`.

    Credentials, endpoints and other options are those that fsspec and the store's driver find in
    the environment and in fsspec's configuration.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def check_driver(self) -> None:
        """Load what reads this kind of URL; nothing is asked of the store.

        Raises:
            MissingExtraError: the driver is not installed.
            ConfigError: there is no such kind of URL.
        """
        self._place()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            return self.stat().is_file
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there are objects below this URL."""
        with self._asking() as (store, path):
            return bool(store.isdir(path))

    def stat(self) -> Entry:
        """Size and time of the object.

        Raises:
            OSError: there is none, or the store does not answer.
        """
        with self._asking() as (store, path):
            return _entry(store.info(path))

    def entries(self) -> dict[str, Entry]:
        """What lies directly in this folder, by name; {} where there is nothing.

        Raises:
            OSError: the store does not answer.
        """
        try:
            with self._asking() as (store, path):
                found = store.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return {each["name"].rstrip("/").rpartition("/")[2]: _entry(each) for each in found}

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            OSError: it cannot be read.
        """
        with self._asking() as (store, path):
            return bytes(store.cat_file(path))

    def read_at(self, offset: int, size: int) -> bytes:
        """A part of the object, shorter where it ends.

        Raises:
            OSError: it cannot be read.
        """
        with self._asking() as (store, path):
            return bytes(store.cat_file(path, start=offset, end=offset + size))

    def open(self) -> IO[bytes]:
        """The object as a file to read, in requests of some MiB.

        Raises:
            OSError: there is none, or the store does not answer.
        """
        return io.BufferedReader(_RawReader(self, self.stat().size), _BUFFER)

    def upload(self, source: Path) -> None:
        """Put a local file here, whole or not at all, and check what arrived.

        The size is always compared. Where the store tells the MD5 of what it holds, that is
        compared too; a digest that is not the content's MD5 (encrypted objects have such) is
        resolved by reading the object back.

        Raises:
            OSError: it was not stored, or not as it was sent.
        """
        with self._asking() as (store, path):
            store.put_file(str(source), path)
            found = store.info(path)
        size = source.stat().st_size
        if found["size"] != size:
            raise OSError(errno.EIO, f"{found['size']} of {size} bytes were stored", self.url)
        told = str(found.get("ETag", "")).strip('"')
        if not _MD5.fullmatch(told):
            return
        with source.open("rb") as file:
            if hashlib.file_digest(file, _md5).hexdigest() == told:
                return
            file.seek(0)
            sent = hashlib.file_digest(file, "sha256").digest()
        with self.open() as stored:
            if hashlib.file_digest(stored, "sha256").digest() != sent:  # type: ignore[arg-type]
                raise OSError(errno.EIO, "other bytes were stored than were sent", self.url)

    def create(self, data: bytes) -> None:
        """Write a small object that must not exist yet.

        Raises:
            FileExistsError: it does.
            OSError: it cannot be written, or the store knows no such request.
        """
        with self._asking() as (store, path):
            store.pipe_file(path, data, mode="create")

    def write_bytes(self, data: bytes) -> None:
        """Write a small object, over an old one if there is one."""
        with self._asking() as (store, path):
            store.pipe_file(path, data)

    def unlink(self) -> None:
        """Remove the object, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._asking() as (store, path):
            store.rm_file(path)

    def _place(self) -> tuple[Any, str]:
        """The store and this object's path in it."""
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingExtraError("fsspec", "remote") from error
        try:
            # A listing kept from before would hide what other processes have written since.
            store, path = url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            if self.url.startswith(("s3:", "s3a:")):
                raise MissingExtraError("s3fs", "remote") from error
            raise ConfigError(f"{self.url}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}") from error
        return store, path

    @contextlib.contextmanager
    def _asking(self) -> Iterator[tuple[Any, str]]:
        """Make every failure of a store an OSError that says why."""
        try:
            yield self._place()
        except FinoError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, f"not there ({error})", self.url) from error
        except FileExistsError as error:
            raise FileExistsError(errno.EEXIST, "exists already", self.url) from error
        except PermissionError as error:
            raise PermissionError(errno.EACCES, f"access denied ({error})", self.url) from error
        except Exception as error:  # no common base: botocore's, aiohttp's, google's, …
            why = f"{type(error).__name__}: {error}"
            raise OSError(errno.EIO, why, self.url) from error


def _md5() -> "hashlib._Hash":
    return hashlib.md5(usedforsecurity=False)


def _entry(info: dict[str, Any]) -> Entry:
    told = next((info[key] for key in _TIMES if info.get(key) is not None), 0)
    if isinstance(told, str):
        told = datetime.fromisoformat(told)
    seconds = told.timestamp() if isinstance(told, datetime) else float(told)
    # Whole seconds: stores tell more in a listing than they do of a single object.
    return Entry(int(info["size"] or 0), int(seconds) * 10**9, info["type"] == "file")


class _RawReader(io.RawIOBase):
    """Positions and reads, for `io.BufferedReader`."""

    def __init__(self, remote: Remote, size: int) -> None:
        self.name = remote.url  # files have one, which pydicom wants
        self._remote = remote
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._remote.read_at(self._position, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
