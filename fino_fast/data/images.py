"""What may enter a shard: header check, full decode, pass-through or conversion.

Bytes pass through untouched where DALI decodes them to exactly the pixels that were checked here
(tests/data/test_images.py compares every such form). Everything else is converted without loss, or
rejected with a code; nothing is rounded, clipped or flattened on the way.
"""

from collections.abc import Callable

from .declaration import ImagesDeclaration
from .dicom import prepare_dicom
from .raster import decode_raster, prepare_jpeg, prepare_other, prepare_png
from .stored import ImageRejected, Pixels, Stored
from .tiff import decode_tiff, prepare_tiff


def prepare(data: bytes, limits: ImagesDeclaration, *, check: bool = True) -> Stored:
    """Check one file's bytes and give what the shard stores.

    Args:
        data: the file's content.
        limits: what the data set declares about its images.
        check: decode fully even where bytes pass through.

    Raises:
        ImageRejected: the file cannot be taken; never anything else for bad bytes.
    """
    if not data:
        raise ImageRejected("empty_file", "the file has no bytes")
    # First: what stands in front of a DICOM file may look like the beginning of a TIFF.
    if data[128:132] == b"DICM":
        stored = prepare_dicom(data, limits)
    else:
        readers = (reader for magic, reader in _READERS if data.startswith(magic))
        stored = next(readers, prepare_other)(data, limits, check)
    if limits.channels is not None and stored.channels != limits.channels:
        raise ImageRejected(
            "wrong_channels",
            f"{stored.channels} channels, the schema declares {limits.channels}",
        )
    return stored


def decode(payload: bytes | memoryview, extension: str) -> Pixels:
    """Pixels [H, W, C] of a stored image; the reader of the PyTorch pipeline.

    Raises:
        ImageRejected: the bytes do not decode.
    """
    if extension == "tiff":
        return decode_tiff(bytes(payload))
    return decode_raster(bytes(payload), extension)


_READERS: list[tuple[bytes, Callable[[bytes, ImagesDeclaration, bool], Stored]]] = [
    (b"\x89PNG\r\n\x1a\n", prepare_png),
    (b"\xff\xd8\xff", prepare_jpeg),
    (b"II*\x00", prepare_tiff),
    (b"MM\x00*", prepare_tiff),
    (b"II+\x00", prepare_tiff),
    (b"MM\x00+", prepare_tiff),
]
