"""Tar headers are those of the standard library, byte for byte."""

import tarfile

from hypothesis import given
from hypothesis import strategies as st

from fino_fast.data.tar import member_header


@given(row=st.integers(0, 10**12 - 1), size=st.integers(0, 2**32 - 1))
def test_header_equals_that_of_tarfile(row: int, size: int) -> None:
    info = tarfile.TarInfo(f"{row:012d}.tiff")
    info.size, info.mode = size, 0o644
    assert member_header(info.name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
