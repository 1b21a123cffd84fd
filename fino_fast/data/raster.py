"""PNG, JPEG, and whatever else Pillow reads: header check, full decode, conversion."""

import io
import struct

import numpy as np
import simplejpeg
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .declaration import ImagesDeclaration
from .stored import ImageRejected, Pixels, Stored, check_size, without_alpha
from .tiff import converted, import_imagecodecs

_ORIENTATION_TAG = 0x0112
_APP1, _SCAN = b"\xff\xe1", b"\xff\xda"
_JPEG_CHANNELS = {"Gray": 1, "RGB": 3, "YCbCr": 3}


def prepare_png(data: bytes, limits: ImagesDeclaration, check: bool) -> Stored:
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
        decode_raster(data, "png")
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
    packed = isal_zlib.decompressobj()
    try:
        rows = packed.decompress(b"".join(parts), expected + 1)
    except isal_zlib.error as error:  # type: ignore[misc]  # its stubs lack `type[…]`
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
        if isal_zlib.crc32(view[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ImageRejected("decode_failed", f"the checksum of PNG chunk {name!r} differs")
        chunks.setdefault(name, []).append(view[place + 8 : end])
        place = end + 4
        if name == b"IEND":
            return chunks
    raise ImageRejected("decode_failed", "the PNG is cut off before its end chunk")


def _decode_deep_png(data: bytes) -> NDArray[np.uint16]:
    """16-bit PNG, of which PIL would keep 8 bits."""
    codecs = import_imagecodecs()
    try:
        pixels: NDArray[np.uint16] = codecs.png_decode(data)
    except (codecs.PngError, ValueError, RuntimeError) as error:
        raise ImageRejected("decode_failed", str(error)) from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def prepare_jpeg(data: bytes, limits: ImagesDeclaration, check: bool) -> Stored:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        # Damaged, or of a sampling that libjpeg-turbo decodes and its interface has no name for.
        return prepare_other(data, limits, check)
    if colour not in _JPEG_CHANNELS:
        raise ImageRejected(
            "unsupported_color",
            f"JPEG of colour mode {colour}: its conversion to RGB is not defined; convert it",
        )
    channels = _JPEG_CHANNELS[colour]
    check_size(height, width, channels, 1, len(data), limits)
    # The orientation stands in an APP1 segment, in front of the first scan.
    if data.find(_APP1, 0, data.find(_SCAN)) > 0 and _orientation(_open(data)) != 1:
        return _convert(data)
    if check:
        _check_jpeg_pixels(data)
    return Stored(data, "jpg", height, width, channels, "uint8", "")


def _check_jpeg_pixels(data: bytes) -> None:
    """Decode every coefficient; only the transforms behind, which cannot fail, are cut down to an
    eighth of the size and to grey.

    Raises:
        ImageRejected: the decoder fails, or goes on with a warning: it ran out of data, or met what
            no encoder wrote, and made up the pixels behind.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1)
    except ValueError as error:
        raise ImageRejected("decode_failed", str(error)) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
        raise ImageRejected("header_damaged", f"EXIF: {error}") from error


def prepare_other(data: bytes, limits: ImagesDeclaration, _check: bool) -> Stored:
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


def decode_raster(data: bytes, extension: str) -> Pixels:
    """Pixels [H, W, C] of a stored PNG or JPEG.

    Raises:
        ImageRejected: the bytes do not decode.
    """
    if extension == "png" and data[24] == 16:
        return _decode_deep_png(data)
    pixels = np.asarray(_load(data))
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
