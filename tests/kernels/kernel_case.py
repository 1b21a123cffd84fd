"""Calls of the kernels, and what plain PyTorch in fp64 says of them."""

from dataclasses import replace

import torch
from fino_fast.kernels.heads import heads_forward
from torch import Tensor

from fino_fast.eager import head_loss
from fino_fast.ops import KINDS
from fino_fast.reference import accumulation_dtype, contrastive_rows, trainable_target
from fino_fast.terms import HeadCall, Kind

# Largest error relative to the largest entry. The interpreter cuts off bits where a GPU rounds to
# bf16, which doubles the error there.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 3e-2,
}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, size: float | None = None) -> None:
    """Assert that `found` is `expected` up to the precision of `dtype`."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    assert found.isfinite().all(), found
    largest = max(expected.abs().max().item() if size is None else size, 1e-6)
    assert (found - expected).abs().max().item() <= TOLERANCE[dtype] * largest


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def head_call(
    kind: Kind,
    n: int,
    depth: int,
    classes: int,
    dtype: torch.dtype,
    seed: int = 0,
    **changes: object,
) -> HeadCall:
    """A head with missing entries, and unseen classes where it is a prototype head.

    Bank and offsets hold numbers of `dtype`, so that converting them to it loses nothing.
    """
    sums = accumulation_dtype(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    x = random(n, depth, dtype=dtype, seed=seed)
    bank = (random(classes, depth, dtype=dtype, seed=seed + 2) / 4).to(sums)
    offset = random(classes, dtype=dtype, seed=seed + 3).to(sums)
    counts = None
    if kind in ("linear", "prototype"):
        target = torch.randint(-1, classes, (n,), generator=generator)
        if kind == "prototype":
            offset = offset.abs() / 4 + 0.125
            counts = torch.randint(0, 3, (classes,), generator=generator)
            target = trainable_target(target, counts)
        valid = target >= 0
    else:
        target = torch.rand(n, classes, generator=generator, dtype=torch.float64).to(sums)
        target[torch.rand(n, classes, generator=generator) < 0.3] = torch.nan
        valid = ~target.isnan()
    call = HeadCall(kind, x, bank, offset, target, inverse(valid, sums), counts=counts)
    return replace(call, **changes)


def inverse(valid: Tensor, dtype: torch.dtype) -> Tensor:
    return 1 / valid.sum().clamp_min(1).to(dtype)


def run_heads(
    calls: list[HeadCall], want_x: bool, want_bank: bool, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The kernels' answer; see `fino_fast.kernels.heads.heads_forward`."""
    none = torch.empty(0, dtype=torch.int64)
    return heads_forward(
        # Calls on one tensor stay on one tensor.
        _moved([call.x for call in calls], device),
        [call.bank.to(device) for call in calls],
        [call.offset.to(device) for call in calls],
        [call.target.to(device) for call in calls],
        [call.inv_count.to(device) for call in calls],
        [(none if call.counts is None else call.counts).to(device) for call in calls],
        [KINDS.index(call.kind) for call in calls],
        [call.label_smoothing for call in calls],
        want_x,
        want_bank,
    )


def _moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    moved: dict[int, Tensor] = {}
    return [moved.setdefault(id(tensor), tensor.to(device)) for tensor in tensors]


def expected_head(call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, metric, ∂loss/∂x, ∂loss/∂bank, ∂loss/∂offset) in fp64; rows of no use count as 0."""
    used = call.target >= 0 if call.target.dim() == 1 else ~call.target.isnan().all(1)
    x = torch.where(used[:, None], call.x.double(), 0.0).requires_grad_()
    bank, offset = (t.double().requires_grad_() for t in (call.bank, call.offset))
    target = call.target if call.target.dim() == 1 else call.target.double()
    exact = replace(
        call, bank=bank, offset=offset, target=target, inv_count=call.inv_count.double()
    )
    loss, metric = head_loss(exact, x)
    gradients = torch.autograd.grad(loss, [x, bank, offset], allow_unused=True)
    return loss.detach(), metric, *gradients


def check_heads(calls: list[HeadCall], device: torch.device) -> None:
    """Assert that one call with all gradients gives every head's value and gradients."""
    losses, metrics, *gradients = run_heads(calls, True, True, device)
    for f, call in enumerate(calls):
        loss, metric, *expected = expected_head(call)
        close(losses[f].cpu(), loss, call.x.dtype, size=max(1.0, loss.item()))
        close(metrics[f].cpu(), metric, call.x.dtype, size=max(1.0, loss.item()))
        if call.kind == "prototype":
            expected = expected[:1]
        for found, wanted in zip([g[f].cpu() for g in gradients], expected, strict=False):
            close(found, wanted, call.x.dtype)


def expected_contrastive(
    p: Tensor, scale: Tensor, views: int, two_tower: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient at p, gradient at the scale) of a whole batch in fp64."""
    p, scale = p.double().requires_grad_(), scale.double().requires_grad_()
    loss = contrastive_rows(p, p, scale, views, 0, two_tower).mean()
    return loss.detach(), *torch.autograd.grad(loss, [p, scale])
