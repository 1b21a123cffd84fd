"""The `triton` backend: the terms on a GPU, by Triton kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import overlap
from .distributed import gather_views, rank
from .eager import weighted_sum
from .kernels.epilogues import PAIRS
from .ops import KINDS
from .reference import accumulation_dtype
from .terms import ContrastiveCall, HeadCall, HeadResult, Step, StepResult
from .triton_ops import step_forward


class Triton:
    """The terms on a GPU.

    The kernels are compiled and interpreted in the tests; docs/gpu.md says what was run.
    """

    def step(self, step: Step) -> StepResult:
        """See `terms.Backend`."""
        contrastive: Tensor | None = None
        guides: list[Tensor] = []
        heads: dict[int, HeadResult] = {}
        # One pair of operators for all terms whose rows share a dtype.
        rows = [call.x for call in step.heads]
        if step.contrastive is not None:
            rows.append(step.contrastive.rows)
        for dtype in {x.dtype: None for x in rows}:
            members = [f for f, call in enumerate(step.heads) if call.x.dtype == dtype]
            pairs = step.contrastive
            if pairs is not None and pairs.rows.dtype != dtype:
                pairs = None
            results, total, share = _run([step.heads[f] for f in members], pairs, step.balanced)
            heads |= zip(members, results, strict=True)
            guides += [total] if members else []
            contrastive = contrastive if share is None else share
        overlaps = overlap.overlaps(list(step.orthogonal))
        orthogonal = None
        if overlaps:
            orthogonal = weighted_sum([call.weight for call in step.orthogonal], overlaps)
        return StepResult(
            contrastive,
            None if step.balanced or not guides else sum(guides[1:], guides[0]),
            [heads[f] for f in range(len(step.heads))],
            orthogonal,
            [share.detach() for share in overlaps],
        )


class _Entry(NamedTuple):
    """One bank: what `step_forward` takes lists of, in its order."""

    x: Tensor
    bank: Tensor
    offset: Tensor
    target: Tensor
    inv_count: Tensor
    counts: Tensor
    guidance: Tensor
    kind: int
    smoothing: float
    weight: float


def _run(
    calls: list[HeadCall], pairs: ContrastiveCall | None, balanced: bool
) -> tuple[list[HeadResult], Tensor, Tensor | None]:
    """(the heads' results, their weighted sum, the contrastive term's share) of one dtype."""
    rows = [call.x for call in calls]
    like = rows[0] if pairs is None else pairs.rows
    one = like.new_ones((), dtype=accumulation_dtype(like.dtype))
    none = like.new_empty(0, dtype=torch.int64)
    entries = [_head_entry(call, one, none) for call in calls]
    batch = [1, 0, 0]
    if pairs is not None:
        columns = gather_views(pairs.rows.detach(), pairs.views)
        batch = [pairs.views, rank() * (pairs.rows.shape[0] // pairs.views), int(pairs.two_tower)]
        inv_count = one / columns.shape[0]
        entries.append(
            _Entry(
                pairs.rows, columns, pairs.logit_scale, none, inv_count, none, one, PAIRS.value,
                0.0, 1.0,
            )
        )  # fmt: skip
    recording = torch.is_grad_enabled()
    spaces: dict[int, int] = {}
    losses, guides, metrics, _, kept = step_forward(
        *(list(column) for column in zip(*entries, strict=True)),
        [spaces.setdefault(id(entry.x), len(spaces)) for entry in entries],
        batch,
        balanced,
        recording
        and (
            any(entry.x.requires_grad for entry in entries)
            or (pairs is not None and pairs.logit_scale.requires_grad)
        ),
        recording
        and any(tensor.requires_grad for call in calls for tensor in (call.bank, call.offset)),
    )
    results = [
        HeadResult(
            losses[f] if balanced else losses[f].detach(),
            metrics[f].detach(),
            kept[f][:, : call.x.shape[1]].detach() if balanced else None,
        )
        for f, call in enumerate(calls)
    ]
    return results, guides, None if pairs is None else losses[len(calls)]


def _head_entry(call: HeadCall, one: Tensor, none: Tensor) -> _Entry:
    return _Entry(
        call.x,
        call.bank,
        call.offset,
        call.target,
        call.inv_count,
        none if call.counts is None else call.counts,
        one if call.guidance is None else call.guidance,
        KINDS.index(call.kind),
        float(call.label_smoothing),
        float(call.weight),
    )
