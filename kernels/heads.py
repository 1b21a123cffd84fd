"""Metadata heads on a GPU: their losses in three launches, their gradients in four more.

The gradient of a prototype head at its rows is taken with the loss, because the bank moves before
the backward pass. Those of the other heads wait for the backward pass: by then the upstream
gradients are known, and the heads on the same rows become one matrix.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from .heads_banks import heads_banks_kernel
from .heads_combine import heads_combine_kernel
from .heads_rows import heads_rows_kernel
from .heads_sweep import heads_sweep_kernel
from .launch import launch, sum_type, sweep_constants
from .operands import Operand, Request, operands, padded, starts
from .tiles import WORKERS, Compiler, Tiles, tiles_for

PROTOTYPE = 1  # numbers of kinds in `fino_fast.ops.KINDS`; 0 is linear, above are the continuous
REDUCE_BLOCK = 1024
COMBINE_ROWS, COMBINE_DEPTH = 8, 64
# Programs that a sweep is split into at least, so that few rows or a small bank fill a GPU.
WANTED_PROGRAMS = 512
MAX_SPLITS = 16  # partial sums of a row; bounds their memory at 20·MAX_SPLITS bytes a row
WANTED_BANK_TILES = 64  # a bank of fewer tiles is split by rows


@dataclass
class Heads:
    """The table of one launch: entry f of every list describes head f; see `terms.HeadCall`.

    All x share a dtype. An empty list of counts means that no head is a prototype head.
    """

    x: list[Tensor]
    bank: list[Tensor]
    offset: list[Tensor]
    target: list[Tensor]
    inv_count: list[Tensor]
    counts: list[Tensor]
    kind: list[int]
    smoothing: list[float]
    offset_dtype: list[torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        self.offset_dtype = [offset.dtype for offset in self.offset]
        self.offset = [offset.detach().to(self.sums).contiguous() for offset in self.offset]
        self.inv_count = [count.to(self.sums) for count in self.inv_count]
        self.target = [
            (target.to(self.sums) if kind > PROTOTYPE else target).contiguous()
            for target, kind in zip(self.target, self.kind, strict=True)
        ]

    @property
    def n(self) -> int:
        return self.x[0].shape[0]

    @property
    def sums(self) -> torch.dtype:
        return torch.float64 if self.x[0].dtype == torch.float64 else torch.float32

    @cached_property
    def tiles(self) -> Tiles:
        return tiles_for(self.x[0])

    @cached_property
    def operands(self) -> tuple[list[Operand], list[Operand]]:
        """(rows, bank) of every head, made ready in one launch; heads on one x share it."""
        prototype = [kind == PROTOTYPE for kind in self.kind]
        spaces: dict[object, int] = {}
        space = [spaces.setdefault(_space(x), len(spaces)) for x in self.x]
        requests = [
            Request(
                next(x for x, s in zip(self.x, space, strict=True) if s == i),
                norms=any(p for p, s in zip(prototype, space, strict=True) if s == i),
            )
            for i in range(len(spaces))
        ]
        requests += [
            Request(bank, unit=p, divisor=offset if p else None)
            for bank, offset, p in zip(self.bank, self.offset, prototype, strict=True)
        ]
        ready = operands(requests, self.x[0].dtype)
        return [ready[i] for i in space], ready[len(spaces) :]

    @cached_property
    def columns(self) -> dict[str, tuple[object, ...]]:
        """The table's columns that both sweeps read.

        Where a head has no use for a column, another pointer of the same type stands in it.
        """
        continuous = [kind > PROTOTYPE for kind in self.kind]
        whole = next(
            (t for t, c in zip(self.target, continuous, strict=True) if not c),
            self.x[0].new_empty(0, dtype=torch.int64),
        )
        rows, bank = self.operands
        return {
            "x": tuple(x.matrix for x in rows),
            "x_stride": tuple(x.matrix.stride(0) for x in rows),
            "depth": tuple(x.matrix.shape[1] for x in rows),
            "bank": tuple(b.matrix for b in bank),
            "bank_stride": tuple(b.matrix.stride(0) for b in bank),
            "classes": tuple(b.shape[0] for b in self.bank),
            "offset": tuple(self.offset),
            "target": tuple(
                whole if c else t for t, c in zip(self.target, continuous, strict=True)
            ),
            "values": tuple(
                t if c else o for t, o, c in zip(self.target, self.offset, continuous, strict=True)
            ),
            "counts": tuple(self.counts) if self.counts else (whole,) * len(self.x),
            "kind": tuple(self.kind),
            "smoothing": tuple(self.smoothing),
            "row_norms": tuple(x.inverse_norms for x in rows),
        }

    def splits(self) -> list[int]:
        """Into how many programs the sweep of one tile of rows over every bank is split."""
        row_tiles = triton.cdiv(self.n, self.tiles.sweep_rows)
        return [
            max(
                1,
                min(
                    MAX_SPLITS,
                    triton.cdiv(bank.shape[0], self.tiles.columns),
                    WANTED_PROGRAMS // row_tiles,
                ),
            )
            for bank in self.bank
        ]


def heads_loss(table: Heads, kept: list[bool]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss and metric of every head. Three launches.

    Args:
        table: the heads.
        kept: of which heads ∂loss/∂x is taken at once.

    Returns:
        (losses [F], metrics [F], log-sum-exps [F, N], ∂loss/∂x of every head: [N, W], W the next
        multiple of 16 from D on, or empty). All in the dtype of the sums.
    """
    heads, n, tiles = len(table.x), table.n, table.tiles
    splits = table.splits()
    sizes = [n * count for count in splits]
    losses, metrics = (table.x[0].new_empty(heads, dtype=table.sums) for _ in range(2))
    partial = losses.new_empty(4, sum(sizes))
    best = losses.new_empty(sum(sizes), dtype=torch.int32)
    programs = [triton.cdiv(n, tiles.sweep_rows) * count for count in splits]
    joining = {
        "splits": tuple(splits),
        "first_partial": starts(sizes),
        "partial": partial,
        "planes": partial.shape[1],
    }
    launch(
        heads_sweep_kernel,
        sum(programs),
        losses,
        tiles.compiler,
        sweep_constants(table.x[0], tiles),
        **table.columns,
        **joining,
        first_program=starts(programs),
        best_out=best,
        n=n,
    )
    lse = losses.new_empty(heads, n)
    grad_x = [_rows_like(x, losses, wanted) for x, wanted in zip(table.x, kept, strict=True)]
    _rows(
        table,
        group=[f if wanted else -1 for f, wanted in enumerate(kept)],
        grad_x=grad_x,
        upstream=False,
        reduced=heads,
        best=best,
        losses=losses,
        metrics=metrics,
        lse_out=lse,
        grad=losses,
        slot=(0,) * heads,
        guidance=tuple(table.inv_count),
        **joining,
    )
    return losses, metrics, lse, grad_x


