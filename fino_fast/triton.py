"""The `triton` backend: the terms on a GPU, by Triton kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import overlap
from .distributed import gather_views, rank
from .eager import weighted_sum
from .kernels.epilogues import OVERLAP, PAIRS
from .ops import KINDS
from .overlap import Swept
from .reference import accumulation_dtype
from .terms import ContrastiveCall, HeadCall, HeadResult, Step, StepResult, numbered
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
        overlaps: dict[int, Tensor] = {}
        splits = overlap.split(list(step.orthogonal))
        swept = [bank for split in splits for bank in split.swept]
        numerators: dict[int, Tensor] = {}
        # One pair of operators for all terms whose rows share a dtype.
        rows = [call.x for call in step.heads] + [bank.rows for bank in swept]
        if step.contrastive is not None:
            rows.append(step.contrastive.rows)
        for dtype in {x.dtype: None for x in rows}:
            members = [f for f, call in enumerate(step.heads) if call.x.dtype == dtype]
            banks = [i for i, bank in enumerate(swept) if bank.rows.dtype == dtype]
            pairs = step.contrastive
            if pairs is not None and pairs.rows.dtype != dtype:
                pairs = None
            found = _run(
                [step.heads[f] for f in members], pairs, [swept[i] for i in banks], step.balanced
            )
            heads |= zip(members, found.heads, strict=True)
            guides += [found.guides] if members else []
            contrastive = contrastive if found.contrastive is None else found.contrastive
            numerators |= zip(banks, found.swept, strict=True)
        in_order = iter([numerators[i] for i in range(len(swept))])
        for split in splits:
            terms = split.terms([next(in_order) for _ in split.swept])
            overlaps |= zip(split.members, terms.unbind(0), strict=True)
        shares = [overlaps[f] for f in range(len(overlaps))]
        orthogonal = None
        if shares:
            orthogonal = weighted_sum([call.weight for call in step.orthogonal], shares)
        return StepResult(
            contrastive,
            None if step.balanced or not guides else sum(guides[1:], guides[0]),
            [heads[f] for f in range(len(step.heads))],
            orthogonal,
            [share.detach() for share in shares],
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


class _Found(NamedTuple):
    """What `step_forward` says of the banks of one dtype: 0-d losses, and the heads' results."""

    heads: list[HeadResult]
    guides: Tensor
    contrastive: Tensor | None
    swept: list[Tensor]


def _run(
    calls: list[HeadCall], pairs: ContrastiveCall | None, swept: list[Swept], balanced: bool
) -> _Found:
    rows = [call.x for call in calls] + [bank.rows for bank in swept]
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
    most = max([0, *(len(bank.vectors) for bank in swept)])
    zeros = like.new_zeros(most, dtype=accumulation_dtype(like.dtype))
    entries += [
        # The gradient at U takes the factor of U, as that at a head's rows takes the guidance.
        _Entry(
            bank.rows, bank.vectors, bank.scale, zeros, bank.inv_count, none, bank.scale,
            OVERLAP.value, 0.0, 1.0,
        )
        for bank in swept
    ]  # fmt: skip
    recording = torch.is_grad_enabled()
    losses, guides, metrics, _, kept, *_ = step_forward(
        *(list(column) for column in zip(*entries, strict=True)),
        numbered([entry.x for entry in entries]),
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
    first = len(entries) - len(swept)
    return _Found(
        results,
        guides,
        None if pairs is None else losses[len(calls)],
        list(losses[first:].unbind(0)),
    )


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
