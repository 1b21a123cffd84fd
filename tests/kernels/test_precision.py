"""Error to fp64 at most twice what plain PyTorch in the same dtype loses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fino_fast.kernels.contrastive_backward import contrastive_backward
from fino_fast.kernels.contrastive_forward import contrastive_forward
from kernel_case import head_call, random, run_heads
from torch import Tensor

ROWS = 40
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def allowed(dtype: torch.dtype, device: torch.device) -> float:
    # The interpreter cuts bf16 off where a GPU and PyTorch round: twice the error at each rounding.
    return 4.0 if dtype == torch.bfloat16 and device.type == "cpu" else 2.0


def assert_no_worse(
    ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype, factor: float
) -> None:
    for index, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        mine_off, theirs_off = ((x.cpu().double() - true).norm().item() for x in (mine, theirs))
        # Where plain PyTorch is lucky: one rounding of the result, or, of a mean over the rows, one
        # of their sum and of the division, and one rounding of each row in the inputs' dtype.
        rounding = torch.finfo(theirs.dtype).eps / 2
        if true.dim() == 0:
            rounding = max(2 * rounding, torch.finfo(dtype).eps / 2 / ROWS**0.5)
        floor = rounding * true.norm().item()
        assert mine_off <= factor * max(theirs_off, floor), f"output {index}"


def with_gradients(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_head(dtype: torch.dtype, device: torch.device) -> None:
    call = head_call("linear", ROWS, 40, 40, dtype, seed=1)
    call = replace(call, target=call.target.clamp_min(0), inv_count=torch.tensor(1 / ROWS))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)),
                               call.target)  # fmt: skip

    leaves = [call.x, call.bank, call.offset]
    plain = with_gradients(loss, [leaf.to(dtype) for leaf in leaves])
    exact = with_gradients(loss, [leaf.double() for leaf in leaves])
    losses, _, rows, bank, offset = run_heads([call], device)
    ours = [losses[0], rows[0], bank[0], offset[0]]
    assert_no_worse([t for t in ours if t is not None], plain, exact, dtype, allowed(dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prototype_head(dtype: torch.dtype, device: torch.device) -> None:
    call = head_call("prototype", ROWS, 40, 40, dtype, seed=2)
    call = replace(
        call,
        target=call.target.clamp_min(0) % 40,
        counts=torch.ones(40, dtype=torch.int64),
        inv_count=torch.tensor(1 / ROWS),
    )

    def loss(x: Tensor) -> Tensor:
        bank, phi = F.normalize(call.bank.to(x.dtype)), call.offset.to(x.dtype)
        logits = F.normalize(x) @ bank.T / phi
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)),
                               call.target)  # fmt: skip

    plain, exact = with_gradients(loss, [call.x]), with_gradients(loss, [call.x.double()])
    losses, _, rows, *_ = run_heads([call], device)
    assert_no_worse([losses[0], rows[0]], plain, exact, dtype, allowed(dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contrastive(dtype: torch.dtype, device: torch.device) -> None:
    """The gradient at 1/τ too."""
    images, scale = ROWS // 2, torch.tensor(8.0)
    p = random(2 * images, 70, dtype=dtype, seed=3)
    same = torch.eye(2 * images, dtype=torch.bool)
    positive = torch.arange(2 * images).roll(images)

    def loss(p: Tensor, scale: Tensor) -> Tensor:
        unit = F.normalize(p)
        logits = (unit @ unit.T).to(scale.dtype) * scale
        return F.cross_entropy(logits.masked_fill(same, -torch.inf), positive)

    plain = with_gradients(loss, [p, scale])
    exact = with_gradients(loss, [p.double(), scale.double()])
    one, s, rows = torch.ones((), device=device), scale.to(device), p.to(device)
    value, lse = contrastive_forward(rows, rows, s, 2, 0, False)
    at_p, at_scale = contrastive_backward(one, rows, rows, s, lse, lse, 2, 0, False)
    assert_no_worse([value, at_p, at_scale], plain, exact, dtype, allowed(dtype, device))
