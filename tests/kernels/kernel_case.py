"""Calls of the kernels, and what plain PyTorch in fp64 says of them."""

from dataclasses import replace

import torch
from fino_fast.kernels.heads import Heads, Upstream, heads_gradient, heads_loss
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
    calls: list[HeadCall],
    device: torch.device,
    kept: bool | None = None,
    guidance: float = 1.0,
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """(losses, metrics, ∂L/∂x by space, ∂L/∂bank, ∂L/∂offset by head) of one call of the kernels.

    Args:
        calls: the heads; those on one tensor stay on one tensor.
        device: where.
        kept: whether the gradients at the rows are taken with the loss; None: of prototypes only.
        guidance, upstream: sign·λ, and the gradient at head f's loss divided by f + 1.
    """
    none = torch.empty(0, dtype=torch.int64)
    x = _moved([call.x for call in calls], device)
    sums = accumulation_dtype(x[0].dtype)
    space = [next(i for i, other in enumerate(x) if other is rows) for rows in x]
    order = sorted(set(space))
    space = [order.index(i) for i in space]
    lists = [
        [getattr(call, name).to(device) for call in calls]
        for name in ("bank", "offset", "target", "inv_count")
    ]
    counts = [(none if call.counts is None else call.counts).to(device) for call in calls]
    kind = [KINDS.index(call.kind) for call in calls]
    smoothing = [call.label_smoothing for call in calls]
    losses, metrics, lse, grad_x = heads_loss(
        Heads(x, *lists, counts, kind, smoothing),
        [call.kind == "prototype" if kept is None else kept for call in calls],
    )
    slot = [f for f, call in enumerate(calls) if call.kind != "prototype"]
    spaces = [x[i] for i in order]
    table = Heads(
        [x[f] for f in slot], *([some[f] for f in slot] for some in lists), [],
        [kind[f] for f in slot], [smoothing[f] for f in slot],
    ) if slot else None  # fmt: skip
    start = Upstream(
        upstream * torch.arange(1, len(calls) + 1, dtype=sums, device=device),
        [torch.tensor(guidance, dtype=sums, device=device)] * len(calls),
        space, lse, grad_x,
    )  # fmt: skip
    rows, *trained = heads_gradient(start, spaces, table, slot, True, True)
    by_head = [dict(zip(slot, gradients, strict=True)) for gradients in trained]
    return losses, metrics, rows, *([some.get(f) for f in range(len(calls))] for some in by_head)


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


def check_heads(calls: list[HeadCall], device: torch.device, kept: bool | None = None) -> None:
    """Assert that one call gives every head's value and gradients, summed where rows are shared."""
    losses, metrics, rows, *trained = run_heads(calls, device, kept, guidance=-0.5, upstream=3.0)
    spaces: dict[int, Tensor] = {}
    for f, call in enumerate(calls):
        loss, metric, by_x, *expected = expected_head(call)
        close(losses[f].cpu(), loss, call.x.dtype, size=max(1.0, loss.item()))
        close(metrics[f].cpu(), metric, call.x.dtype, size=max(1.0, loss.item()))
        factor = 3.0 * (f + 1)
        spaces[id(call.x)] = spaces.get(id(call.x), 0) - 0.5 * factor * by_x
        if call.kind == "prototype":
            continue
        of = (call.bank, call.offset)
        for found, wanted, like in zip([g[f] for g in trained], expected, of, strict=True):
            assert found.dtype == like.dtype
            close(found.cpu(), factor * wanted, call.x.dtype)
    for found, wanted, call in zip(rows, spaces.values(), calls, strict=False):
        assert found.dtype == call.x.dtype
        close(found.cpu(), wanted, call.x.dtype)


def expected_contrastive(
    p: Tensor, scale: Tensor, views: int, two_tower: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient at p, gradient at the scale) of a whole batch in fp64."""
    p, scale = p.double().requires_grad_(), scale.double().requires_grad_()
    loss = contrastive_rows(p, p, scale, views, 0, two_tower).mean()
    return loss.detach(), *torch.autograd.grad(loss, [p, scale])
