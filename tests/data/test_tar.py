"""Archives are those of the standard library, byte for byte."""

import hashlib
import io
import tarfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fino_fast.data import tar as module
from fino_fast.data.tar import TarWriter, member_header


def described(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


@given(row=st.integers(0, 10**12 - 1), size=st.integers(0, 2**32 - 1))
def test_header_equals_that_of_tarfile(row: int, size: int) -> None:
    info = described(f"{row:012d}.tiff", size)
    assert member_header(info.name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def test_small_and_large_members_are_those_that_tarfile_writes(tmp_path: Path) -> None:
    """Sizes at the edges of blocks and of the pieces in which members are written."""
    piece = module._PIECE
    sizes = [
        0,
        1,
        511,
        512,
        513,
        piece - 1,
        piece,
        piece + 1,
        3,
        piece // 2,
        piece // 2,
        9 << 20,
        7,
    ]
    payloads = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    with (tmp_path / "ours.tar").open("wb") as file:
        writer = TarWriter(file)
        offsets = [writer.add(f"{i:012d}.png", payload) for i, payload in enumerate(payloads)]
        digest = writer.close()
    ours = (tmp_path / "ours.tar").read_bytes()
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, payload in enumerate(payloads):
            archive.addfile(described(f"{i:012d}.png", len(payload)), io.BytesIO(payload))
    assert ours == expected.getvalue()[: len(ours)]
    assert not expected.getvalue()[len(ours) :].strip(b"\0")  # tarfile fills up to 10 KiB
    assert digest == hashlib.sha256(ours).hexdigest()
    assert writer.size == len(ours)
    for offset, payload in zip(offsets, payloads, strict=True):
        assert ours[offset : offset + len(payload)] == payload
