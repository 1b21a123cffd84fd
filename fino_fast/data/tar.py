"""Uncompressed USTAR archives with reproducible bytes, hashed while they are written."""

import hashlib
import tarfile
from typing import IO

BLOCK = 512


class TarWriter:
    """Append members to a file; time, user and group are 0, so equal content is equal bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def add(self, name: str, payload: bytes) -> int:
        """Append one member; return the offset of its payload."""
        self._write(member_header(name, len(payload)))
        offset = self.size
        self._write(payload)
        self._write(bytes(-len(payload) % BLOCK))
        return offset

    def close(self) -> str:
        """Write the end-of-archive blocks; return the SHA-256 of the whole as a hex string."""
        self._write(bytes(2 * BLOCK))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.size += len(data)


def member_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a member."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
