"""Device functions of the tile loop that all sweeps share.

A sweep takes tiles of rows against tiles of a bank: products accumulated over the width, then an
epilogue that is the term's own. A sweep for gradients keeps the epilogue's coefficients of a chunk
of the bank in memory of its program (in practice in the L2 cache), and multiplies them with the
chunk afterwards: the logits are computed once whatever the width, and no accumulator outlives a
product. The tile that a program takes is held in shared memory where it fits (`tiles`). Offsets are
int64 throughout: N·D and K·D may exceed 2³¹.

Loops around a product have nothing hoisted out of them (`disable_licm`): addresses and operand
descriptors of all pieces of all tiles would wait in registers, and there are not as many.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e38)  # a masked logit; finite, so that no difference is NaN
CLAMPED = tl.constexpr(0.99e12)  # an inverse norm above it stands for a norm below 1e-12
FINISH = tl.constexpr(32)  # columns of a finished gradient that are written at a time
HALF_MAX = tl.constexpr(65504.0)
HALF_GAIN = tl.constexpr(1024.0)


@triton.jit
def load_tile(matrix, stride, rows, row_ok, first, depth, SIZE: tl.constexpr):
    """[R, SIZE] tile of a row-major matrix from column `first` on; 0 beyond its borders.

    Its rows, and its `depth` columns, begin and end at multiples of 16 bytes.
    """
    k = first + tl.arange(0, SIZE)
    # A hint on the tile: the compiler knows nothing of an address that comes from a table.
    at = tl.multiple_of(matrix + (rows[:, None] * stride + k[None, :]), (1, 16))
    return tl.load(at, mask=row_ok[:, None] & (k < depth)[None, :], other=0.0)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a·b, accumulated in the dtype of `total`."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def is_held_in(pieces: tl.constexpr, depth, DEPTH: tl.constexpr):
    """Whether a tile of rows of `depth` columns is held in so many pieces; 0: no tile is held."""
    matches = True  # known to the compiler where no tile is held
    if pieces > 0:
        matches = tl.cdiv(depth, DEPTH) == pieces
    return matches


@triton.jit
def load_piece(
    matrix, stride, rows, row_ok, piece: tl.constexpr, depth, DEPTH: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """[R, DEPTH] piece of a tile of rows that PIECES cover; only the last one has a border."""
    k = piece * DEPTH + tl.arange(0, DEPTH)
    at = tl.multiple_of(matrix + (rows[:, None] * stride + k[None, :]), (1, 16))
    ok = row_ok[:, None]
    if piece + 1 == PIECES:
        ok = ok & (k < depth)[None, :]
    return tl.load(at, mask=ok, other=0.0)


@triton.jit
def hold(matrix, stride, rows, row_ok, depth, DEPTH: tl.constexpr, PIECES: tl.constexpr):
    """A tile of rows in pieces, loaded once for all that follows.

    The compiler keeps an operand of products that does not change in a loop in shared memory, but
    it has to see which one it is: hence pieces by number, and a kernel for every width.
    """
    pieces = ()
    for i in tl.static_range(PIECES):
        piece = load_piece(matrix, stride, rows, row_ok, i, depth, DEPTH, PIECES)
        # Triton has no unpacking.
        pieces = pieces + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def inner_products(
    held, a, a_stride, a_rows, a_ok, b, b_stride, b_rows, b_ok, depth, SUM: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """[A, B] tile of a·bᵀ; a is read only where it is not `held`."""
    total = tl.zeros([A, B], dtype=SUM)
    if len(held) > 0:
        right = load_piece(b, b_stride, b_rows, b_ok, 0, depth, DEPTH, len(held))
        for i in tl.static_range(len(held)):
            following = right
            if i + 1 < len(held):
                # On its way while the one before it is multiplied.
                following = load_piece(b, b_stride, b_rows, b_ok, i + 1, depth, DEPTH, len(held))
            total = product(held[i], tl.trans(right), total, PRECISION, WIDEN)
            right = following
    else:
        for first in range(0, depth, DEPTH):
            left = load_tile(a, a_stride, a_rows, a_ok, first, depth, DEPTH)
            right = load_tile(b, b_stride, b_rows, b_ok, first, depth, DEPTH)
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
def accumulate(
    work, count, b, b_stride, first, inner_ok, scratch, depth, started,
    A: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """scratch = (scratch where `started` is 1) + coefficients · vectors first … of b.

    With CHECKED a vector whose entry of `inner_ok` is 0 may hold anything, NaN too.

    Args:
        work: [A, CHUNK] of this program, of which the first `count` columns hold coefficients.
        b: a matrix of `depth` columns.
        scratch: [A, depth rounded up to a multiple of WIDTH] of this program: no borders, no masks,
            which would cost registers beside the accumulator.
    """
    # What one thread wrote, here and there, another will read.
    tl.debug_barrier()
    rows = tl.arange(0, A)
    stride = tl.cdiv(depth, WIDTH) * WIDTH
    for width_0 in tl.range(0, depth, WIDTH, disable_licm=True):
        at = scratch + width_0 + rows[:, None] * stride + tl.arange(0, WIDTH)[None, :]
        total = tl.load(at, mask=started > 0, other=0.0)
        for k in range(0, count, STEP):
            step = tl.arange(0, STEP)
            step_ok = k + step < count
            if CHECKED:
                step_ok = step_ok & (tl.load(inner_ok + k + step) != 0)
            left = tl.load(work + k + rows[:, None] * CHUNK + step[None, :])
            right = load_tile(
                b, b_stride, first + k + step.to(tl.int64), step_ok, width_0, depth, WIDTH
            )
            total = product(left, right, total, PRECISION, WIDEN)
        tl.store(at, total)
    tl.debug_barrier()


@triton.jit
def finish(
    scratch, scale, x, x_stride, projected, off, outer, outer_ok, out, depth, started,
    SUM: tl.constexpr, A: tl.constexpr, WIDTH: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """out (+)= scale · scratch − off · x, in rows of `depth` columns.

    Args:
        scratch: as `accumulate` left it.
        scale: [A].
        x: with PROJECT: subtracted where `projected`, times off, [A].
        outer: [A] the vectors' numbers in x and out.
        started: 1 where `out` holds a sum already.
    """
    local = tl.arange(0, A)
    stride = tl.cdiv(depth, WIDTH) * WIDTH
    for first in tl.range(0, depth, FINISH, disable_licm=True):
        k = first + tl.arange(0, FINISH)
        ok = outer_ok[:, None] & (k < depth)[None, :]
        total = tl.load(scratch + local[:, None] * stride + k[None, :], mask=ok, other=0.0)
        total *= scale[:, None]
        if PROJECT:
            row = load_tile(x, x_stride, outer, projected, first, depth, FINISH).to(SUM)
            total -= row * off[:, None]
        at = out + outer[:, None] * depth + k[None, :]
        tl.store(at, total + tl.load(at, mask=ok & (started > 0), other=0.0), mask=ok)
    # The next tile of this program writes to `scratch` again.
    tl.debug_barrier()
