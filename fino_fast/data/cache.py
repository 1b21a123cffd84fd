"""Reading a sealed set that lies in an object store: what was fetched stays on this machine.

The small files of the set are fetched when it is opened. A shard is read by ranges until a thread
in the background has fetched it whole, as long as the cache has room; so the first batch does not
wait for whole shards, and a set larger than the cache still loads. Whatever is in the cache had the
SHA-256 that the manifest names and was renamed into place, so all processes of a machine share it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from fino_fast.errors import ConfigError, DataError

from .files import FULL, TEMPORARY
from .manifest import SealedFile, SealedShard
from .remote import Remote

log = logging.getLogger(__name__)

FOLDER = "FINO_CACHE"
"""Environment variable: the cache's folder; ~/.cache/fino-fast when not set."""
LIMIT = "FINO_CACHE_GB"
"""Environment variable: how many GB (10⁹ bytes) the cache may hold; 100 when not set."""

_CHUNK = 8 << 20
_FETCHERS = 2


def cache_folder() -> Path:
    """Where fetched files are kept."""
    default = Path.home() / ".cache" / "fino-fast"
    return Path(os.environ.get(FOLDER) or default)


def cache_limit() -> int:
    """Bytes that the cache may hold.

    Raises:
        ConfigError: the environment variable is no number.
    """
    text = os.environ.get(LIMIT) or "100"
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise ConfigError(f"{LIMIT}: {text!r} is no number of GB")
    return int(limit * 10**9)


def _made(folder: Path) -> Path:
    """A folder of the cache, made where it is not there.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}; set {FOLDER}") from error
    return folder


def fetch_small_files(source: Remote, files: Sequence[SealedFile], manifest_hash: str) -> Path:
    """The folder of this machine's cache that holds `files` of a sealed set, under their names.

    Raises:
        DataError: a file cannot be fetched, or is not the one that was sealed.
    """
    folder = _made(cache_folder() / manifest_hash)
    for sealed in files:
        target = folder / sealed.name
        if target.is_file():
            continue
        # Others fetch it too, on other machines where the cache lies on a network.
        writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        draft = folder / f"{TEMPORARY}{sealed.name}.{writer}"
        try:
            file = draft.open("wb")
            _fetch(source / sealed.name, file, target, sealed.sha256, contextlib.nullcontext())
        except OSError as error:
            raise DataError(
                f"{source / sealed.name}: cannot be fetched: {error.strerror}"
            ) from error
    return folder


def check_shard_sizes(source: Remote, shards: Sequence[SealedShard]) -> None:
    """Compare the sizes of all shards with the manifest, by one listing.

    Raises:
        DataError: a shard is missing or has another size; the message names it.
    """
    try:
        found = source.entries()
    except OSError as error:
        raise DataError(f"{source}: cannot be listed: {error.strerror}") from error
    for shard in shards:
        name = f"{shard.name}.tar"
        if name not in found:
            raise DataError(f"shard {source / name}: is not there")
        if found[name].size != shard.bytes:
            raise DataError(
                f"shard {source / name}: has {found[name].size} bytes, {shard.bytes} were sealed: "
                "it was cut or replaced"
            )


class RemoteShards:
    """The shards of a set in an object store, read through this machine's cache."""

    def __init__(self, source: Remote, shards: Sequence[SealedShard]) -> None:
        self._source = source
        self._shards = shards
        self._folder = _made(cache_folder() / "shards")
        self._limit = cache_limit()
        self._lock = threading.Lock()
        self._asked: set[int] = set()
        self._faults: dict[int, DataError] = {}
        self._queue: SimpleQueue[int] = SimpleQueue()
        self._full = threading.Event()

    def __reduce__(self) -> tuple[type["RemoteShards"], tuple[Remote, Sequence[SealedShard]]]:
        """Another process has threads of its own."""
        return type(self), (self._source, self._shards)

    def local(self, number: int) -> Path | None:
        """The shard's file in the cache, once it is there; asking for it starts the fetching.

        Raises:
            DataError: the shard in the store is not the one that was sealed.
        """
        path = self._path(number)
        if path.is_file():
            return path
        if number in self._faults:
            raise self._faults[number]
        with self._lock:
            if number not in self._asked and not self._full.is_set():
                if not self._asked:
                    for _ in range(_FETCHERS):
                        # Daemons: what is not fetched when a command ends is not waited for.
                        threading.Thread(target=self._work, name="fino-fetch", daemon=True).start()
                self._asked.add(number)
                self._queue.put(number)
        return None

    def read_at(self, number: int, offset: int, size: int) -> bytes:
        """A part of a shard that is not in the cache.

        Raises:
            OSError: it cannot be read.
        """
        return (self._source / f"{self._shards[number].name}.tar").read_at(offset, size)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._shards[number].sha256}.tar"

    def _work(self) -> None:
        while not self._full.is_set():
            number = self._queue.get()
            try:
                self._fetch(number)
            except DataError as error:
                self._faults[number] = error
            except OSError as error:
                if error.errno in FULL:
                    self._has_no_room(number)
                else:
                    log.warning("shard %s: %s", self._shards[number].name, error.strerror)

    def _fetch(self, number: int) -> None:
        """Fetch a shard, unless another process has done so, or is about to."""
        shard, path = self._shards[number], self._path(number)
        draft = self._folder / f"{TEMPORARY}{path.name}"
        with _guarded(self._folder):
            if path.is_file() or draft.exists():
                return
            held = sum(map(_size, self._folder.iterdir()))
            if held + shard.bytes > self._limit:
                self._has_no_room(number)
                return
            file = draft.open("wb")
            fcntl.flock(file, fcntl.LOCK_EX)  # it is in use, and no leftover
            os.truncate(file.fileno(), shard.bytes)  # what is to come counts as held
        source = self._source / f"{shard.name}.tar"
        # Renamed under guard: whoever adds up what is held finds it under one name or the other.
        _fetch(source, file, path, shard.sha256, _guarded(self._folder))

    def _has_no_room(self, number: int) -> None:
        log.warning(
            "%s has no room for shard %s: it and those after it are read in parts, which is "
            "slower; see %s",
            self._folder,
            self._shards[number].name,
            LIMIT,
        )
        self._full.set()


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Look at the cache, and reserve room in it, while no other process does; tidy it up first."""
    with (folder / ".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for draft in folder.glob(f"{TEMPORARY}*"):
            # In use, or given up just now.
            with contextlib.suppress(BlockingIOError, FileNotFoundError), draft.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()  # its writer is gone
        yield


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # a fetch that was given up just now
        return 0


def _fetch(
    source: Remote,
    draft: IO[bytes],
    target: Path,
    sha256: str,
    renaming: contextlib.AbstractContextManager[None],
) -> None:
    """Fill the open file `draft` from the store and give it the name `target`, inside `renaming`.

    Raises:
        DataError: the object has other bytes than were sealed.
        OSError: it cannot be read, or not be written.
    """
    digest = hashlib.sha256()
    try:
        with draft, source.open() as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                draft.write(chunk)
            draft.flush()
            os.fsync(draft.fileno())
            if digest.hexdigest() != sha256:
                raise DataError(f"{source}: is not the file that was sealed (its SHA-256 differs)")
            with renaming:
                Path(draft.name).rename(target)
    except BaseException:
        Path(draft.name).unlink(missing_ok=True)
        raise
