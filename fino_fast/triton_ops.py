"""The two operators of the `triton` backend: all terms of a step, and their gradients.

They are operators of their own, and not those of the CPU: a step is one call, and what is kept from
the forward to the backward pass differs.
"""

from typing import Any

import torch
from torch import Tensor

from .distributed import gather_views
from .kernels.backward import Gradients, Upstream, backward
from .kernels.bank import Bank, Batch, is_head
from .kernels.epilogues import OVERLAP, PAIRS, PROTOTYPE
from .kernels.forward import forward
from .kernels.operands import padded
from .kernels.table import Kept
from .reference import accumulation_dtype


@torch.library.custom_op("fino::step_forward", mutates_args=())
def step_forward(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    guidance: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    weight: list[float],
    space: list[int],
    batch: list[int],
    balanced: bool,
    want_x: bool,
    want_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """All terms of a step; the lists have one entry a bank, as in `kernels.bank.Bank`.

    The heads come first.

    Args:
        space: number of x among the different ones, by first use.
        batch: (views, first, two_tower) of the contrastive term.
        balanced: the heads' losses are differentiable, and not their sum.
        want_x: whether the backward pass computes gradients at x and at 1/τ.
        want_bank: whether it computes those at the banks and offsets of heads.

    Returns:
        (losses [E], 0-d Σ weight · loss of the heads, metrics [E], log-sum-exps [E, N], gradients
        kept at the rows, all in the dtype of the sums; the vectors of the prototype heads as the
        sweep read them, and their counts one after the other, both empty where the backward pass
        does not sweep them); see `kernels.forward`.
    """
    banks = _banks(
        list(range(len(x))), x, bank, offset, target, inv_count, counts, guidance, kind, smoothing,
        weight, space, batch,
    )  # fmt: skip
    result = forward(banks, balanced)
    heads = sum(map(is_head, kind))
    moving = _moving(kind, balanced, want_x)
    return (
        result.losses,
        result.weighted[:heads].sum(),
        result.metrics,
        result.lse,
        result.kept,
        result.prototypes if moving else [],
        torch.cat([counts[f] for f in moving]) if moving else counts[0].new_empty(0),
    )


def _moving(kind: list[int], balanced: bool, want_x: bool) -> list[int]:
    """The prototype heads that the backward pass sweeps: their banks move before it."""
    if balanced or not want_x:
        return []
    return [f for f, k in enumerate(kind) if k == PROTOTYPE.value]


@step_forward.register_fake
def _(
    x: list[Tensor], bank: list[Tensor], *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    *_, counts, _, kind, _, _, _, _, balanced, want_x, _ = others
    n, dtype = x[0].shape[0], accumulation_dtype(x[0].dtype)
    losses, metrics = (x[0].new_empty(len(x), dtype=dtype) for _ in range(2))
    heads = range(sum(map(is_head, kind)) if balanced else 0)
    moving = _moving(kind, balanced, want_x)
    return (
        losses,
        losses.new_empty(()),
        metrics,
        losses.new_empty(len(x), n),
        [losses.new_empty(n, padded(x[f].shape[1])) for f in heads],
        [x[f].new_empty(bank[f].shape[0], padded(bank[f].shape[1])) for f in moving],
        counts[0].new_empty(sum(bank[f].shape[0] for f in moving)),
    )


@torch.library.custom_op("fino::step_backward", mutates_args=())
def step_backward(
    grad_losses: Tensor,
    grad_guides: Tensor,
    lse: Tensor,
    column_lse: Tensor,
    kept: list[Tensor],
    spaces: list[Tensor],
    guidance: list[Tensor],
    slot: list[int],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: Tensor,
    kind: list[int],
    smoothing: list[float],
    weight: list[float],
    space: list[int],
    batch: list[int],
    balanced: bool,
    want_x: bool,
    want_bank: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The backward pass of `step_forward`.

    Args:
        grad_losses, grad_guides: at the two results.
        lse, kept, guidance, kind, smoothing, weight, space: of all banks, as there.
        column_lse: log-sum-exps of the rows of all ranks; empty without a contrastive term.
        spaces: the different x.
        slot: numbers of the banks that are swept again; bank, offset, target, inv_count are theirs.
            Prototypes, and counts, are as the forward pass returned them; their offset is empty.

    Returns:
        (∂L/∂x of every space; of every bank in `slot` ∂L/∂bank and ∂L/∂offset, empty where there is
        none).
    """
    # What autograd hands over may be expanded.
    grad_losses, grad_guides = (
        grad.to(lse.dtype).contiguous() for grad in (grad_losses, grad_guides)
    )
    no_counts = counts[:0]
    moving = [len(b) for f, b in zip(slot, bank, strict=True) if kind[f] == PROTOTYPE.value]
    of_moving = iter(torch.split_with_sizes(counts, moving))
    banks = _banks(
        slot, [spaces[space[f]] for f in slot], bank, offset, target, inv_count,
        [next(of_moving) if kind[f] == PROTOTYPE.value else no_counts for f in slot],
        [guidance[f] for f in slot], [kind[f] for f in slot], [smoothing[f] for f in slot],
        [weight[f] for f in slot], [space[f] for f in slot], batch,
    )  # fmt: skip

    def at_loss(f: int) -> Tensor:
        return grad_guides if is_head(kind[f]) and not balanced else grad_losses[f]

    upstream = []
    for f, entry in zip(slot, banks, strict=True):
        entry.is_ready = kind[f] == PROTOTYPE.value
        if balanced:
            entry.weight = 1.0
        swept = want_x and not (balanced and is_head(kind[f]))
        upstream.append(Upstream(at_loss(f), lse[f], column_lse, swept))
    result: Gradients = backward(
        banks,
        upstream,
        spaces,
        [
            Kept(gradient, space[f], at_loss(f), guidance[f].to(lse.dtype))
            for f, gradient in enumerate(kept)
        ],
        want_bank,
    )
    # Not one tensor twice: an operator's results must not share memory.
    return (
        result.rows,
        [lse.new_empty(0) if gradient is None else gradient for gradient in result.vectors],
        [lse.new_empty(0) if gradient is None else gradient for gradient in result.offset],
    )


@step_backward.register_fake
def _(
    grad_losses: Tensor, grad_guides: Tensor, lse: Tensor, *others: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    _, _, spaces, _, slot, bank, offset, _, _, _, kind, *_, want_x, want_bank = others
    kinds = [kind[f] for f in slot]
    at_bank = {PROTOTYPE.value: False, PAIRS.value: False, OVERLAP.value: want_x}
    at_offset = {PROTOTYPE.value: False, PAIRS.value: True, OVERLAP.value: False}
    return (
        [x.new_empty(x.shape) for x in spaces],
        [
            b.new_empty(b.shape) if at_bank.get(k, want_bank) else lse.new_empty(0)
            for b, k in zip(bank, kinds, strict=True)
        ],
        [
            o.new_empty(o.shape) if at_offset.get(k, want_bank) else lse.new_empty(0)
            for o, k in zip(offset, kinds, strict=True)
        ],
    )


def _banks(
    slot: list[int],
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    guidance: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    weight: list[float],
    space: list[int],
    batch: list[int],
) -> list[Bank]:
    return [
        Bank(
            kind[i], space[i], x[i], bank[i], offset[i], target[i], inv_count[i], counts[i],
            smoothing[i], weight[i], guidance[i],
            Batch(batch[0], batch[1], bool(batch[2])) if kind[i] == PAIRS.value else None,
        )
        for i in range(len(slot))
    ]  # fmt: skip


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    # Else autograd would make zeros as large as the kept gradients, for those at them.
    ctx.set_materialize_grads(False)
    x, bank, offset, target, inv_count, _, guidance, *rest = inputs
    *_, lse, kept, prototypes, counts = output
    kind, _, _, space, _, balanced, want_x, _ = rest
    ctx.rest = rest
    moving = dict(zip(_moving(kind, balanced, want_x), prototypes, strict=True))
    ctx.slot = [f for f in range(len(x)) if kind[f] != PROTOTYPE.value or f in moving]
    no_offset = lse.new_empty(0)
    swept = (
        [moving.get(f, bank[f]) for f in ctx.slot],
        [no_offset if f in moving else offset[f] for f in ctx.slot],
        [target[f] for f in ctx.slot],
        [inv_count[f] for f in ctx.slot],
    )
    spaces = [x[space.index(i)] for i in range(max(space) + 1)]
    lists = ([lse, counts], kept, spaces, guidance, *swept)
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def _backward(
    ctx: Any, grad_losses: Tensor | None, grad_guides: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    (lse, counts), kept, spaces, guidance, *swept = (
        [next(saved) for _ in range(size)] for size in ctx.sizes
    )
    kind, _, _, space, batch, _, want_x, _ = ctx.rest
    none = [None] * len(kind)
    if grad_losses is None and grad_guides is None:
        return *[none] * 7, *[None] * 8
    grad_losses = lse.new_zeros(len(kind)) if grad_losses is None else grad_losses
    grad_guides = lse.new_zeros(()) if grad_guides is None else grad_guides
    pairs = kind.index(PAIRS.value) if PAIRS.value in kind else None
    column_lse = lse.new_empty(0) if pairs is None else gather_views(lse[pairs], batch[0])
    rows, by_bank, by_offset = step_backward(
        grad_losses, grad_guides, lse, column_lse, kept, spaces, guidance, ctx.slot, *swept,
        counts, *ctx.rest,
    )  # fmt: skip
    banks = len(kind)
    # One gradient for all banks on the same rows: it goes to the first of them.
    at_x = [rows[i] if want_x and space.index(i) == f else None for f, i in enumerate(space)]
    at_bank: list[Tensor | None] = [None] * banks
    at_offset: list[Tensor | None] = [None] * banks
    for f, bank, offset in zip(ctx.slot, by_bank, by_offset, strict=True):
        at_bank[f] = bank if bank.numel() else None
        at_offset[f] = offset if offset.numel() else None
    return at_x, at_bank, at_offset, none, none, none, none, *[None] * 8


step_forward.register_autograd(_backward, setup_context=_context)
