"""The `native` backend: the C++ sweeps of csrc on the CPU."""

import torch
from torch import Tensor

from . import ops
from .distributed import gather_views, rank
from .eager import weighted_sum
from .reference import accumulation_dtype, orthonormal_design
from .terms import ContrastiveCall, HeadCall, HeadResult, OrthogonalCall, Step, StepResult

# Above this size of a bank its gradient is not held from the forward to the backward pass.
DEFERRED_BANK_BYTES = 2**28


class Native:
    """C++ sweeps that never store the logits."""

    def step(self, step: Step) -> StepResult:
        """See `terms.Backend`."""
        contrastive_term = None if step.contrastive is None else contrastive(step.contrastive)
        heads = _heads(list(step.heads), step.balanced)
        overlaps = [_overlap(call) for call in step.orthogonal]
        guides = orthogonal = None
        if heads and not step.balanced:
            guides = weighted_sum([call.weight for call in step.heads], [h.loss for h in heads])
        if overlaps:
            orthogonal = weighted_sum([call.weight for call in step.orthogonal], overlaps)
        return StepResult(
            contrastive_term,
            guides,
            heads,
            orthogonal,
            [overlap.detach() for overlap in overlaps],
        )


def contrastive(call: ContrastiveCall) -> Tensor:
    """The term by the operators `fino::contrastive_forward` and `fino::contrastive_backward`."""
    columns = gather_views(call.rows.detach(), call.views)
    first = rank() * (call.rows.shape[0] // call.views)
    return ops.contrastive(call.rows, columns, call.logit_scale, call.views, first, call.two_tower)[
        0
    ]


def _heads(calls: list[HeadCall], want_gradient: bool) -> list[HeadResult]:
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


def _overlap(call: OrthogonalCall) -> Tensor:
    z, design = gather_views(call.guided, 1), gather_views(call.design, 1)
    if design.dim() == 2:
        missing = design.isnan().any(1)
        basis = orthonormal_design(design, ~missing).to(accumulation_dtype(z.dtype))
        design = basis.masked_fill(missing[:, None], torch.nan)
    return ops.orthogonal(z, design, call.role == "preserve")


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
