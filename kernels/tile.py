"""Device functions of the tile loop that all sweeps share.

A sweep takes tiles of rows against tiles of a bank: products accumulated over the width, then an
epilogue that is the term's own. Offsets are int64 throughout: N·D and K·D may exceed 2³¹.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e38)  # a masked logit; finite, so that no difference is NaN
CLAMPED = tl.constexpr(0.99e12)  # an inverse norm above it stands for a norm below 1e-12
HALF_MAX = tl.constexpr(65504.0)
HALF_GAIN = tl.constexpr(1024.0)


@triton.jit
def pick(table, index):
    """Entry `index` of a tuple of scalars or of pointers of one type."""
    chosen = table[0]
    for i in tl.static_range(1, len(table)):
        chosen = tl.where(index == i, table[i], chosen)
    return chosen


@triton.jit
def find(first_program, program):
    """Index of the bank that `program` works on; `first_program` ascends from 0."""
    index = 0
    for i in tl.static_range(1, len(first_program)):
        index += (program >= first_program[i]).to(tl.int32)
    return index


@triton.jit
def load_tile(matrix, stride, rows, row_ok, first, depth, SIZE: tl.constexpr):
    """[R, SIZE] tile of a row-major matrix from column `first` on; 0 beyond its borders."""
    k = first + tl.arange(0, SIZE)
    offsets = rows[:, None] * stride + k[None, :]
    return tl.load(matrix + offsets, mask=row_ok[:, None] & (k < depth)[None, :], other=0.0)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a·b, accumulated in the dtype of `total`."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def inner_products(
    a, a_stride, a_rows, a_ok, b, b_stride, b_rows, b_ok, depth, TYPE: tl.constexpr,
    SUM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[A, B] tile of a·bᵀ, products in TYPE."""
    total = tl.zeros([A, B], dtype=SUM)
    for first in range(0, depth, DEPTH):
        left = load_tile(a, a_stride, a_rows, a_ok, first, depth, DEPTH).to(TYPE)
        right = load_tile(b, b_stride, b_rows, b_ok, first, depth, DEPTH).to(TYPE)
        total = product(left, tl.trans(right), total, PRECISION, WIDEN)
    return total


@triton.jit
def coefficient_gain(bounded, TYPE: tl.constexpr):
    """What gradient coefficients are multiplied by before they become operands of a product.

    fp16 keeps 11 bits only above 6e-5: coefficients bounded by 2 are moved up, the others are not.
    """
    gain = 1.0
    if TYPE == tl.float16:  # noqa: SIM300
        gain = tl.where(bounded, HALF_GAIN, 1.0)
    return gain


@triton.jit
def coefficients(g, gain, TYPE: tl.constexpr):
    """g · gain as an operand of a product."""
    if TYPE == tl.float16:  # noqa: SIM300
        # Saturating: an infinite coefficient would make the whole row NaN.
        g = tl.clamp(g * gain, -HALF_MAX, HALF_MAX, propagate_nan=tl.PropagateNan.ALL)
    return g.to(TYPE)


@triton.jit
def through_norm(gradient, x, inverse_norm, along):
    """Gradient at x of a function whose gradient at x̂ = x/‖x‖ is known. [R, W]

    inverse_norm · (gradient − x̂ ⟨x̂, gradient⟩), without the projection where ‖x‖ < 1e-12.

    Args:
        gradient: [R, W], at x̂.
        x: [R, W].
        inverse_norm: [R].
        along: [R], ⟨x̂, gradient⟩ over the whole width.
    """
    along = tl.where(inverse_norm < CLAMPED, along, 0.0)
    return inverse_norm[:, None] * (gradient - x * (inverse_norm * along)[:, None])
