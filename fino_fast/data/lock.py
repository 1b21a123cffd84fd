"""One writer at a time: a file lock on a disk, a lease in an object store.

The system drops a file lock with its process. An object store has no locks; there a small object,
created on the condition that there is none, is renewed by its holder every few seconds. Whoever
wants it watches: an object that changes has a living holder, one that stays as it is for `LEASE`
seconds belongs to a dead one and is removed. No clocks are compared.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fino_fast.errors import DataError

from .files import Location, canonical_json
from .remote import Remote

log = logging.getLogger(__name__)

RENEWAL = 10.0
"""Seconds between two renewals of a lease."""
LEASE = 60.0
"""Seconds without a renewal after which a lease counts as left behind."""


@contextlib.contextmanager
def locked(lock: Location, what: str, wait: bool = False) -> Iterator[None]:
    """Hold `lock` for as long as the block lasts.

    Args:
        lock: a file or object that stands for what is locked; it stays behind as a file.
        what: who else may hold it, for the message: "another ingest".
        wait: wait for it instead of refusing.

    Raises:
        DataError: somebody else holds it, or the file system or store cannot keep it.
    """
    if isinstance(lock, Path):
        with _file_locked(lock, what, wait):
            yield
        return
    try:
        lease = _Lease(lock, what)
        lease.take(wait)
    except OSError as error:
        raise DataError(f"{lock}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lease.release()


@contextlib.contextmanager
def _file_locked(lock: Path, what: str, wait: bool) -> Iterator[None]:
    while True:
        try:
            file = lock.open("w")
        except OSError as error:
            raise DataError(f"{lock}: cannot be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise DataError(
                    f"{lock.parent}: {what} is writing there; wait until it ends"
                ) from error
            except OSError as error:
                raise DataError(
                    f"{lock}: cannot be locked: {error.strerror}; use a folder on a file system "
                    "that keeps locks (some cluster file systems do so only when mounted for it)"
                ) from error
            if _is_at(lock, file):
                yield
                return


def _is_at(lock: Path, file: IO[str]) -> bool:
    """Whoever held the lock may have removed its file: then ours is on nothing."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


class _Lease:
    """An object that exists while somebody holds it."""

    def __init__(self, lock: Remote, what: str) -> None:
        self._lock = lock
        self._what = what
        self._token = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._written = b""
        self._ending = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="fino-lease", daemon=True)

    def take(self, wait: bool) -> None:
        while True:
            self._written = self._content()
            try:
                self._lock.create(self._written)
            except FileExistsError:
                if self._is_alive() and not wait:
                    raise DataError(
                        f"{self._lock.url.removesuffix(self._lock.name)}: {self._what} is writing "
                        "there; wait until it ends"
                    ) from None
            else:
                self._renewing.start()
                return

    def release(self) -> None:
        self._ending.set()
        self._renewing.join()
        try:
            if self._lock.read_bytes() == self._written:
                self._lock.unlink()
        except OSError as error:
            # Not worth failing for: nobody renews it any more, so it counts as left behind.
            log.warning("%s: could not be removed: %s", self._lock, error.strerror)

    def _is_alive(self) -> bool:
        """Watch the holder; take the lock from one that does nothing any more."""
        try:
            before = self._lock.read_bytes()
            end = time.monotonic() + LEASE
            while time.monotonic() < end:
                time.sleep(RENEWAL / 4)
                if self._lock.read_bytes() != before:
                    return True
            log.warning("%s: was left behind by %s; it is taken over", self._lock, before.decode())
            if self._lock.read_bytes() == before:
                self._lock.unlink()
        except FileNotFoundError:
            pass  # given back just now
        return False

    def _renew(self) -> None:
        while not self._ending.wait(RENEWAL):
            content = self._content()
            try:
                if self._lock.read_bytes() != self._written:
                    log.warning("%s: was taken over by another process", self._lock)
                    return
                self._lock.write_bytes(content)
                self._written = content
            except OSError as error:
                log.warning("%s: could not be renewed: %s", self._lock, error.strerror)

    def _content(self) -> bytes:
        holder = {"host": socket.gethostname(), "process": os.getpid(), "token": self._token}
        return canonical_json(holder | {"renewal": next(self._numbers)})
