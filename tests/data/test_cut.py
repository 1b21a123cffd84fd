"""Views from pixels: the native operator against plain PyTorch, and what it refuses."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fino_fast import ops
from fino_fast.data import Views
from fino_fast.data.cut import Cutter, cut_views, empty_views
from fino_fast.data.pipeline import PixelForm
from fino_fast.data.views import training_draws

# Shapes that are no multiples of the 16 rows made together, single pixels, strips.
SHAPES = [(1, 1), (5, 3), (40, 33), (17, 200), (301, 16)]
WHITE = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 3}


def images(dtype: torch.dtype, channels: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    return [
        (torch.rand(h, w, channels, generator=generator) * WHITE[dtype]).to(dtype)
        for h, w in SHAPES
    ]


def arguments(pictures: list[torch.Tensor], planes: int, size: int) -> tuple[Any, ...]:
    """What the operator takes for two views of each; `out` holds NaN: a missed write shows."""
    recipe = Views(size=size, count=2, vflip=0.5, brightness=0.2, contrast=0.3, mean=[0.4])
    heights, widths = np.array(SHAPES, dtype=np.int64).T
    draws, _ = training_draws(recipe, heights, widths, np.arange(len(SHAPES)), 0, 0)
    mirrors = [torch.from_numpy(np.ascontiguousarray(x)) for x in (draws.hflip, draws.vflip)]
    shape = (2, len(pictures), planes)
    shift = torch.linspace(-3, 100, 2 * len(pictures) * planes).reshape(shape)
    divisor = torch.linspace(0.5, 40, 2 * len(pictures) * planes).reshape(shape)
    out = torch.full((*shape, size, size), torch.nan)
    return pictures, torch.from_numpy(draws.boxes), *mirrors, shift, divisor, out


@pytest.mark.parametrize("size", [1, 16, 23, 64])
@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", list(WHITE))
def test_native_views_are_those_of_torch(dtype: torch.dtype, channels: int, size: int) -> None:
    """Grey ones as three planes, too."""
    planes = 3 if channels == 1 else channels
    native, plain = (arguments(images(dtype, channels), planes, size) for _ in range(2))
    ops.cut_views(*native)
    cut_views(*plain)
    assert native[2].any()
    assert native[3].any()
    tolerance = 4e-6 * WHITE[dtype] / float(native[5].min())
    torch.testing.assert_close(native[-1], plain[-1], rtol=1e-5, atol=tolerance)


def test_one_image_at_a_time_gives_the_same_bits_as_a_batch() -> None:
    views = Views(size=20, count=3, normalize=False)
    heights, widths = np.array(SHAPES, dtype=np.int64).T
    draws, _ = training_draws(views, heights, widths, np.arange(len(SHAPES)), 0, 0)
    cutter = Cutter(views, draws, PixelForm("uint8", 1, 1, 255.0))
    pictures = images(torch.uint8, 1)
    whole, parts = (empty_views(draws, len(SHAPES), 1) for _ in range(2))
    cutter.cut(pictures, 0, whole)
    for i, picture in enumerate(pictures):
        cutter.cut([picture], i, parts)
    assert torch.equal(whole, parts)


def test_without_native_code_the_views_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    views = Views(size=24, vflip=0.5, contrast=0.3)
    draws, _ = training_draws(views, *np.array(SHAPES).T, np.arange(len(SHAPES)), 0, 0)
    cutter = Cutter(views, draws, PixelForm("uint8", 1, 1, 255.0))
    pictures = images(torch.uint8, 1)
    native, plain = (empty_views(draws, len(SHAPES), 1) for _ in range(2))
    cutter.cut(pictures, 0, native)
    monkeypatch.setattr(ops, "LOAD_ERROR", "not built")
    cutter.cut(pictures, 0, plain)
    torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "box", [(-1, 0, 3, 3), (0, 0, 4, 5), (0, 0, 3, 6), (2, 1, 2, 3), (0, 3, 3, 2), (2**62, 0, 3, 3)]
)
def test_a_box_outside_its_image_is_refused_by_number(box: tuple[int, ...]) -> None:
    call = arguments(images(torch.uint8, 1), 1, 8)
    call[1][1, 1] = torch.tensor(box)
    with pytest.raises(RuntimeError, match="empty or leaves image 1"):
        ops.cut_views(*call)
    assert call[-1].isnan().all()


WRONG = {
    0: [images(torch.uint8, 2), images(torch.uint8, 1)[:4], [torch.zeros(5, 3)] * 5],
    1: [torch.zeros(2, 5, 4), torch.zeros(2, 5, 3, dtype=torch.int64)],
    2: [torch.zeros(2, 5)],
    3: [torch.zeros(2, 4, dtype=torch.bool)],
    4: [torch.zeros(2, 5, 2), torch.zeros(2, 5, 1, dtype=torch.float64)],
    5: [torch.zeros(2, 5, 1, 1)],
    6: [torch.zeros(2, 5, 1, 8, 9), torch.zeros(2, 5, 1, 8, 8).double(), torch.zeros(5, 1, 8, 8)],
}


@pytest.mark.parametrize(
    ("place", "value"), list(itertools.chain(*([(k, v) for v in vs] for k, vs in WRONG.items())))
)
def test_wrong_shapes_and_types_are_refused(place: int, value: Any) -> None:
    call = list(arguments(images(torch.uint8, 1), 1, 8))
    call[place] = value
    with pytest.raises(RuntimeError, match=r"fino: "):
        ops.cut_views(*call)


def test_signed_pixels_are_refused() -> None:
    call = arguments([image.to(torch.int16) for image in images(torch.uint8, 1)], 1, 8)
    with pytest.raises(RuntimeError, match="pixels must be uint8, uint16 or float32"):
        ops.cut_views(*call)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fino.cut_views.default, arguments(images(torch.uint8, 3), 3, 9))
