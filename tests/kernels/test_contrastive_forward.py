import pytest
import torch
from fino_fast.kernels.contrastive_forward import contrastive_forward
from fino_fast.kernels.tiles import TILES, forced
from kernel_case import TOLERANCE, close, expected_contrastive, random
from torch import Tensor

from fino_fast.reference import accumulation_dtype, contrastive_rows

SHAPES = [(2, 1, 1, False), (2, 37, 3, True), (3, 13, 70, False), (5, 2, 2, False)]


def run(
    p: Tensor, tau: float, views: int, two_tower: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    scale = torch.tensor(1 / tau, dtype=accumulation_dtype(p.dtype), device=device)
    loss, lse = contrastive_forward(p.to(device), p.to(device), scale, views, 0, two_tower)
    return loss.cpu(), lse.cpu()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    p = random(2 * 21, 45, dtype=dtype, seed=0)
    loss, _ = run(p, 0.125, 2, False, device)
    close(loss, expected_contrastive(p, torch.tensor(8.0), 2, False)[0], dtype)


@pytest.mark.parametrize(("views", "images", "width", "two_tower"), SHAPES)
def test_odd_shapes(
    views: int, images: int, width: int, two_tower: bool, device: torch.device
) -> None:
    p = random(views * images, width, dtype=torch.float64, seed=1)
    loss, lse = run(p, 0.5, views, two_tower, device)
    close(loss, expected_contrastive(p, torch.tensor(2.0), views, two_tower)[0], p.dtype, size=1.0)
    assert lse.shape == (views * images,)


def test_small_temperature_and_a_zero_row(device: torch.device) -> None:
    p = random(2 * 9, 4, dtype=torch.float32, seed=2)
    p[3] = 0
    loss, _ = run(p, 0.01, 2, False, device)
    close(loss, expected_contrastive(p, torch.tensor(100.0), 2, False)[0], p.dtype)


def test_strided_rows(device: torch.device) -> None:
    p = random(12, 2 * 7, dtype=torch.float64, seed=3)
    expected = expected_contrastive(p.T.contiguous(), torch.tensor(2.0), 2, False)[0]
    close(run(p.T, 0.5, 2, False, device)[0], expected, p.dtype)
    padded = random(2 * 7, 20, dtype=torch.float64, seed=3)
    padded[:, :12] = p.T
    close(run(padded[:, :12], 0.5, 2, False, device)[0], expected, p.dtype)


def test_rows_of_one_rank_among_the_columns_of_all(device: torch.device) -> None:
    views, local, images = 3, 4, 12
    columns = random(views * images, 9, dtype=torch.float64, seed=4)
    scale = torch.tensor(3.0, dtype=torch.float64)
    for first in range(0, images, local):
        rows = columns.view(views, images, 9)[:, first : first + local].flatten(0, 1)
        loss, _ = contrastive_forward(
            rows.to(device), columns.to(device), scale.to(device), views, first, False
        )
        expected = contrastive_rows(rows, columns, scale, views, first).sum() / len(columns)
        close(loss.cpu(), expected, rows.dtype)


def test_tiles_of_a_gpu(device: torch.device) -> None:
    p = random(2 * 70, 33, dtype=torch.float16, seed=5)
    with forced(TILES[9, 2]):
        loss, _ = run(p, 0.25, 2, False, device)
    close(loss, expected_contrastive(p, torch.tensor(4.0), 2, False)[0], p.dtype)


def test_a_row_that_is_not_finite_shows_in_the_loss(device: torch.device) -> None:
    p = random(2 * 5, 4, dtype=torch.float32, seed=6)
    p[2, 1] = torch.nan
    assert run(p, 0.1, 2, False, device)[0].isnan()
