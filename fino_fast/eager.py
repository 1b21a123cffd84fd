"""The `eager` backend: `reference.py` for the local rows of a batch spread over ranks."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from . import reference
from .distributed import gather_views, rank
from .factors import Role
from .terms import HeadCall, HeadResult


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


class Eager:
    """Plain PyTorch on any device, dense matrices and all."""

    def contrastive(self, rows: Tensor, logit_scale: Tensor, views: int, two_tower: bool) -> Tensor:
        columns = gather_views(rows, views)
        first = rank() * (rows.shape[0] // views)
        per_row = reference.contrastive_rows(rows, columns, logit_scale, views, first, two_tower)
        return per_row.sum() / columns.shape[0]

    def heads(self, calls: list[HeadCall], want_gradient: bool) -> list[HeadResult]:
        return [self._head(call, want_gradient) for call in calls]

    def _head(self, call: HeadCall, want_gradient: bool) -> HeadResult:
        if not want_gradient:
            return HeadResult(*head_loss(call, call.guided))
        loss, pullback, metric = cast(
            tuple[Tensor, Callable[[Tensor], tuple[Tensor]], Tensor],
            torch.func.vjp(lambda x: head_loss(call, x), call.guided, has_aux=True),
        )
        return HeadResult(loss, metric, pullback(torch.ones_like(loss))[0].detach())

    def orthogonal(self, z: Tensor, metadata: Tensor, role: Role) -> Tensor:
        # As one view: the order of the rows does not matter here.
        return reference.orthogonal(gather_views(z, 1), gather_views(metadata, 1), role)
