"""The `triton` backend: the terms on a GPU, by Triton kernels.

Importing this module registers the kernels of the contrastive operators for CUDA tensors, and the
operators of the heads. The heads have operators of their own here: what is kept from the forward to
the backward pass differs from the CPU, and with it what an operator returns.
"""

from typing import Any

import torch
from torch import Tensor

from . import overlap
from .eager import weighted_sum
from .kernels import heads as kernels
from .kernels.contrastive_backward import contrastive_backward
from .kernels.contrastive_forward import contrastive_forward
from .kernels.operands import padded
from .native import contrastive
from .ops import KINDS
from .reference import accumulation_dtype
from .terms import HeadCall, HeadResult, Step, StepResult

KERNELS = {
    "fino::contrastive_forward": contrastive_forward,
    "fino::contrastive_backward": contrastive_backward,
}

for _name, _kernel in KERNELS.items():
    torch.library.impl(_name, "CUDA", _kernel)


@torch.library.custom_op("fino::heads_loss", mutates_args=())
def heads_loss(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    guidance: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    space: list[int],
    kept: list[bool],
    want_x: bool,
    want_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Metadata heads; the lists have one entry a head, with the meaning of `terms.HeadCall`.

    Args:
        counts: empty where the head has none.
        guidance: 0-d each; multiplies the gradient at x, but not that in the output.
        kind: indices into `ops.KINDS`.
        space: number of x among the different ones, by first use.
        kept: of which heads ∂loss/∂x is taken now; those of a bank that moves before the backward
            pass must be.
        want_x, want_bank: which gradients the backward pass computes.

    Returns:
        (losses [F], metrics [F], log-sum-exps [F, N], ∂loss/∂x of every head: [N, W] with W the
        next multiple of 16 from D on, or empty), in the dtype of the sums.
    """
    table = kernels.Heads(x, bank, offset, target, inv_count, counts, kind, smoothing)
    result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = kernels.heads_loss(table, kept)
    return result


@heads_loss.register_fake
def _(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    guidance: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    space: list[int],
    kept: list[bool],
    want_x: bool,
    want_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    n, dtype = x[0].shape[0], accumulation_dtype(x[0].dtype)
    return (
        x[0].new_empty(len(x), dtype=dtype),
        x[0].new_empty(len(x), dtype=dtype),
        x[0].new_empty((len(x), n), dtype=dtype),
        [
            rows.new_empty((n, padded(rows.shape[1])) if wanted else (0,), dtype=dtype)
            for rows, wanted in zip(x, kept, strict=True)
        ],
    )


@torch.library.custom_op("fino::heads_gradient", mutates_args=())
def heads_gradient(
    grad: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    guidance: list[Tensor],
    space: list[int],
    spaces: list[Tensor],
    slot: list[int],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    want_x: bool,
    want_bank: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The backward pass of `heads_loss`.

    Args:
        grad: [F], at the losses.
        lse, kept, guidance, space: of all heads, as there.
        spaces: the different x.
        slot: numbers of the heads that have parameters; the following lists are of these.

    Returns:
        (∂L/∂x of every space, ∂L/∂bank and ∂L/∂offset of the heads in `slot`, or none of these).
    """
    upstream = kernels.Upstream(grad, guidance, space, lse, kept)
    table = None
    if slot and (want_bank or any(want_x and not kept[f].numel() for f in slot)):
        x = [spaces[space[f]] for f in slot]
        table = kernels.Heads(x, bank, offset, target, inv_count, [], kind, smoothing)
    result: tuple[list[Tensor], list[Tensor], list[Tensor]] = kernels.heads_gradient(
        upstream, spaces, table, slot, want_x, want_bank
    )
    return result


@heads_gradient.register_fake
def _(
    grad: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    guidance: list[Tensor],
    space: list[int],
    spaces: list[Tensor],
    slot: list[int],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    want_x: bool,
    want_bank: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [x.new_empty(x.shape) for x in spaces],
        [b.new_empty(b.shape) for b in bank] if want_bank else [],
        [o.new_empty(o.shape) for o in offset] if want_bank else [],
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, bank, offset, target, inv_count, _, guidance, kind, smoothing, space, *wanted = inputs
    _, _, lse, kept = output
    ctx.space, (_, ctx.want_x, ctx.want_bank) = space, wanted
    # A prototype bank moves before the backward pass, and is not needed there.
    ctx.slot = [f for f in range(len(x)) if KINDS[kind[f]] != "prototype"]
    ctx.kind, ctx.smoothing = ([values[f] for f in ctx.slot] for values in (kind, smoothing))
    trained = ([values[f] for f in ctx.slot] for values in (bank, offset, target, inv_count))
    spaces = [x[space.index(i)] for i in range(max(space) + 1)]
    lists = ([lse], kept, guidance, spaces, *trained)
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    (lse,), kept, guidance, spaces, *trained = (
        [next(saved) for _ in range(size)] for size in ctx.sizes
    )
    rows, bank, offset = heads_gradient(
        grad, lse, kept, guidance, ctx.space, spaces, ctx.slot, *trained, ctx.kind, ctx.smoothing,
        ctx.want_x, ctx.want_bank,
    )  # fmt: skip
    heads = len(ctx.space)
    # One gradient for all heads on the same rows: it goes to the first of them.
    at_x = [
        rows[i] if ctx.want_x and ctx.space.index(i) == f else None for f, i in enumerate(ctx.space)
    ]
    at_bank: list[Tensor | None] = [None] * heads
    at_offset: list[Tensor | None] = [None] * heads
    for f, by_bank, by_offset in zip(ctx.slot, bank, offset, strict=False):
        at_bank[f], at_offset[f] = by_bank, by_offset
    none = [None] * heads
    return at_x, at_bank, at_offset, none, none, none, none, *[None] * 6


heads_loss.register_autograd(_backward, setup_context=_context)


class Triton:
    """The terms on a GPU.

    The kernels are compiled and interpreted in the tests; docs/gpu.md says what was run.
    """

    def step(self, step: Step) -> StepResult:
        """See `terms.Backend`."""
        contrastive_term = None if step.contrastive is None else contrastive(step.contrastive)
        heads = _heads(list(step.heads), step.balanced)
        overlaps = overlap.overlaps(list(step.orthogonal))
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
            [share.detach() for share in overlaps],
        )


def _heads(calls: list[HeadCall], want_gradient: bool) -> list[HeadResult]:
    results: dict[int, HeadResult] = {}
    # One call for all heads whose rows share a dtype.
    for dtype in {call.x.dtype: None for call in calls}:
        members = [f for f, call in enumerate(calls) if call.x.dtype == dtype]
        results |= zip(members, _run([calls[f] for f in members], want_gradient), strict=True)
    return [results[f] for f in range(len(calls))]


def _run(calls: list[HeadCall], want_gradient: bool) -> list[HeadResult]:
    recording = torch.is_grad_enabled()
    want_x = recording and any(call.x.requires_grad for call in calls)
    want_bank = recording and any(
        tensor.requires_grad for call in calls for tensor in (call.bank, call.offset)
    )
    spaces: dict[int, int] = {}
    x = calls[0].x
    no_counts = x.new_empty(0, dtype=torch.int64)
    one = x.new_ones((), dtype=accumulation_dtype(x.dtype))
    losses, metrics, _, kept = heads_loss(
        [call.x for call in calls],
        [call.bank for call in calls],
        [call.offset for call in calls],
        [call.target for call in calls],
        [call.inv_count for call in calls],
        [no_counts if call.counts is None else call.counts for call in calls],
        [one if call.guidance is None else call.guidance for call in calls],
        [KINDS.index(call.kind) for call in calls],
        [float(call.label_smoothing) for call in calls],
        [spaces.setdefault(id(call.x), len(spaces)) for call in calls],
        [want_gradient or (want_x and call.kind == "prototype") for call in calls],
        want_x,
        want_bank,
    )
    return [
        HeadResult(
            losses[f],
            metrics[f].detach(),
            kept[f][:, : call.x.shape[1]].detach() if want_gradient else None,
        )
        for f, call in enumerate(calls)
    ]
