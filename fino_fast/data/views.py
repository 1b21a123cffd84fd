"""The augmentation recipe, and its random draws as arrays.

All randomness is drawn here, from counters, for whole batches at once; the pipelines only carry it
out. So DALI and PyTorch crop the same boxes, and a resumed run the same as an uninterrupted one.
"""

from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fino_fast.config import StrictModel
from fino_fast.errors import ConfigError

from .order import AUGMENT, derive_key, uniforms

# Draws a view; more than are used, so that a new augmentation does not move the old ones' draws.
_DRAWS = 40
_ATTEMPTS = 10
_HFLIP, _VFLIP, _PLACE_X, _PLACE_Y, _BRIGHTNESS, _CONTRAST = range(2 * _ATTEMPTS, 2 * _ATTEMPTS + 6)

Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
Probability = Annotated[float, Field(ge=0, le=1)]


class Views(StrictModel):
    """What is cut from an image, and how its intensities are changed and normalised.

    Intensities are fractions of white (255, or what the schema declares) throughout; nothing is
    clipped, so all of it suits images that are not RGB.
    """

    size: int = Field(default=224, ge=1)
    """Height and width of a global view, in pixels."""
    count: int = Field(default=2, ge=1)
    """Global views an image."""
    local_size: int = Field(default=96, ge=1)
    """Height and width of a local view, in pixels."""
    local_count: int = Field(default=0, ge=0)
    """Local views an image (multi-crop)."""
    scale: Range = (0.3, 1.0)
    """Share of the image's area that a global crop covers: least, most."""
    local_scale: Range = (0.05, 0.3)
    """The same of a local crop."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop: least, most."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    vflip: Probability = 0.0
    """Probability of a vertical flip."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Intensities are multiplied by a factor in [1 − brightness, 1 + brightness]."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Distances from `mean` are multiplied by a factor in [1 − contrast, 1 + contrast]."""
    channels: int | None = Field(default=None, ge=1, le=6)
    """Channels of a view: those of the images when left out; 3 repeats the one of grey images."""
    mean: list[float] = Field(default=[0.5], min_length=1)
    """Mean to subtract, one for all channels or one each."""
    std: list[Annotated[float, Field(gt=0)]] = Field(default=[0.5], min_length=1)
    """Standard deviation to divide by, one for all channels or one each."""
    normalize: bool = True
    """Subtract `mean` and divide by `std`; otherwise each view is normalised by its own mean and
    standard deviation, channel by channel."""
    evaluation_crop: float = Field(default=1.0, gt=0, le=1)
    """Side of the centre crop of an evaluation, as a share of the image's shorter side."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("scale", "local_scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the least value {low} is above the most {high}")
        for name in ("scale", "local_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"{name}: a crop covers at most the whole image (1)")
        return self

    def per_channel(self, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of every channel, float32 [channels].

        Raises:
            ConfigError: the lists fit neither one nor all channels.
        """
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, channels):
                raise ConfigError(
                    f"views.{name} has {len(getattr(self, name))} values for {channels} channels"
                )
        mean = np.broadcast_to(np.array(self.mean, np.float32), channels)
        return mean, np.broadcast_to(np.array(self.std, np.float32), channels)


@dataclass(frozen=True)
class Draws:
    """What happens to each image of a batch in each of its v views of one size."""

    size: int
    boxes: NDArray[np.int64]
    """[v, n, 4]: left, top, and right, bottom (excluded), in pixels of the stored image."""
    hflip: NDArray[np.bool_]
    """[v, n]"""
    vflip: NDArray[np.bool_]
    """[v, n]"""
    brightness: NDArray[np.float32]
    """[v, n] factor on the intensity."""
    contrast: NDArray[np.float32]
    """[v, n] factor on the distance from the mean."""


def training_draws(
    views: Views,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    positions: NDArray[np.int64],
    seed: int,
    epoch: int,
) -> tuple[Draws, Draws | None]:
    """Draws of the global and, where the recipe has them, local views.

    Args:
        views: the recipe.
        heights, widths: of the stored images, int64 [n].
        positions: places of the samples in the epoch, int64 [n]; the draws depend on nothing else
            but seed and epoch, in particular not on the number of ranks.
        seed, epoch: of the run.
    """
    total = views.count + views.local_count
    numbers = uniforms(positions, total * _DRAWS, derive_key(seed, AUGMENT, epoch))
    numbers = numbers.reshape(len(positions), total, _DRAWS).transpose(1, 0, 2)
    globals_, locals_ = numbers[: views.count], numbers[views.count :]
    first = _draw(views, views.size, views.scale, heights, widths, globals_)
    if not views.local_count:
        return first, None
    return first, _draw(views, views.local_size, views.local_scale, heights, widths, locals_)


def evaluation_draws(views: Views, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Draws:
    """The centre crop of every image, unchanged in intensity, as one view."""
    side = np.maximum(np.rint(np.minimum(heights, widths) * views.evaluation_crop), 1)
    side = side.astype(np.int64)
    left, top = (widths - side) // 2, (heights - side) // 2
    boxes = np.stack([left, top, left + side, top + side], axis=-1)[None]
    no = np.zeros((1, len(heights)), dtype=bool)
    one = np.ones((1, len(heights)), dtype=np.float32)
    return Draws(views.size, boxes, no, no, one, one)


def _draw(
    views: Views,
    size: int,
    scale: tuple[float, float],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    numbers: NDArray[np.float64],
) -> Draws:
    def factor(strength: float, place: int) -> NDArray[np.float32]:
        return (1 + strength * (2 * numbers[..., place] - 1)).astype(np.float32)

    return Draws(
        size=size,
        boxes=_boxes(scale, views.ratio, heights, widths, numbers),
        hflip=numbers[..., _HFLIP] < views.hflip,
        vflip=numbers[..., _VFLIP] < views.vflip,
        brightness=factor(views.brightness, _BRIGHTNESS),
        contrast=factor(views.contrast, _CONTRAST),
    )


def _boxes(
    scale: tuple[float, float],
    ratio: tuple[float, float],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    numbers: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Random resized crops (Szegedy et al. 2015; torchvision's RandomResizedCrop).

    Area and log aspect ratio are uniform; of ten tries the first that fits into the image counts;
    where none does, the largest centred box of an allowed ratio.
    """
    area = scale[0] + (scale[1] - scale[0]) * numbers[..., 0 : 2 * _ATTEMPTS : 2]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * numbers[..., 1 : 2 * _ATTEMPTS : 2])
    image_area = (heights * widths)[None, :, None]
    w = np.rint(np.sqrt(image_area * area * aspect))
    h = np.rint(np.sqrt(image_area * area / aspect))
    fits = (w >= 1) & (h >= 1) & (w <= widths[None, :, None]) & (h <= heights[None, :, None])
    first = np.argmax(fits, axis=-1)[..., None]
    fitting = fits.any(axis=-1)
    fallback_w = np.clip(np.rint(heights * ratio[1]), 1, widths)
    fallback_h = np.clip(np.rint(widths / ratio[0]), 1, heights)
    w = np.where(fitting, np.take_along_axis(w, first, -1)[..., 0], fallback_w).astype(np.int64)
    h = np.where(fitting, np.take_along_axis(h, first, -1)[..., 0], fallback_h).astype(np.int64)
    x = np.where(fitting, (numbers[..., _PLACE_X] * (widths - w + 1)), (widths - w) // 2)
    y = np.where(fitting, (numbers[..., _PLACE_Y] * (heights - h + 1)), (heights - h) // 2)
    x, y = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    return np.stack([x, y, x + w, y + h], axis=-1)


def affine(
    views: Views, draws: Draws, channels: int, white: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Brightness, contrast and normalisation as one affine map of pixel values.

    With m, s the recipe's mean and standard deviation, b and c the drawn factors, and x = p/white:
    output = (b·(m + c·(x − m)) − m) / s = (p − shift) / divisor.

    Returns:
        shift and divisor, float32 [v, n, channels], in units of the stored pixels.
    """
    mean, std = views.per_channel(channels)
    b = draws.brightness[..., None].astype(np.float64)
    c = draws.contrast[..., None].astype(np.float64)
    shift = (mean - b * mean * (1 - c)) / (b * c)
    divisor = std / (b * c)
    return (shift * white).astype(np.float32), (divisor * white).astype(np.float32)
