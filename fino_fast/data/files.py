"""Files that are either whole or absent, on a disk or behind a URL.

On a disk: temporary name, fsync, rename, fsync of the folder. In an object store: a local spool
file, one upload, a check of what arrived.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from fino_fast.errors import ConfigError, DataError, DiskFullError

from .remote import Remote

TEMPORARY = ".tmp-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20


Location = Path | Remote
"""A file or folder: a path, or an fsspec URL."""


def location(place: str | Path | Remote) -> Location:
    """`s3://bucket/folder` and other fsspec URLs as a Remote, anything else as a Path.

    Raises:
        ConfigError: no such kind of URL.
        MissingExtraError: what reads it is not installed.
    """
    text = str(place)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        if "::" in text and "://" in text:
            raise ConfigError(f"{text}: chained URLs cannot be used; give the store's own URL")
        return Path(text)
    remote = Remote(text)
    remote.check_driver()
    return remote


LocationField = Annotated[Location, PlainValidator(location), PlainSerializer(str)]
"""A field of a model that takes both forms."""


def make_folder(folder: Location) -> None:
    """Make a folder and its parents; object stores need none, and a bucket is never made.

    Raises:
        DiskFullError: no room left.
        DataError: it cannot be made.
    """
    if isinstance(folder, Path):
        try:
            new = [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            # A power cut must not take the folder away with what was committed in it.
            for place in new:
                sync_folder(place.parent)
        except OSError as error:
            kind = DiskFullError if error.errno in FULL else DataError
            raise kind(f"{folder}: cannot be made a folder: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def committed(path: Location) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path` when the block, which only writes it, ends.

    Raises:
        DiskFullError: no space, quota or file-size limit; the temporary file is removed.
        DataError: the folder does not take the file, a disk the bytes, or a store the upload.
    """
    try:
        if isinstance(path, Remote):
            with _uploaded(path) as file:
                yield file
        else:
            with _renamed(path) as file:
                yield file
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(
                f"{path}: no room left to write it ({error.strerror}); what is committed is "
                "intact: free some space and run the same command again"
            ) from error
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[IO[bytes]]:
    # The name holds host and process, so that two writers of one file never share it.
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        # What ended the writing is to be told, not that a read-only folder keeps no draft either.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def committed_folder(folder: Path) -> Iterator[Path]:
    """Make a folder under a temporary name; it becomes `folder` when the block ends without error.

    Raises:
        ConfigError: `folder` exists.
        DiskFullError: no room left; nothing is left of the folder.
        DataError: it cannot be made there.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; remove it or choose another folder")
    draft = folder.with_name(f"{TEMPORARY}{folder.name}")
    if draft.exists():
        shutil.rmtree(draft)
    make_folder(draft)
    try:
        yield draft
        try:
            draft.rename(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(folder.parent)


@contextlib.contextmanager
def _uploaded(path: Remote) -> Iterator[IO[bytes]]:
    with tempfile.NamedTemporaryFile(prefix="fino-fast-") as spool:
        yield spool
        spool.flush()
        try:
            path.upload(Path(spool.name))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be uploaded: {error.strerror}; what is committed is intact: run "
                "the same command again"
            ) from error


def remove_temporaries(folder: Location) -> None:
    """Remove what interrupted writers of a set left in its folder and in those of its plans; an
    object store never shows any of it. Whatever else lies below is not ours to look into.
    """
    if isinstance(folder, Path):
        for pattern in (f"{TEMPORARY}*", f"plan-*/{TEMPORARY}*"):
            for leftover in folder.glob(pattern):
                if not leftover.is_dir():
                    leftover.unlink(missing_ok=True)


def open_read(path: Location) -> IO[bytes]:
    """A file to read bytes from.

    Raises:
        OSError: it cannot be opened.
    """
    return path.open() if isinstance(path, Remote) else path.open("rb")


def parquet_source(path: Location) -> Path | IO[bytes]:
    """What pyarrow reads a Parquet file from.

    Raises:
        OSError: it cannot be opened.
    """
    return path if isinstance(path, Path) else path.open()


def size_of(path: Location) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there.
    """
    return path.stat().size if isinstance(path, Remote) else path.stat().st_size


@contextlib.contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """A file as one on this machine, for as long as the block lasts.

    Raises:
        DataError: it cannot be fetched.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fino-fast-") as folder:
        copy = Path(folder, path.name)
        try:
            with path.open() as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
        except OSError as error:
            raise DataError(f"{path}: cannot be fetched: {error.strerror}") from error
        yield copy


def sha256_of(path: Location) -> str:
    """SHA-256 of a file as a hex string.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_read(path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def canonical_json(content: Any) -> bytes:
    """The one spelling of `content`: sorted keys, UTF-8, no NaN; what hashes are taken of."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    return (text + "\n").encode("utf-8")


def write_json(path: Location, content: Any) -> str:
    """Commit `content` as canonical JSON; return the SHA-256 of the bytes."""
    data = canonical_json(content)
    with committed(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def read_json(path: Location) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing, unreadable, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is damaged: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is damaged: a JSON object was expected")
    return content
