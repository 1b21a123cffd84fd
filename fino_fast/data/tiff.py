"""TIFF in and out: pass-through of what DALI decodes exactly, conversion of the rest."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import FinoError, MissingExtraError

from .declaration import ImagesDeclaration
from .stored import (
    DTYPES,
    MAX_CHANNELS,
    ImageRejected,
    Pixels,
    Stored,
    check_size,
    exact_dtype,
    without_alpha,
)

# Lossless codecs of DALI's decoder; others (JPEG inside TIFF, JPEG XR …) are converted.
_PASSED_CODECS = {"NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "ZSTD"}
_ALPHA = (1, 2)
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE = 0, 1, 2, 3


def import_tifffile() -> Any:
    """tifffile, or the error that says which extra brings it."""
    try:
        import tifffile
    except ImportError as error:
        raise MissingExtraError("tifffile", "tiff") from error
    return tifffile


def import_imagecodecs() -> Any:
    """imagecodecs, or the error that says which extra brings it."""
    try:
        import imagecodecs
    except ImportError as error:
        raise MissingExtraError("imagecodecs", "tiff") from error
    return imagecodecs


def converted(pixels: NDArray[Any], axes: str) -> Stored:
    """Pixels [H, W, C] as a zstd-compressed TIFF, which DALI decodes exactly.

    Raises:
        ImageRejected: values that neither uint8, uint16 nor float32 holds exactly.
        MissingExtraError: tifffile or imagecodecs is not installed.
    """
    exact = exact_dtype(pixels)
    height, width, channels = exact.shape
    return Stored(
        encode_tiff(exact), "tiff", height, width, channels, exact.dtype.name, axes or "YXC"
    )


def encode_tiff(pixels: Pixels) -> bytes:
    """[H, W, C] as one contiguous page, zstd with predictor; the same bytes for the same pixels."""
    channels = pixels.shape[2]
    buffer = io.BytesIO()
    import_imagecodecs()
    import_tifffile().imwrite(
        buffer,
        pixels if channels > 1 else pixels[:, :, 0],
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=[0] * (channels - 1) if channels not in (1, 3) else None,
        compression="zstd",
        predictor=True,
        metadata=None,
        software=False,
        byteorder="<",
    )
    return buffer.getvalue()


def decode_tiff(data: bytes) -> Pixels:
    """[H, W, C] of a single-page TIFF that `prepare_tiff` or `encode_tiff` gave out.

    Raises:
        ImageRejected: the bytes do not decode.
    """
    with _reading(data) as file:
        pixels: Pixels = _channels_last(_page_pixels(file.pages[0], data))
        return pixels


def prepare_tiff(data: bytes, limits: ImagesDeclaration, check: bool) -> Stored:
    """Check a TIFF; pass it through, or convert its first series to one contiguous page.

    Raises:
        ImageRejected: damaged, too large, or of a layout that has no single [H, W, C] meaning.
    """
    with _reading(data) as file:
        page = file.pages[0]
        series = file.series[0] if file.series else None
        single = len(file.pages) == 1 and not file.is_ome
        if single and _passes(page, file):
            height, width, channels = page.imagelength, page.imagewidth, page.samplesperpixel
            check_size(height, width, channels, page.dtype.itemsize, len(data), limits)
            if check:
                _refuse_not_finite(_page_pixels(page, data))
            return Stored(data, "tiff", height, width, channels, page.dtype.name, "")
        if series is None or len(file.series) > 1:
            raise ImageRejected("multi_page", f"{len(file.series)} images in one file")
        height, width, channels, axes = _layout(series.shape, series.axes)
        if series.dtype is None:
            raise ImageRejected("unsupported_dtype", "pixels of a type that TIFF does not define")
        check_size(height, width, channels, series.dtype.itemsize, len(data), limits)
        for each in series.pages:
            _check_segments(each, data)
        pixels = _upright(_arrange(series.asarray(), series.axes), page)
        if page.photometric == _PALETTE:
            pixels = _through_palette(pixels, page)
        if page.photometric == _MINISWHITE:
            if pixels.dtype.kind != "u":
                raise ImageRejected("unsupported_dtype", "white-is-zero with signed values")
            pixels = np.iinfo(pixels.dtype).max - pixels
        alpha = bool(page.extrasamples) and page.extrasamples[-1] in _ALPHA
        return converted(without_alpha(pixels, alpha), axes)


@contextlib.contextmanager
def _reading(data: bytes) -> Iterator[Any]:
    """A tifffile.TiffFile on bytes that may be anything."""
    tifffile = import_tifffile()
    import_imagecodecs()
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            if not file.pages:
                raise ImageRejected("header_damaged", "a TIFF without a page")
            yield file
    except (ImageRejected, FinoError):
        raise
    except Exception as error:
        # On damaged files tifffile and the codecs raise whatever their parsing ran into.
        detail = f"{type(error).__name__}: {error}"
        raise ImageRejected("decode_failed", detail) from error


def _passes(page: Any, file: Any) -> bool:
    """Whether DALI decodes the page to exactly the pixels that tifffile finds."""
    return (
        page.dtype is not None
        and page.dtype.name in DTYPES
        and page.bitspersample == page.dtype.itemsize * 8
        and page.compression.name in _PASSED_CODECS
        and page.planarconfig == 1
        and page.imagedepth == 1
        and page.samplesperpixel <= MAX_CHANNELS
        and page.photometric == (_RGB if page.samplesperpixel == 3 else _MINISBLACK)
        and not any(sample in _ALPHA for sample in page.extrasamples)
        and page.tags.valueof(274, default=1) == 1
        and page.tags.valueof(266, default=1) == 1
        and file.byteorder == "<"
    )


def _check_segments(page: Any, data: bytes) -> None:
    """tifffile fills absent strips and tiles with zeros; here they are damage."""
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count == 0 or offset + count > len(data):
            raise ImageRejected("decode_failed", "the TIFF lacks part of its pixels")


def _page_pixels(page: Any, data: bytes) -> NDArray[Any]:
    _check_segments(page, data)
    pixels = page.asarray()
    return np.asarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _channels_last(pixels: NDArray[Any]) -> Any:
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _layout(shape: tuple[int, ...], axes: str) -> tuple[int, int, int, str]:
    """Height, width, channels and the kept axes of a series.

    Raises:
        ImageRejected: it has a time, depth or other axis besides height, width and channels.
    """
    kept = [
        (axis, size) for axis, size in zip(axes, shape, strict=True) if size > 1 or axis in "YX"
    ]
    sizes = dict(kept)
    others = [axis for axis, _ in kept if axis not in "YX"]
    if "Y" not in sizes or "X" not in sizes:
        raise ImageRejected("unsupported_axes", f"axes {axes} {shape} hold no image plane")
    # C channels, S samples, I and Q unnamed pages; Z and T are not channels.
    if len(others) > 1 or any(axis not in "CSIQ" for axis in others):
        raise ImageRejected(
            "multi_page", f"axes {axes} {shape}: choose a plane, or project, before ingestion"
        )
    channels = sizes[others[0]] if others else 1
    return sizes["Y"], sizes["X"], channels, "".join(axis for axis, _ in kept)


def _arrange(pixels: NDArray[Any], axes: str) -> NDArray[Any]:
    """[H, W, C] of a series that `_layout` accepted."""
    keep = [i for i, axis in enumerate(axes) if pixels.shape[i] > 1 or axis in "YX"]
    names = [axes[i] for i in keep]
    pixels = pixels.reshape([pixels.shape[i] for i in keep])
    others = [i for i, name in enumerate(names) if name not in "YX"]
    order = [names.index("Y"), names.index("X"), *others]
    native = np.asarray(pixels, dtype=pixels.dtype.newbyteorder("="))
    arranged: NDArray[Any] = np.ascontiguousarray(_channels_last(native.transpose(order)))
    return arranged


def _upright(pixels: NDArray[Any], page: Any) -> NDArray[Any]:
    """Apply the orientation tag (TIFF 6.0, tag 274)."""
    turn = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: p.transpose(1, 0, 2)[::-1],
    }.get(page.tags.valueof(274, default=1))
    if turn is None:
        raise ImageRejected("header_damaged", "an orientation that TIFF does not define")
    return np.ascontiguousarray(turn(pixels))


def _through_palette(pixels: NDArray[Any], page: Any) -> NDArray[Any]:
    colours = page.colormap
    if colours is None or pixels.shape[2] != 1:
        raise ImageRejected("header_damaged", "a palette TIFF without its palette")
    return np.ascontiguousarray(colours.T[pixels[:, :, 0]])


def _refuse_not_finite(pixels: NDArray[Any]) -> None:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ImageRejected("not_finite", "a pixel is NaN or infinite")
