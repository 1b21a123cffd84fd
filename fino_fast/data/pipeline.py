"""What both pipelines share: the pixels' form, the order of work, the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fino_fast.errors import DataError

from .images import decode
from .index import FORMS
from .shardset import DamagedSample, ShardSet
from .stored import ImageRejected, Pixels
from .views import Draws, Views


@dataclass(frozen=True)
class PixelForm:
    """What all images that a loader reads have in common."""

    dtype: str
    """uint8, uint16 or float32."""
    stored: int
    """Channels to decode."""
    channels: int
    """Channels of a view."""
    white: float
    """Pixel value that counts as 1."""


def pixel_form(shards: ShardSet, split: str, views: Views) -> PixelForm:
    """The form of the images of a split.

    Raises:
        DataError: they have no common form, or not the one that the recipe asks for.
    """
    forms = shards.split(split).forms
    dtypes = {FORMS[form][1] for form, _ in forms}
    if len(dtypes) > 1:
        raise DataError(
            f"{shards.folder}: images of types {sorted(dtypes)} in one split: their values have no "
            "common scale; convert them to one type"
        )
    (dtype,) = dtypes
    found = sorted({channels for _, channels in forms})
    wanted = views.channels
    if wanted is None:
        if len(found) > 1:
            raise DataError(
                f"{shards.folder}: images of {found} channels in one split: set views.channels"
            )
        wanted = found[0]
    if any(c not in (wanted, 1) for c in found) or (wanted != 3 and found != [wanted]):
        raise DataError(
            f"{shards.folder}: images of {found} channels do not give views of {wanted}; only grey "
            "images are expanded, and only to 3"
        )
    # Grey images are decoded and resized as one channel; beside colour they are decoded as RGB.
    stored = found[0] if len(found) == 1 else wanted
    views.per_channel(wanted)
    return PixelForm(dtype, stored, wanted, white_value(shards, dtype))


def white_value(shards: ShardSet, dtype: str) -> float:
    """The pixel value that counts as 1 in images of a type."""
    return shards.schema.declaration.images.white(dtype)


def decode_sample(shards: ShardSet, row: int, payload: bytes) -> Pixels:
    """Pixels [H, W, C] of a sample, of the shape that the index has.

    Raises:
        DamagedSample: the bytes do not decode to that; the message names id, shard and offset.
    """
    try:
        pixels = decode(payload, shards.extension(row))
    except ImageRejected as rejection:
        raise DamagedSample(f"{shards.describe(row)}: {rejection.detail}") from rejection
    record = shards.index[row]
    expected = (int(record["height"]), int(record["width"]), int(record["channels"]))
    if pixels.shape != expected:
        raise DamagedSample(f"{shards.describe(row)}: is {pixels.shape}, the index says {expected}")
    return pixels


class DamagedSamples(DataError):
    """Samples of one batch that do not decode; `faults` says what is wrong, by place in it."""

    def __init__(self, faults: dict[int, DamagedSample]) -> None:
        self.faults = faults
        super().__init__("; ".join(str(fault) for fault in faults.values()))


class Pipeline(Protocol):
    """Decodes and augments batches; `submit` may run ahead of `result` by `depth` batches."""

    depth: int

    def submit(
        self, rows: Sequence[int], payloads: Sequence[bytes], draws: Sequence[Draws]
    ) -> None:
        """Start work on a batch.

        Args:
            rows: sample numbers, for messages.
            payloads: encoded images.
            draws: one entry a view size.

        Raises:
            DamagedSamples: an image does not decode, where that is seen at once.
        """

    def result(self) -> list[torch.Tensor]:
        """The oldest batch that was submitted: float32 [v, n, C, H, W] for each of its draws.

        Raises:
            DamagedSamples: images of it do not decode.
            DataError: the pipeline failed on sound images.
        """

    def reset(self) -> None:
        """Forget what was submitted."""
