"""Uncompressed USTAR archives with reproducible bytes, hashed while they are written."""

import hashlib
import os
import tarfile
from typing import IO

BLOCK = 512
_PIECE = 256 << 10
_AHEAD = 8 << 20


class TarWriter:
    """Append members to a file; time, user and group are 0, so equal content is equal bytes.

    Small members go out together, in pieces of `_PIECE` bytes: one hash update and one write for
    all of them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._parts: list[bytes] = []
        self.size = 0
        self._written = 0
        self._started = 0

    def add(self, name: str, payload: bytes) -> int:
        """Append one member; return the offset of its payload."""
        offset, length = self.size + BLOCK, len(payload)
        padding = -length % BLOCK
        if length < _PIECE:
            self._parts += (member_header(name, length), payload, _PADDING[padding])
        else:
            self._parts.append(member_header(name, length))
            self._flush()
            self._write(payload)
            self._parts.append(_PADDING[padding])
        self.size = offset + length + padding
        if self.size - self._written >= _PIECE:
            self._flush()
        return offset

    def close(self) -> str:
        """Write the end-of-archive blocks; return the SHA-256 of the whole as a hex string."""
        self._parts.append(bytes(2 * BLOCK))
        self.size += 2 * BLOCK
        self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        """Write what was gathered."""
        self._write(b"".join(self._parts))
        self._parts.clear()

    def _write(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._file.write(piece)
        self._written += len(piece)
        if self._written - self._started >= _AHEAD:
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Let the disk take what was written while the next images are decoded: the `fsync` at the
        end would otherwise wait for all of it.
        """
        if hasattr(os, "posix_fadvise"):
            self._file.flush()
            # Of pages that are not on the disk yet, this advice drops none and starts to write all.
            length = self._written - self._started
            os.posix_fadvise(self._file.fileno(), self._started, length, os.POSIX_FADV_DONTNEED)
        self._started = self._written


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
_PADDING = [bytes(length) for length in range(BLOCK)]
