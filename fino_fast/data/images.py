"""What may enter a shard: header check, full decode, pass-through or conversion.

Bytes pass through untouched where DALI decodes them to exactly the pixels that were checked here
(tests/data/test_images.py compares every such form). Everything else is converted without loss, or
rejected with a code; nothing is rounded, clipped or flattened on the way.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .declaration import ImagesDeclaration

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]

DTYPES = ("uint8", "uint16", "float32")
MAX_CHANNELS = 6
# A file that unfolds to more than this, and to more than so many times its size, is a bomb: 430 KB
# of PNG can hold 432 MB. Small blank images compress as well and are harmless.
_BOMB_BYTES = 64 << 20
_BOMB_RATIO = 200
_ORIENTATION_TAG = 0x0112


class ImageRejected(Exception):
    """An image that cannot be taken, with a short code for counting and a detail for a person."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Stored:
    """An image as it goes into the shard."""

    payload: bytes
    extension: str
    height: int
    width: int
    channels: int
    dtype: str
    axes: str
    """The source's axes where it was converted ("CYX"), "" where its bytes passed through."""


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
    for magic, reader in _READERS:
        if data.startswith(magic):
            stored = reader(data, limits, check)
            break
    else:
        if data[128:132] == b"DICM":
            from .dicom import prepare_dicom

            stored = prepare_dicom(data, limits)
        else:
            stored = _prepare_other(data, limits)
    if limits.channels is not None and stored.channels != limits.channels:
        raise ImageRejected(
            "wrong_channels",
            f"{stored.channels} channels, the schema declares {limits.channels}",
        )
    return stored


def check_size(
    height: int, width: int, channels: int, itemsize: int, encoded: int, limits: ImagesDeclaration
) -> None:
    """Refuse, from the header alone, what must not be decoded.

    Raises:
        ImageRejected: no pixels, too many, too many channels, or a decompression bomb.
    """
    if height < 1 or width < 1 or channels < 1:
        raise ImageRejected("no_pixels", f"the header says {height}×{width}×{channels}")
    if channels > MAX_CHANNELS:
        raise ImageRejected("wrong_channels", f"{channels} channels, at most {MAX_CHANNELS} fit")
    if height * width > limits.max_pixels:
        raise ImageRejected(
            "too_large", f"{height}×{width} pixels, images.max_pixels is {limits.max_pixels}"
        )
    size = height * width * channels * itemsize
    if size > _BOMB_BYTES and size > _BOMB_RATIO * encoded:
        raise ImageRejected(
            "expansion", f"{encoded} bytes would unfold to {size} ({size // encoded} times)"
        )


def converted(pixels: NDArray[Any], axes: str) -> Stored:
    """Pixels [H, W, C] as a zstd-compressed TIFF, which DALI decodes exactly.

    Raises:
        ImageRejected: values that neither uint8, uint16 nor float32 holds exactly.
        MissingExtraError: tifffile or imagecodecs is not installed.
    """
    from .tiff import encode_tiff

    exact = exact_dtype(pixels)
    height, width, channels = exact.shape
    return Stored(
        encode_tiff(exact), "tiff", height, width, channels, exact.dtype.name, axes or "YXC"
    )


def exact_dtype(pixels: NDArray[Any]) -> Pixels:
    """The same values as uint8, uint16 or float32.

    Raises:
        ImageRejected: a value would change, or is NaN or infinite.
    """
    if pixels.dtype.name in ("uint8", "uint16"):
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind not in "iuf":
        raise ImageRejected("unsupported_dtype", f"pixels of type {pixels.dtype}")
    single = pixels.astype(np.float32)
    if not np.isfinite(single).all():
        raise ImageRejected("not_finite", "a pixel is NaN or infinite")
    if not np.array_equal(single.astype(pixels.dtype), pixels):
        raise ImageRejected(
            "precision_loss", f"{pixels.dtype} values do not fit float32 exactly; rescale them"
        )
    return single


def decode(payload: bytes | memoryview, extension: str) -> Pixels:
    """Pixels [H, W, C] of a stored image; the reader of the PyTorch pipeline.

    Raises:
        ImageRejected: the bytes do not decode.
    """
    if extension == "tiff":
        from .tiff import decode_tiff

        return decode_tiff(bytes(payload))
    if extension == "png" and payload[24] == 16:
        return _decode_deep_png(bytes(payload))
    pixels = np.asarray(_load(bytes(payload)))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _load(data: bytes) -> Image.Image:
    """Decode with PIL."""
    return _loaded(_open(data))


def _loaded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise ImageRejected("decode_failed", str(error)) from error
    return image


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageRejected("unknown_format", f"starts with {data[:16]!r}") from error
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, OverflowError) as error:
        raise ImageRejected("header_damaged", str(error)) from error


