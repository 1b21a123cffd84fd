"""Uncompressed USTAR archives with reproducible bytes, hashed while they are written."""

import hashlib
import os
import tarfile
from typing import IO

BLOCK = 512
_AHEAD = 8 << 20


class TarWriter:
    """Append members to a file; time, user and group are 0, so equal content is equal bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0
        self._started = 0

    def add(self, name: str, payload: bytes) -> int:
        """Append one member; return the offset of its payload."""
        offset = self.size + BLOCK
        self._write(member_header(name, len(payload)), payload, bytes(-len(payload) % BLOCK))
        return offset

    def close(self) -> str:
        """Write the end-of-archive blocks; return the SHA-256 of the whole as a hex string."""
        self._write(bytes(2 * BLOCK))
        return self._digest.hexdigest()

    def _write(self, *parts: bytes) -> None:
        for part in parts:
            self._digest.update(part)
            self.size += len(part)
        self._file.writelines(parts)
        if self.size - self._started >= _AHEAD:
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Let the disk take what was written while the next images are decoded: the `fsync` at the
        end would otherwise wait for all of it.
        """
        if hasattr(os, "posix_fadvise"):
            self._file.flush()
            # Of pages that are not on the disk yet, this advice drops none and starts to write all.
            length = self.size - self._started
            os.posix_fadvise(self._file.fileno(), self._started, length, os.POSIX_FADV_DONTNEED)
        self._started = self.size


def member_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a member (POSIX.1-1988); the name is ASCII, below 100 bytes.

    Only name, size and checksum differ from member to member, so the rest is made once.
    """
    label, digits = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o\0 " % (_CHECKSUM + sum(label) + sum(digits))
    return b"".join(
        (label, _TEMPLATE[len(label) : 124], digits, _TEMPLATE[135:148], checksum, _TEMPLATE[156:])
    )


def _template() -> bytes:
    """A header with an empty name and size, and spaces in place of the checksum."""
    info = tarfile.TarInfo("")
    info.mode = 0o644
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    header[124:135] = bytes(11)
    header[148:156] = b" " * 8
    return bytes(header)


_TEMPLATE = _template()
_CHECKSUM = sum(_TEMPLATE)
