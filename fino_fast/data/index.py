"""`index-*.npy`: 28 bytes a sample, memory-mapped and so shared by all processes of a machine."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import DataError

from .tar import BLOCK

RECORD = np.dtype(
    [
        ("block", "<u4"),  # of 512 bytes: where a tar's members begin
        ("size", "<u4"),
        ("shard", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("crc32", "<u4"),
        ("split", "<u2"),
        ("channels", "u1"),
        ("form", "u1"),
    ]
)
assert RECORD.itemsize == 28

FORMS = [("jpg", "uint8"), ("png", "uint8"), ("png", "uint16")] + [
    ("tiff", dtype) for dtype in ("uint8", "uint16", "float32")
]
"""(extension, dtype) of each value of `form`; only ever appended to."""

Index = NDArray[np.void]


def place_of(record: np.void) -> tuple[int, int, int]:
    """(number of the shard, byte in it where the sample begins, bytes of the sample)."""
    return int(record["shard"]), int(record["block"]) * BLOCK, int(record["size"])


def npy_header(dtype: np.dtype[np.void], count: int) -> bytes:
    """The npy header of `count` records."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": False, "shape": (count,)}
    )
    return buffer.getvalue()


def records_start(path: Path, dtype: np.dtype[np.void], count: int) -> int:
    """Where the records of an npy file begin, in bytes.

    Raises:
        DataError: the file is missing, or does not hold `count` records of this type.
    """
    # The header is known to the byte: it is compared and never parsed.
    header = npy_header(dtype, count)
    try:
        with path.open("rb") as file:
            whole = file.read(len(header)) == header
        whole = whole and path.stat().st_size == len(header) + count * dtype.itemsize
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not whole:
        raise DataError(f"{path}: is damaged: it does not hold the records of {count} samples")
    return len(header)


def read_index(path: Path, samples: int, shard_sizes: list[int], splits: int) -> Index:
    """Memory-map an index and check that every record stays inside its shard.

    Args:
        path: the file.
        samples: records that the manifest promises.
        shard_sizes: bytes of every shard.
        splits: number of splits.

    Raises:
        DataError: the file is missing or damaged.
    """
    offset = records_start(path, RECORD, samples)
    index = np.memmap(path, dtype=RECORD, mode="r", offset=offset, shape=(samples,))
    sizes = np.array([*shard_sizes, 0], dtype=np.uint64)
    chunk = 1 << 20
    for start in range(0, samples, chunk):
        part = index[start : start + chunk]
        shard = np.minimum(part["shard"], len(shard_sizes))
        ends = part["block"].astype(np.uint64) * BLOCK + part["size"]
        bad = (
            (ends > sizes[shard])
            | (part["form"] >= len(FORMS))
            | (part["split"] >= splits)
            | (part["size"] == 0)
            | (part["height"] == 0)
            | (part["width"] == 0)
            | (part["channels"] == 0)
        )
        if bad.any():
            raise DataError(f"{path}: is damaged at record {start + int(np.argmax(bad))}")
    return index
