"""`fino-fast inspect`: what a person looks at before training: pictures and distributions."""

import itertools
from collections import Counter

import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageOps

from fino_fast.errors import DataError

from .index import FORMS
from .order import PLAN, derive_key, permute
from .pipeline import decode_sample, white_value
from .schema import Factor, number_matrix
from .shardset import ShardSet

_TILE, _CAPTION, _GAP = 160, 14, 4
_BAR, _LINES = 40, 12
_ID, _LABEL = 24, 32  # signs that have room below a tile, and in front of a bar


def contact_sheet(
    shards: ShardSet, split: str, count: int, seed: int = 0, channel: int = 0
) -> Image.Image:
    """A random sample of a split as one picture, each image above its id.

    Intensities are shown as training sees them, with the declared white as white: a sheet that is
    black or burnt out says that `bits_used` or `scale` is wrong.

    Args:
        shards: the set.
        split: the split that images are taken from.
        count: images, at most.
        seed: which images.
        channel: what is shown of images with other than 1 or 3 channels, from 0.

    Raises:
        DataError: there is no such split or channel, or a sample is damaged.
    """
    rows = shards.split(split)
    places = permute(np.arange(min(count, len(rows))), len(rows), derive_key(seed, PLAN))
    columns = int(np.ceil(np.sqrt(len(places))))
    lines = -(-len(places) // columns)
    width, height = _TILE + _GAP, _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * width, lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows.rows(places).tolist()):
        x, y = i % columns * width, i // columns * height
        tile = _thumbnail(shards, row, channel)
        sheet.paste(tile, (x, y + _TILE - tile.height))
        draw.text((x, y + _TILE), shorten_name(shards.ids[row], _ID), fill="black")
    return sheet


def _thumbnail(shards: ShardSet, row: int, channel: int) -> Image.Image:
    pixels = decode_sample(shards, row, shards.read(row))
    if pixels.shape[2] not in (1, 3):
        if channel >= pixels.shape[2]:
            raise DataError(
                f"{shards.describe(row)}: has channels 0 … {pixels.shape[2] - 1}, not {channel}"
            )
        pixels = pixels[:, :, channel : channel + 1]
    pixels = pixels if pixels.shape[2] == 3 else pixels[:, :, 0]
    share = pixels.astype(np.float32) / white_value(shards, pixels.dtype.name)
    image = Image.fromarray((share.clip(0, 1) * 255).round().astype(np.uint8))
    return ImageOps.contain(image, (_TILE, _TILE)).convert("RGB")


def summary_lines(shards: ShardSet) -> list[str]:
    """Splits, image forms and the distribution of every factor, over all samples of the set."""
    sizes = [f"{len(shards.split(name))} {name}" for name in _splits_with_samples(shards)]
    index = shards.index
    lines = [
        f"{len(shards)} samples: {', '.join(sizes)}",
        f"images: {index['height'].min()}×{index['width'].min()} to "
        f"{index['height'].max()}×{index['width'].max()} pixels (height×width); "
        + ", ".join(_image_types(shards)),
    ]
    for name, factor in shards.schema.factors.items():
        lines += ["", *factor_lines(shards, name, factor)]
    return lines


def _image_types(shards: ShardSet) -> list[str]:
    """Number types and channels of the images, which one split must not mix, with their counts."""
    counts: Counter[tuple[str, int]] = Counter()
    pairs = shards.index["form"].astype(np.int64) << 8 | shards.index["channels"]
    for pair, count in zip(*np.unique(pairs, return_counts=True), strict=True):
        counts[FORMS[pair >> 8][1], int(pair & 255)] += int(count)
    return [
        f"{count} {dtype} of {channels} channel{'s' if channels > 1 else ''}"
        for (dtype, channels), count in counts.most_common()
    ]


def _splits_with_samples(shards: ShardSet) -> list[str]:
    return [shards.schema.splits[code] for code in np.unique(shards.index["split"])]


def factor_lines(shards: ShardSet, name: str, factor: Factor) -> list[str]:
    """A factor's distribution as bars of text."""
    raw = shards.raw_column(name)
    if factor.moments is None:
        flat = pc.list_flatten(raw) if factor.kind == "multi" else raw
        counts = Counter(flat.drop_null().to_pylist())
        missing = raw.null_count
        ranked = counts.most_common(_LINES)
        bars = [(shorten_name(value, _LABEL), count) for value, count in ranked]
        if len(counts) > _LINES:
            bars.append((f"{len(counts) - _LINES} more", sum(counts.values()) - _total(ranked)))
    else:
        values = number_matrix(raw)
        missing = int(np.isnan(values).any(axis=1).sum())
        seen = values[:, 0][~np.isnan(values[:, 0])]
        numbers, edges = np.histogram(seen, bins=_LINES)
        bars = [
            (f"{low:.4g} to {high:.4g}", int(n))
            for (low, high), n in zip(itertools.pairwise(edges), numbers, strict=True)
            if len(seen)
        ]
    head = f"{name} ({factor.kind}, {factor.role}): {100 * missing / len(raw):.3g} % missing"
    if factor.moments is not None and factor.width > 1 and factor.kind != "cyclic":
        head += f"; first of {factor.width} columns"
    longest = max((len(label) for label, _ in bars), default=0)
    most = max((count for _, count in bars), default=1)
    return [
        head,
        *(f"  {label:<{longest}} {'█' * round(_BAR * n / most)} {n}" for label, n in bars),
    ]


def shorten_name(name: str, length: int) -> str:
    """At most `length` printable signs of a name on one line; of a long one both ends."""
    line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name)
    if len(line) <= length:
        return line
    front = length // 3
    return f"{line[:front]}…{line[front + 1 - length :]}"


def _total(pairs: list[tuple[str, int]]) -> int:
    return sum(count for _, count in pairs)
