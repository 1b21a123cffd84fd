"""The `native` backend: the C++ sweeps of csrc on the CPU."""

import torch
from torch import Tensor

from . import ops
from .distributed import gather_views, rank
from .eager import Eager
from .factors import Role
from .reference import accumulation_dtype, orthonormal_design
from .terms import HeadCall, HeadResult

# Above this size of a bank its gradient is not held from the forward to the backward pass.
DEFERRED_BANK_BYTES = 2**28


class Native(Eager):
    """C++ sweeps that never store the logits."""

    def contrastive(self, rows: Tensor, logit_scale: Tensor, views: int, two_tower: bool) -> Tensor:
        columns = gather_views(rows.detach(), views)
        first = rank() * (rows.shape[0] // views)
        return ops.contrastive(rows, columns, logit_scale, views, first, two_tower)[0]

    def heads(self, calls: list[HeadCall], want_gradient: bool) -> list[HeadResult]:
        results: dict[int, HeadResult] = {}
        deferred = [] if want_gradient else [i for i, call in enumerate(calls) if _deferred(call)]
        together = [i for i in range(len(calls)) if i not in deferred]
        recording = torch.is_grad_enabled()
        if together:
            group = [calls[i] for i in together]
            want_x = want_gradient or (recording and any(call.x.requires_grad for call in group))
            want_bank = recording and any(
                call.bank.requires_grad or call.offset.requires_grad for call in group
            )
            results |= zip(together, _run(group, want_x, want_bank), strict=True)
        for i in deferred:
            results |= zip([i], _run([calls[i]], False, False), strict=True)
        return [results[i] for i in range(len(calls))]

    def orthogonal(self, z: Tensor, metadata: Tensor, role: Role) -> Tensor:
        z, design = gather_views(z, 1), gather_views(metadata, 1)
        if design.dim() == 2:
            missing = design.isnan().any(1)
            basis = orthonormal_design(design, ~missing).to(accumulation_dtype(z.dtype))
            design = basis.masked_fill(missing[:, None], torch.nan)
        return ops.orthogonal(z, design, role == "preserve")


def _deferred(call: HeadCall) -> bool:
    # A prototype bank has no gradient, and moves before the backward pass.
    return call.kind != "prototype" and call.bank.numel() * 4 > DEFERRED_BANK_BYTES


def _run(calls: list[HeadCall], want_x: bool, want_bank: bool) -> list[HeadResult]:
    no_counts = calls[0].target.new_empty(0, dtype=torch.int64)
    losses, metrics, gradients = ops.heads(
        [call.guided for call in calls],
        [call.bank for call in calls],
        [call.offset for call in calls],
        [call.target for call in calls],
        [call.inv_count for call in calls],
        [no_counts if call.counts is None else call.counts for call in calls],
        [ops.KINDS.index(call.kind) for call in calls],
        [float(call.label_smoothing) for call in calls],
        want_x,
        want_bank,
    )
    return [
        HeadResult(losses[i], metrics[i].detach(), gradients[i].detach()) for i in range(len(calls))
    ]
