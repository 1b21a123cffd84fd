"""The `native` backend: the C++ sweeps of csrc on the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import ops
from .distributed import gather_views, rank, world_size
from .reference import accumulation_dtype, orthonormal_design
from .terms import (
    ContrastiveCall,
    HeadCall,
    HeadResult,
    OrthogonalCall,
    Step,
    StepResult,
    numbered,
)

# Above this size of a bank its gradient is not held from the forward to the backward pass.
DEFERRED_BANK_BYTES = 2**28


class Native:
    """C++ sweeps that never store the logits."""

    def step(self, step: Step) -> StepResult:
        """See `terms.Backend`."""
        contrastive = None
        if step.contrastive is not None:
            contrastive = _contrastive(step.contrastive, step.deterministic)
        guides: Tensor | None = None
        heads: list[HeadResult] = []
        if step.heads:
            run = _balanced if step.balanced else _guides
            guides, heads = run(step.heads, step.deterministic)
        orthogonal: Tensor | None = None
        overlaps: list[Tensor] = []
        if step.orthogonal:
            orthogonal, overlaps = _orthogonal(step.orthogonal, step.deterministic)
        return StepResult(contrastive, guides, heads, orthogonal, overlaps)


def _contrastive(call: ContrastiveCall, deterministic: bool) -> Tensor:
    if world_size() == 1:
        want = torch.is_grad_enabled() and (
            call.rows.requires_grad or call.logit_scale.requires_grad
        )
        return ops.contrastive(
            call.rows, call.logit_scale, call.views, call.two_tower, want, deterministic
        )
    columns = gather_views(call.rows.detach(), call.views)
    first = rank() * (call.rows.shape[0] // call.views)
    loss, _ = ops.ranks_contrastive(
        call.rows, columns, call.logit_scale, call.views, first, call.two_tower, deterministic
    )
    return loss


Guides = tuple[Tensor | None, list[HeadResult]]


def _balanced(calls: Sequence[HeadCall], deterministic: bool) -> Guides:
    """Every head by itself, with the gradient of its rows."""
    results = _run(
        [replace(call, x=call.guided, guidance=None, weight=1.0) for call in calls],
        list(range(len(calls))),
        True,
        deterministic,
    )
    return None, [
        HeadResult(results.sums[f], results.metrics[f], results.grad_x[f])
        for f in range(len(calls))
    ]


def _guides(calls: Sequence[HeadCall], deterministic: bool) -> Guides:
    """Σ weight · loss, and the heads' losses and metrics."""
    results: list[HeadResult | None] = [None] * len(calls)
    sums = []
    together = []
    for f, call in enumerate(calls):
        if _deferred(call):
            loss, metric = ops.wide_head(
                call.guided, call.bank, call.offset, call.target, call.inv_count,
                float(call.label_smoothing), deterministic,
            )  # fmt: skip
            sums.append(call.weight * loss)
            results[f] = HeadResult(loss.detach(), metric)
        else:
            together.append(f)
    if together:
        members = [calls[f] for f in together]
        group = numbered([call.x for call in members])
        want_x = torch.is_grad_enabled() and any(call.x.requires_grad for call in members)
        run = _run(members, group, want_x, deterministic)
        sums.append(run.sums.sum())
        for i, f in enumerate(together):
            results[f] = HeadResult(run.losses[i], run.metrics[i])
    return torch.stack(sums).sum(), cast("list[HeadResult]", results)


def _deferred(call: HeadCall) -> bool:
    # A prototype bank has no gradient, and moves before the backward pass.
    return call.kind == "linear" and call.bank.numel() * 4 > DEFERRED_BANK_BYTES


class _Run(NamedTuple):
    sums: Tensor  # [G]
    losses: Tensor  # [F]
    metrics: Tensor  # [F]
    grad_x: list[Tensor]


def _run(calls: list[HeadCall], group: list[int], want_x: bool, deterministic: bool) -> _Run:
    x = calls[0].x
    no_counts = calls[0].target.new_empty(0, dtype=torch.int64)
    one = x.new_ones((), dtype=accumulation_dtype(x.dtype))
    return _Run(
        *ops.heads(
            [calls[group.index(g)].x for g in range(max(group) + 1)],
            [call.bank for call in calls],
            [call.offset for call in calls],
            [call.target for call in calls],
            [call.inv_count for call in calls],
            [no_counts if call.counts is None else call.counts for call in calls],
            [one if call.guidance is None else call.guidance for call in calls],
            [call.weight for call in calls],
            [ops.KINDS.index(call.kind) for call in calls],
            [float(call.label_smoothing) for call in calls],
            group,
            want_x,
            torch.is_grad_enabled()
            and any(call.bank.requires_grad or call.offset.requires_grad for call in calls),
            deterministic,
        )
    )


def _orthogonal(
    calls: Sequence[OrthogonalCall], deterministic: bool
) -> tuple[Tensor, list[Tensor]]:
    """Σ weight · R_f, and every R_f."""
    sums = []
    overlaps: dict[int, Tensor] = {}
    spaces: dict[tuple[int, int], list[int]] = {}
    rows, guidance = numbered([c.z for c in calls]), numbered([c.guidance for c in calls])
    for f, space in enumerate(zip(rows, guidance, strict=True)):
        spaces.setdefault(space, []).append(f)
    for members in spaces.values():
        first = calls[members[0]]
        z = gather_views(first.z, 1)
        one = z.new_ones((), dtype=accumulation_dtype(z.dtype))
        total, values = ops.orthogonal(
            z,
            [_design(calls[f], z) for f in members],
            [calls[f].role == "preserve" for f in members],
            [calls[f].weight for f in members],
            one if first.guidance is None else first.guidance,
            deterministic,
        )
        sums.append(total)
        overlaps |= zip(members, values.unbind(), strict=True)
    return torch.stack(sums).sum(), [overlaps[f] for f in range(len(calls))]


def _design(call: OrthogonalCall, z: Tensor) -> Tensor:
    """What `ops.orthogonal` takes for it."""
    design = gather_views(call.design, 1)
    if design.dim() == 1:
        return design
    missing = design.isnan().any(1)
    basis = orthonormal_design(design, ~missing).to(accumulation_dtype(z.dtype))
    return basis.masked_fill(missing[:, None], torch.nan)
