"""Lengths per pixel (`per_pixel_scale`, such as µm): what the crop of a view makes of them.

A view shows a crop of w × h pixels of the stored image on size × size pixels. One pixel of the view
then stands for √(w·h) / size pixels of the image (the geometric mean of both directions), and the
factor's value in this view is the image's times that. It differs from view to view of one image, so
the loss is given one value a view.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fino_fast.data import Batch, ShardSet, Views
from fino_fast.data.order import SHUFFLE, derive_key, permute
from fino_fast.data.views import training_draws

from .factors import Statistics

_IMAGES = 10_000


def view_scales(boxes: Tensor, size: int) -> Tensor:
    """Pixels of the stored image that one pixel of a view stands for.

    Args:
        boxes: [..., 4], left, top, right, bottom of the crops in pixels of the stored image.
        size: height and width of the views.

    Returns:
        [...], of the boxes' dtype.
    """
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (width * height).sqrt() / size


def metadata_in_views(batch: Batch, views: Views, names: Sequence[str]) -> dict[str, Tensor]:
    """A batch's metadata, with those of `names` as values [V, B] of its views, global ones first.

    Args:
        batch: of a training epoch.
        views: its recipe.
        names: the active factors that are declared `per_pixel_scale`.
    """
    if not names:
        return batch.metadata
    scales = view_scales(batch.boxes, views.size)
    if batch.local_boxes is not None:
        scales = torch.cat([scales, view_scales(batch.local_boxes, views.local_size)])
    return batch.metadata | {name: batch.metadata[name] * scales for name in names}


def statistics_in_views(
    shards: ShardSet, split: str, views: Views, seed: int
) -> dict[str, Statistics]:
    """Statistics of the values in the views, by name of each factor declared `per_pixel_scale`.

    Mean and standard deviation are those of the first 10,000 images of the first epoch in their own
    crops. The bounds are the image's times the least and greatest scale of these crops. All are
    functions of the set, the recipe and the seed, so ranks and continued runs agree.

    Raises:
        DataError: there is no such split, or the metadata are damaged.
    """
    names = [name for name, factor in shards.schema.factors.items() if factor.per_pixel_scale]
    if not names:
        return {}
    samples = shards.split(split)
    places = np.arange(min(_IMAGES, len(samples)))
    rows = samples.rows(permute(places, len(samples), derive_key(seed, SHUFFLE, 0)))
    sides = [shards.index[rows][side].astype(np.int64) for side in ("height", "width")]
    draws = training_draws(views, sides[0], sides[1], places, seed, 0)
    scales = torch.cat(
        [view_scales(torch.from_numpy(d.boxes).double(), d.size) for d in draws if d is not None]
    ).numpy()
    found = {}
    for name, values in shards.metadata.of(rows, names).items():
        factor = shards.schema.factors[name]
        seen = values[:, 0] * scales
        found[name] = Statistics(
            mean=[float(np.nanmean(seen))],
            std=[float(np.nanstd(seen))],
            low=[factor.low[0] * float(scales.min())],
            high=[factor.high[0] * float(scales.max())],
        )
    return found
