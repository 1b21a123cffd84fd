import pytest
import torch
from fino_fast.kernels.contrastive_backward import contrastive_backward
from fino_fast.kernels.contrastive_forward import contrastive_forward
from fino_fast.kernels.tiles import TILES, forced
from kernel_case import TOLERANCE, close, expected_contrastive, random
from test_contrastive_forward import SHAPES
from torch import Tensor

from fino_fast.reference import accumulation_dtype


def run(
    p: Tensor, scale: float, views: int, two_tower: bool, device: torch.device, grad: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(gradient at p, gradient at the scale)."""
    sums = accumulation_dtype(p.dtype)
    p, s = p.to(device), torch.tensor(scale, dtype=sums, device=device)
    _, lse = contrastive_forward(p, p, s, views, 0, two_tower)
    upstream = torch.tensor(grad, dtype=sums, device=device)
    at_p, at_scale = contrastive_backward(upstream, p, p, s, lse, lse, views, 0, two_tower)
    assert at_p.dtype == p.dtype
    return at_p.cpu(), at_scale.cpu()


def check(
    p: Tensor, scale: float, views: int, two_tower: bool, device: torch.device, grad: float = 1.0
) -> None:
    at_p, at_scale = run(p, scale, views, two_tower, device, grad)
    _, by_p, by_scale = expected_contrastive(p, torch.tensor(scale), views, two_tower)
    # Of one column, or of one row and its view, the gradient is exactly zero: compare with p̂'s.
    close(at_p, grad * by_p, p.dtype, size=max(grad * by_p.abs().max().item(), 1e-3))
    close(at_scale, grad * by_scale, p.dtype, size=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check(random(2 * 21, 45, dtype=dtype, seed=0), 8.0, 2, False, device, grad=3.0)


@pytest.mark.parametrize(("views", "images", "width", "two_tower"), SHAPES)
def test_odd_shapes(
    views: int, images: int, width: int, two_tower: bool, device: torch.device
) -> None:
    p = random(views * images, width, dtype=torch.float64, seed=1)
    check(p, 2.0, views, two_tower, device)


def test_a_zero_row_is_scaled_and_not_projected(device: torch.device) -> None:
    p = random(2 * 9, 4, dtype=torch.float64, seed=2)
    p[3] = 0
    check(p, 100.0, 2, False, device)


def test_strided_rows(device: torch.device) -> None:
    p = random(12, 2 * 7, dtype=torch.float64, seed=3)
    check(p.T, 2.0, 2, False, device)


def test_ranks_together_give_the_gradient_of_the_whole_batch(device: torch.device) -> None:
    views, local, images, width = 2, 3, 9, 35
    p = random(views * images, width, dtype=torch.float64, seed=4).to(device)
    scale = torch.tensor(3.0, dtype=torch.float64, device=device)
    one = torch.ones((), dtype=torch.float64, device=device)
    _, lse = contrastive_forward(p, p, scale, views, 0, False)
    at_p, at_scale = torch.empty_like(p).view(views, images, width), 0.0
    for first in range(0, images, local):
        mine = slice(first, first + local)
        rows = p.view(views, images, width)[:, mine].flatten(0, 1)
        gradient, part = contrastive_backward(
            one,
            rows,
            p,
            scale,
            lse.view(views, images)[:, mine].flatten(),
            lse,
            views,
            first,
            False,
        )
        at_p[:, mine] = gradient.view(views, local, width)
        at_scale += part
    _, by_p, by_scale = expected_contrastive(p.cpu(), scale.cpu(), views, False)
    close(at_p.cpu().view(-1, width), by_p, p.dtype)
    close(at_scale.cpu(), by_scale, p.dtype)


def test_tiles_of_a_gpu(device: torch.device) -> None:
    p = random(2 * 35, 33, dtype=torch.float16, seed=5)
    with forced(TILES[9, 2]):
        check(p, 4.0, 2, False, device)
