"""The sum of a vector, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tiles import Compiler

BLOCK = 1024


@triton.jit
def row_sum_kernel(values, out, n, divisor, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < n, other=0.0)
    tl.store(out, tl.sum(total, axis=0) / divisor)


def row_sum(values: Tensor, divisor: int) -> Tensor:
    """Σ values / divisor, the same to the bit on every run. [N] → 0-d."""
    out = values.new_empty(())
    launch(
        row_sum_kernel,
        1,
        values,
        Compiler(warps=8, stages=1),
        {"BLOCK": BLOCK},
        values=values,
        out=out,
        n=values.shape[0],
        divisor=divisor,
    )
    return out
