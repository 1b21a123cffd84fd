"""The `eager` backend: `reference.py` for the local rows of a batch spread over ranks."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from . import reference
from .distributed import gather_views, rank
from .terms import ContrastiveCall, HeadCall, HeadResult, OrthogonalCall, Step, StepResult


class Eager:
    """Plain PyTorch on any device, dense matrices and all."""

    def step(self, step: Step) -> StepResult:
        """See `terms.Backend`.

        Raises:
            ValueError: `deterministic` is asked for, which PyTorch's own products are not.
        """
        if step.deterministic:
            raise ValueError(
                "deterministic=True: plain PyTorch gives other bits from another number of CPU "
                "threads; the native and triton backends do not"
            )
        contrastive = None if step.contrastive is None else _contrastive(step.contrastive)
        heads = [_head(call, step.balanced) for call in step.heads]
        overlaps = [_overlap(call) for call in step.orthogonal]
        guides = orthogonal = None
        if heads and not step.balanced:
            guides = weighted_sum([call.weight for call in step.heads], [h.loss for h in heads])
        if overlaps:
            orthogonal = weighted_sum([call.weight for call in step.orthogonal], overlaps)
        return StepResult(
            contrastive,
            guides,
            heads,
            orthogonal,
            [overlap.detach() for overlap in overlaps],
        )


def weighted_sum(weights: list[float], values: list[Tensor]) -> Tensor:
    """Σ weight · value of 0-d tensors."""
    stacked = torch.stack(values)
    return (reference.constants(weights, stacked).to(stacked.dtype) * stacked).sum()


def _contrastive(call: ContrastiveCall) -> Tensor:
    columns = gather_views(call.rows, call.views)
    first = rank() * (call.rows.shape[0] // call.views)
    per_row = reference.contrastive_rows(
        call.rows, columns, call.logit_scale, call.views, first, call.two_tower
    )
    return per_row.sum() / columns.shape[0]


def _head(call: HeadCall, want_gradient: bool) -> HeadResult:
    if not want_gradient:
        return HeadResult(*head_loss(call, call.guided))
    loss, pullback, metric = cast(
        "tuple[Tensor, Callable[[Tensor], tuple[Tensor]], Tensor]",
        torch.func.vjp(lambda x: head_loss(call, x), call.guided, has_aux=True),
    )
    return HeadResult(loss, metric, pullback(torch.ones_like(loss))[0].detach())


def head_loss(call: HeadCall, x: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, metric) of one head as a function of its rows; see `HeadResult`."""
    if call.kind == "linear":
        loss, metric = reference.linear_cross_entropy(
            x, call.bank, call.offset, call.target, call.label_smoothing
        )
    elif call.kind == "prototype":
        assert call.counts is not None
        loss, metric = reference.prototype_cross_entropy(
            x, call.bank, call.offset, call.counts, call.target
        )
    else:
        loss, metric = reference.squared_error(x, call.bank, call.offset, call.target, call.kind)
    return loss * call.inv_count, metric * call.inv_count


def _overlap(call: OrthogonalCall) -> Tensor:
    # As one view: the order of the rows does not matter here.
    return reference.orthogonal(
        gather_views(call.guided, 1), gather_views(call.design, 1), call.role
    )
