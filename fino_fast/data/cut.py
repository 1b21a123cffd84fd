"""Views from decoded pixels on the CPU: by the native code, or in plain PyTorch without it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from fino_fast import ops

from .pipeline import PixelForm
from .views import Draws, Views, affine

_EPSILON = 1e-6


class Cutter:
    """Carries out what was drawn for the images of a batch, for its views of one size."""

    def __init__(self, views: Views, draws: Draws, form: PixelForm) -> None:
        shape = (*draws.hflip.shape, form.channels)
        shift, divisor = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        if views.normalize:
            shift, divisor = affine(views, draws, form.channels, form.white)
        arrays = (draws.boxes, draws.hflip, draws.vflip, shift, divisor)
        self._drawn = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        self._white = None if views.normalize else form.white

    def cut(self, images: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """Write the views of some images.

        Args:
            images: [H, W, C] or [H, W, 1], contiguous; of any shape that holds their boxes.
            first: place in the batch of the first of them.
            out: float32 [V, B, C, S, S], of the whole batch.
        """
        part = slice(first, first + len(images))
        drawn = [tensor[:, part].contiguous() for tensor in self._drawn]
        own = out[:, part]
        cut: Callable[..., None] = cut_views if ops.LOAD_ERROR else ops.cut_views
        cut(list(images), *drawn, own)
        if self._white is not None:
            own.copy_(self_normalized(own, self._white))


def empty_views(draws: Draws, images: int, channels: int) -> torch.Tensor:
    """Room for the views [V, B, C, S, S] of a batch."""
    # NumPy asks for huge pages: of small ones a batch has thousands, whose first touch took a third
    # of the time.
    shape = (len(draws.boxes), images, channels, draws.size, draws.size)
    return torch.from_numpy(np.empty(shape, np.float32))


def cut_views(
    images: list[torch.Tensor],
    boxes: torch.Tensor,
    mirror_x: torch.Tensor,
    mirror_y: torch.Tensor,
    shift: torch.Tensor,
    divisor: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`ops.cut_views` in plain PyTorch, and its oracle."""
    for i, image in enumerate(images):
        for v, (left, top, right, bottom) in enumerate(boxes[:, i].tolist()):
            crop = image[top:bottom, left:right].to(torch.float32).permute(2, 0, 1)
            view = F.interpolate(crop[None], out.shape[-2:], mode="bilinear", antialias=True)[0]
            mirrors = ((2, mirror_x), (1, mirror_y))
            view = view.flip([dim for dim, mirror in mirrors if mirror[v, i]])
            out[v, i] = (view - shift[v, i, :, None, None]) / divisor[v, i, :, None, None]


def self_normalized(view: torch.Tensor, white: float) -> torch.Tensor:
    """Each channel of [..., H, W] less its mean, over its standard deviation."""
    mean = view.mean((-2, -1), keepdim=True)
    variance = view.var((-2, -1), keepdim=True, correction=0)
    return (view - mean) / (variance + (_EPSILON * white) ** 2).sqrt()