@dataclass
class Upstream:
    """What the backward pass of all heads starts from.

    Attributes:
        grad: [F], gradient at every loss.
        guidance: [F] tensors, 0-d: sign·λ, by which the gradients at the rows are multiplied.
        space: of every head the number of the rows it stands on.
        lse, kept: as `heads_loss` returned them.
    """

    grad: Tensor
    guidance: list[Tensor]
    space: list[int]
    lse: Tensor
    kept: list[Tensor]

    def __post_init__(self) -> None:
        self.grad = self.grad.to(self.lse.dtype).contiguous()
        self.guidance = [value.to(self.lse.dtype) for value in self.guidance]


def heads_gradient(
    upstream: Upstream,
    spaces: list[Tensor],
    table: Heads | None,
    slot: list[int],
    want_x: bool,
    want_bank: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of all heads. Four launches, one where there is nothing to sweep.

    Args:
        upstream: see there.
        spaces: [N, D] each, the rows on which heads stand.
        table: the heads that are trained, None where there are none.
        slot: their numbers among the F heads of `upstream`.
        want_x: whether the gradients at the rows are wanted; else they are not to be read.
        want_bank: whether the gradients at banks and offsets are wanted.

    Returns:
        (∂L/∂x of every space, ∂L/∂bank and ∂L/∂offset of the table's heads), each in the dtype of
        what it belongs to; none of the latter without `want_bank`.
    """
    n, sums = spaces[0].shape[0], upstream.lse
    group = [-1 if _is_kept(upstream, f) or not want_x else upstream.space[f] for f in slot]
    swept = [_rows_like(x, sums, i in group) for i, x in enumerate(spaces)]
    if table is not None and max(group) >= 0:
        _rows(
            table,
            group=group,
            grad_x=swept,
            upstream=True,
            reduced=0,
            best=sums.new_empty(0, dtype=torch.int32),
            losses=sums,
            metrics=sums,
            lse_out=sums,
            grad=upstream.grad,
            slot=tuple(slot),
            guidance=tuple(upstream.guidance[f] for f in slot),
            splits=(1,) * len(slot),
            first_partial=tuple(n * f for f in slot),
            partial=sums,
            planes=0,
        )
    parts: list[int] = []
    partial: list[tuple[Tensor, Tensor]] = []
    if table is not None and want_bank:
        parts, partial = _banks(table, upstream, slot)
    grad_rows = [x.new_empty(x.shape) for x in spaces]
    grad_bank, grad_offset = [], []
    if table is not None and want_bank:
        grad_bank = [bank.new_empty(bank.shape) for bank in table.bank]
        grad_offset = [
            sums.new_empty(bank.shape[0], dtype=dtype)
            for bank, dtype in zip(table.bank, table.offset_dtype, strict=True)
        ]
    row_tiles = triton.cdiv(n, COMBINE_ROWS)
    bank_tiles = [triton.cdiv(bank.shape[0], COMBINE_ROWS) for bank in grad_bank]
    launch(
        heads_combine_kernel,
        row_tiles * len(spaces) + sum(bank_tiles),
        sums,
        Compiler(warps=4, stages=2),
        {
            "SUM": sum_type(sums.dtype),
            "ROWS": COMBINE_ROWS,
            "DEPTH": COMBINE_DEPTH,
        },
        grad=upstream.grad,
        guidance=tuple(upstream.guidance),
        kept=tuple(upstream.kept),
        is_kept=tuple(int(_is_kept(upstream, f)) for f in range(len(upstream.kept))),
        space=tuple(upstream.space),
        swept=tuple(swept),
        is_swept=tuple(int(rows.numel() > 0) for rows in swept),
        depth=tuple(padded(x.shape[1]) for x in spaces),
        depth_out=tuple(x.shape[1] for x in spaces),
        grad_rows=tuple(grad_rows),
        row_tiles=row_tiles,
        row_work=row_tiles * len(spaces),
        bank_part=tuple(bank for bank, _ in partial),
        offset_part=tuple(offset for _, offset in partial),
        parts=tuple(parts),
        classes=tuple(bank.shape[0] for bank in grad_bank),
        bank_depth=tuple(padded(bank.shape[1]) for bank in grad_bank),
        bank_depth_out=tuple(bank.shape[1] for bank in grad_bank),
        first_bank=starts(bank_tiles),
        grad_bank=tuple(grad_bank),
        grad_offset=tuple(grad_offset),
        n=n,
    )
    return grad_rows, grad_bank, grad_offset


def _is_kept(upstream: Upstream, f: int) -> bool:
    return upstream.kept[f].numel() > 0


def _rows(table: Heads, group: list[int], grad_x: list[Tensor], upstream: bool, **own: Any) -> None:
    """Launch `heads_rows_kernel`.

    Args:
        table: the heads.
        group: of every head the entry of `grad_x` to which it adds, −1 for none.
        grad_x: filled where a head adds to it.
        upstream: whether the gradients are multiplied by `grad` and `guidance`.
        own: what the two passes tell the kernel otherwise.
    """
    row_tiles: int = triton.cdiv(table.n, table.tiles.rows)
    items = row_tiles * (max(group) + 1)
    launch(
        heads_rows_kernel,
        own["reduced"] + min(items, WORKERS),
        own["losses"],
        table.tiles.compiler,
        sweep_constants(table.x[0], table.tiles, gradient=True)
        | {"UPSTREAM": upstream, "BLOCK": REDUCE_BLOCK},
        **table.columns,
        **own,
        **_room(table, items, table.tiles.rows),
        inv_count=tuple(table.inv_count),
        group=tuple(group),
        grad_x=tuple(grad_x),
        row_tiles=row_tiles,
        n=table.n,
    )


def _banks(
    table: Heads, upstream: Upstream, slot: list[int]
) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
    """Launch `heads_banks_kernel`.

    Returns:
        Of every head: into how many parts the rows were split; the gradients of the parts at bank
        and offset, [parts, K, W] and [parts, K].
    """
    tiles, sums = table.tiles, upstream.lse
    row_tiles: int = triton.cdiv(table.n, tiles.rows)
    bank_tiles = [triton.cdiv(bank.shape[0], tiles.columns) for bank in table.bank]
    wanted = [max(1, min(row_tiles, MAX_SPLITS, WANTED_BANK_TILES // b)) for b in bank_tiles]
    # No part without a row.
    shares = [triton.cdiv(row_tiles, parts) for parts in wanted]
    parts = [triton.cdiv(row_tiles, share) for share in shares]
    partial = [
        (sums.new_empty(p, b.shape[0], padded(b.shape[1])), sums.new_empty(p, b.shape[0]))
        for p, b in zip(parts, table.bank, strict=True)
    ]
    programs = [count * tiles_of for count, tiles_of in zip(parts, bank_tiles, strict=True)]
    items = sum(programs)
    room = _room(table, items, tiles.columns)
    launch(
        heads_banks_kernel,
        min(items, WORKERS),
        sums,
        tiles.compiler,
        sweep_constants(table.x[0], tiles, gradient=True),
        **table.columns,
        **room,
        inv_count=tuple(table.inv_count),
        lse=sums,
        grad=upstream.grad,
        slot=tuple(slot),
        grad_bank=tuple(bank for bank, _ in partial),
        grad_offset=tuple(offset for _, offset in partial),
        parts=tuple(parts),
        share=tuple(share * tiles.rows for share in shares),
        first_item=starts(programs),
        # Not of 8 bits: Triton would lay out the operand that they mask as if it had 8 bits too.
        used=sums.new_empty(room["workers"], tiles.chunk, dtype=torch.int32),
        n=table.n,
    )
    return parts, partial


def _room(table: Heads, items: int, outer: int) -> dict[str, Any]:
    """Memory of the programs among which `items` tiles of `outer` vectors are shared out."""
    tiles, workers = table.tiles, min(items, WORKERS)
    depth = max(padded(x.shape[1]) for x in table.x)
    size = outer * triton.cdiv(depth, tiles.width) * tiles.width
    return {
        "items": items,
        "workers": workers,
        "work": table.x[0].new_empty(workers, outer, tiles.chunk),
        "scratch": table.x[0].new_empty(workers, size, dtype=table.sums),
        "scratch_size": size,
    }


def _rows_like(x: Tensor, sums: Tensor, wanted: bool) -> Tensor:
    """Room for a gradient at x in the dtype of `sums`, padded like an operand."""
    return sums.new_empty((x.shape[0], padded(x.shape[1])) if wanted else 0)


def _space(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return x.data_ptr(), x.shape, x.stride()
