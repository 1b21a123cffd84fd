"""The contrastive term as a bank: the rows of all ranks."""

import pytest
import torch
from fino_fast.kernels.backward import Upstream, backward
from fino_fast.kernels.bank import Bank
from fino_fast.kernels.forward import forward
from fino_fast.kernels.tiles import TILES, forced
from kernel_case import (
    TOLERANCE,
    close,
    contrastive_bank,
    expected_contrastive,
    on_device,
    random,
)
from torch import Tensor

from fino_fast.reference import accumulation_dtype, contrastive_rows
from fino_fast.terms import ContrastiveCall, Step
from fino_fast.triton import Triton

SHAPES = [(2, 1, 1, False), (2, 37, 3, True), (3, 13, 70, False), (5, 2, 2, False)]


def check(
    p: Tensor, scale: float, views: int, two_tower: bool, device: torch.device, grad: float = 1.0
) -> None:
    """Assert value and both gradients of a step of the backend."""
    sums = accumulation_dtype(p.dtype)
    rows = on_device(p, device).requires_grad_()
    logit_scale = torch.tensor(scale, dtype=sums, device=device).requires_grad_()
    call = ContrastiveCall(rows, logit_scale, views, two_tower)
    loss = Triton().step(Step(call)).contrastive
    assert loss is not None
    upstream = torch.tensor(grad, dtype=sums, device=device)
    at_p, at_scale = torch.autograd.grad(loss, [rows, logit_scale], upstream)
    exact, by_p, by_scale = expected_contrastive(p, torch.tensor(scale), views, two_tower)
    close(loss.cpu(), exact, p.dtype, size=max(1.0, exact.item()))
    # Of one column, or of one row and its view, the gradient is exactly zero: compare with p̂'s.
    assert at_p.dtype == p.dtype
    close(at_p.cpu(), grad * by_p, p.dtype, size=max(abs(grad) * by_p.abs().max().item(), 1e-3))
    close(at_scale.cpu(), grad * by_scale, p.dtype, size=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check(random(2 * 21, 45, dtype=dtype, seed=0), 8.0, 2, False, device, grad=3.0)


@pytest.mark.parametrize(("views", "images", "width", "two_tower"), SHAPES)
def test_odd_shapes(
    views: int, images: int, width: int, two_tower: bool, device: torch.device
) -> None:
    check(random(views * images, width, dtype=torch.float64, seed=1), 2.0, views, two_tower, device)


def test_a_zero_row_is_scaled_and_not_projected(device: torch.device) -> None:
    p = random(2 * 9, 4, dtype=torch.float64, seed=2)
    p[3] = 0
    check(p, 100.0, 2, False, device)


def test_strided_rows(device: torch.device) -> None:
    p = random(12, 2 * 7, dtype=torch.float64, seed=3)
    check(p.T, 2.0, 2, False, device)
    padded = random(2 * 7, 20, dtype=torch.float64, seed=3)
    check(padded[:, :12], 2.0, 2, False, device)


def test_columns_split_among_programs(device: torch.device) -> None:
    """Few rows of one rank against many columns, forward; chunks of them, backward."""
    rank_bank, columns = ranks(views=2, images=150, local=3, device=device)[0]
    losses = forward([rank_bank])
    exact = contrastive_rows(rank_bank.x, columns, rank_bank.offset[0], 2, 0).sum() / len(columns)
    close(losses.losses[0].cpu(), exact.cpu(), torch.float64)


def ranks(views: int, images: int, local: int, device: torch.device) -> list[tuple[Bank, Tensor]]:
    """(bank, columns) of every rank that has `local` of the images."""
    p = random(views * images, 9, dtype=torch.float64, seed=4).to(device)
    scale = torch.tensor(3.0, dtype=torch.float64, device=device)
    rows = p.view(views, images, 9)
    return [
        (
            contrastive_bank(
                rows[:, first : first + local].flatten(0, 1), p, scale, views, first, False
            ),
            p,
        )
        for first in range(0, images, local)
    ]


def test_ranks_together_give_the_whole_batch(device: torch.device) -> None:
    views, images, local = 3, 9, 3
    of_rank = ranks(views, images, local, device)
    p = of_rank[0][1]
    results = [forward([bank]) for bank, _ in of_rank]
    lse = torch.cat([result.lse[0].view(views, local) for result in results], 1).flatten()
    one = torch.ones((), dtype=torch.float64, device=device)
    at_p, at_scale = torch.empty_like(p).view(views, images, 9), 0.0
    for index, ((bank, _), result) in enumerate(zip(of_rank, results, strict=True)):
        gradients = backward([bank], [Upstream(one, result.lse[0], lse, True)], [bank.x], [], False)
        mine = slice(index * local, (index + 1) * local)
        at_p[:, mine] = gradients.rows[0].view(views, local, 9)
        assert gradients.offset[0] is not None
        at_scale = at_scale + gradients.offset[0]
    exact, by_p, by_scale = expected_contrastive(p.cpu(), torch.tensor(3.0), views, False)
    close(sum(result.losses[0] for result in results).cpu(), exact, p.dtype)
    close(at_p.cpu().view(-1, 9), by_p, p.dtype)
    close(at_scale.cpu(), by_scale, p.dtype)


def test_tiles_of_a_gpu(device: torch.device) -> None:
    with forced(TILES[9, torch.bfloat16]):
        check(random(2 * 70, 33, dtype=torch.float16, seed=5), 4.0, 2, False, device)


def test_a_row_that_is_not_finite_shows_in_the_loss(device: torch.device) -> None:
    p = random(2 * 5, 4, dtype=torch.float32, seed=6).to(device)
    p[2, 1] = torch.nan
    scale = torch.tensor(10.0, device=device)
    assert Triton().step(Step(ContrastiveCall(p, scale, 2))).contrastive.isnan()
