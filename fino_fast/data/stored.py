"""What a shard stores of an image, and what no image may be."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .declaration import ImagesDeclaration

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]

DTYPES = ("uint8", "uint16", "float32")
MAX_CHANNELS = 6
# A file that unfolds to more than this, and to more than so many times its size, is a bomb: 430 KB
# of PNG can hold 432 MB. Small blank images compress as well and are harmless.
_BOMB_BYTES = 64 << 20
_BOMB_RATIO = 200


class ImageRejected(Exception):
    """An image that cannot be taken, with a short code for counting and a detail for a person."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail


class Stored(NamedTuple):
    """An image as it goes into the shard."""

    payload: bytes
    extension: str
    height: int
    width: int
    channels: int
    dtype: str
    axes: str
    """The source's axes where it was converted ("CYX"), "" where its bytes passed through."""


def most_unfolded(encoded: int) -> int:
    """Bytes to which a file of `encoded` bytes may unfold."""
    return max(_BOMB_BYTES, _BOMB_RATIO * encoded)


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
    if size > most_unfolded(encoded):
        raise ImageRejected(
            "expansion", f"{encoded} bytes would unfold to {size} ({size // encoded} times)"
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
    # Rounded up beyond the integer type: casting it back would give whatever the machine likes.
    overflows = pixels.dtype.kind in "iu" and float(single.max()) > np.iinfo(pixels.dtype).max
    if overflows or not np.array_equal(single.astype(pixels.dtype), pixels):
        raise ImageRejected(
            "precision_loss", f"{pixels.dtype} values do not fit float32 exactly; rescale them"
        )
    return single


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
