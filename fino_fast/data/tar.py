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
    """The 512-byte USTAR header of a member (POSIX.1-1988); the name is ASCII, below 100 bytes.

    Only name, size and checksum differ from member to member, so the rest is made once.
    """
    header = bytearray(_TEMPLATE)
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _template() -> bytes:
    """A header with an empty name and size, and spaces in place of the checksum."""
    info = tarfile.TarInfo("")
    info.mode = 0o644
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    header[148:156] = b" " * 8
    return bytes(header)


_TEMPLATE = _template()
