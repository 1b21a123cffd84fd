"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the folder."""

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fino_fast.errors import DataError, DiskFullError

TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def committed(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path` when the block ends without an error.

    The temporary name holds host and process, so two writers of one file never share it.

    Raises:
        DiskFullError: no space, quota or file-size limit; the temporary file is removed.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"{path}: no room left to write it ({error.strerror}); what is committed is "
                "intact: free some space and run the same command again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what interrupted writers left behind."""
    for leftover in folder.glob(f"**/{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as a hex string.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def canonical_json(content: Any) -> bytes:
    """The one spelling of `content`: sorted keys, UTF-8, no NaN; what hashes are taken of."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    return (text + "\n").encode("utf-8")


def write_json(path: Path, content: Any) -> str:
    """Commit `content` as canonical JSON; return the SHA-256 of the bytes."""
    data = canonical_json(content)
    with committed(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
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