def _prepare_png(data: bytes, limits: ImagesDeclaration, check: bool) -> Stored:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageRejected("header_damaged", "PNG without a header chunk")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    channels = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(colour)
    if channels is None or depth not in (1, 2, 4, 8, 16):
        raise ImageRejected("header_damaged", f"PNG of colour type {colour}, bit depth {depth}")
    check_size(height, width, channels, 2 if depth == 16 else 1, len(data), limits)
    chunks = _png_chunks(data)
    if b"acTL" in chunks:
        raise ImageRejected("multi_page", "an animated PNG")
    plain = colour in (0, 2) and depth in (8, 16) and not set(chunks) & {b"tRNS", b"eXIf"}
    if not plain:
        return _convert(data)
    if check and data[28]:
        # Interlaced: seven passes with rows of their own; rare, so left to a decoder.
        decode(data, "png")
    elif check:
        _check_png_pixels(chunks.get(b"IDAT", []), height, width * channels * depth // 8)
    return Stored(data, "png", height, width, channels, "uint16" if depth == 16 else "uint8", "")


def _check_png_pixels(parts: list[memoryview], height: int, row_bytes: int) -> None:
    """Inflate all pixels and look at every row's filter: what is left of decoding cannot fail.

    Three times as fast as undoing the filters too, and unlike PIL it compares the checksum.

    Raises:
        ImageRejected: they do not inflate to the rows that the header promises.
    """
    expected = height * (row_bytes + 1)
    packed = zlib.decompressobj()
    try:
        rows = packed.decompress(b"".join(parts), expected + 1)
    except zlib.error as error:
        raise ImageRejected("decode_failed", f"PNG pixels: {error}") from error
    if len(rows) != expected or not packed.eof:
        raise ImageRejected("decode_failed", f"{len(rows)} bytes of PNG pixels, not {expected}")
    if np.frombuffer(rows, np.uint8)[:: row_bytes + 1].max() > 4:
        raise ImageRejected("decode_failed", "a PNG row has a filter that is not defined")


def _png_chunks(data: bytes) -> dict[bytes, list[memoryview]]:
    """Contents of all chunks by name; their checksums are compared, which PIL does not do for all.

    Raises:
        ImageRejected: the file is cut off, or a checksum differs.
    """
    chunks: dict[bytes, list[memoryview]] = {}
    view = memoryview(data)
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        name, end = data[place + 4 : place + 8], place + length + 8
        if end + 4 > len(data):
            break
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ImageRejected("decode_failed", f"the checksum of PNG chunk {name!r} differs")
        chunks.setdefault(name, []).append(view[place + 8 : end])
        place = end + 4
        if name == b"IEND":
            return chunks
    raise ImageRejected("decode_failed", "the PNG is cut off before its end chunk")


def _decode_deep_png(data: bytes) -> NDArray[np.uint16]:
    """16-bit PNG, of which PIL would keep 8 bits."""
    from .tiff import import_imagecodecs

    codecs = import_imagecodecs()
    try:
        pixels: NDArray[np.uint16] = codecs.png_decode(data)
    except (codecs.PngError, ValueError, RuntimeError) as error:
        raise ImageRejected("decode_failed", str(error)) from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _prepare_jpeg(data: bytes, limits: ImagesDeclaration, check: bool) -> Stored:
    image = _open(data)
    width, height = image.size
    channels = len(image.getbands())
    check_size(height, width, channels, 1, len(data), limits)
    if image.mode not in ("L", "RGB"):
        raise ImageRejected(
            "unsupported_color",
            f"JPEG of colour mode {image.mode}: its conversion to RGB is not defined; convert it",
        )
    if _orientation(image) != 1:
        return _convert(data)
    if check:
        # An eighth of the size and grey: every coefficient is decoded, few are transformed.
        image.draft("L", (1, 1))
        _loaded(image)
    return Stored(data, "jpg", height, width, channels, "uint8", "")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
        raise ImageRejected("header_damaged", f"EXIF: {error}") from error


def _prepare_other(data: bytes, limits: ImagesDeclaration) -> Stored:
    """BMP, GIF, WebP and whatever else PIL reads: one frame, 8 bits, converted."""
    image = _open(data)
    width, height = image.size
    check_size(height, width, len(image.getbands()), 1, len(data), limits)
    if getattr(image, "n_frames", 1) != 1:
        raise ImageRejected("multi_page", f"{image.format} with more than one frame")
    return _convert(data)


def _convert(data: bytes) -> Stored:
    """Upright, without palette or (opaque) alpha, as a TIFF."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16:
        return converted(without_alpha(_decode_deep_png(data), data[25] in (4, 6)), "YXC")
    image = ImageOps.exif_transpose(_load(data))
    if image.mode == "P" or (image.mode in ("1", "L", "RGB") and "transparency" in image.info):
        grey = image.mode in ("1", "L")
        image = image.convert("LA" if grey else "RGBA")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "RGB", "LA", "RGBA", "I;16", "F"):
        raise ImageRejected("unsupported_color", f"{image.format} of colour mode {image.mode}")
    pixels = np.asarray(image)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return converted(without_alpha(pixels, image.mode in ("LA", "RGBA")), "YXC")


def without_alpha(pixels: NDArray[Any], has_alpha: bool) -> NDArray[Any]:
    """Drop an alpha channel that says nothing.

    Raises:
        ImageRejected: a pixel is transparent, so that dropping alpha would invent colour.
    """
    if not has_alpha:
        return pixels
    opaque = np.iinfo(pixels.dtype.type).max
    if not (pixels[:, :, -1] == opaque).all():
        raise ImageRejected(
            "transparent", "has transparent pixels; flatten it on the background that you want"
        )
    return np.ascontiguousarray(pixels[:, :, :-1])


def _prepare_tiff(data: bytes, limits: ImagesDeclaration, check: bool) -> Stored:
    from .tiff import prepare_tiff

    return prepare_tiff(data, limits, check)


_READERS: list[tuple[bytes, Callable[[bytes, ImagesDeclaration, bool], Stored]]] = [
    (b"\x89PNG\r\n\x1a\n", _prepare_png),
    (b"\xff\xd8\xff", _prepare_jpeg),
    (b"II*\x00", _prepare_tiff),
    (b"MM\x00*", _prepare_tiff),
    (b"II+\x00", _prepare_tiff),
    (b"MM\x00+", _prepare_tiff),
]
