"""What the terms do with a tile of logits: the only places where their kinds differ.

The kinds are those of `fino_fast.ops.KINDS`, and PAIRS. Their sums over a row are of two
sorts: the log-sum-exp with the target's logit, or the errors. An OVERLAP, ‖U Mᵀ‖² of an orthogonal
term, is the squared error of IDENTITY outputs whose biases and targets are all zero.
"""

import triton
import triton.language as tl

from .tile import inner_products

PROTOTYPE, IDENTITY, SIGMOID, TANH = (tl.constexpr(i) for i in range(1, 5))  # 0 is linear
PAIRS = tl.constexpr(5)  # the contrastive term: the bank is the rows of all ranks
OVERLAP = tl.constexpr(6)  # to the kernels an IDENTITY


@triton.jit
def is_error(kind):
    return (kind >= IDENTITY) & (kind <= TANH)


@triton.jit
def is_cosine(kind):
    """Whether the bank holds unit vectors by a temperature, and the rows count as unit rows."""
    return (kind == PROTOTYPE) | (kind == PAIRS)


@triton.jit
def activation(s, kind):
    """act(s) of a continuous head."""
    # tanh s = 2 sigmoid(2 s) − 1; the exponent is never positive, so nothing overflows.
    t = tl.where(kind == TANH, 2.0 * s, s)
    e = tl.exp(-tl.abs(t))
    sigmoid = tl.where(t >= 0, 1.0, e) / (1.0 + e)
    return tl.where(kind == IDENTITY, s, tl.where(kind == SIGMOID, sigmoid, 2.0 * sigmoid - 1.0))


@triton.jit
def slope(y, kind):
    """act′ as a function of y = act(s)."""
    return tl.where(kind == IDENTITY, 1.0, tl.where(kind == SIGMOID, y * (1.0 - y), 1.0 - y * y))


@triton.jit
def squared_errors(s, values, first, second, exists, kind):
    """(squared errors, their derivative at s, observed entries) of a tile of logits.

    Args:
        values: [N, K], from the first row of the tile on.
        first, second: the tile's offsets in it along both axes; within a tile they need no 64 bits.
        exists: entries within the borders.
    """
    target = tl.load(values + first + second, mask=exists, other=float("nan"))
    observed = target == target  # NaN is missing
    y = activation(s, kind)
    error = tl.where(observed, y - target, 0.0)
    return error * error, tl.where(observed, 2.0 * error * slope(y, kind), 0.0), observed


@triton.jit
def entropy_slope(s, lse, is_target, takes_part, epsilon, classes):
    """∂(cross entropy of a row)/∂logits on a tile, softmax − (1 − ε)·[own class] − ε/K.

    Args:
        s: [R, C] logits, or [C, R].
        lse: [R, 1] or [1, R], log-sum-exps of the rows.
        is_target: like s, the entries of the rows' own classes.
        takes_part: like s, rows with a label and classes in the softmax; elsewhere it is 0.
        epsilon: ε of the label smoothing.
        classes: K.
    """
    g = tl.exp(s - lse) - epsilon / classes - tl.where(is_target, 1.0 - epsilon, 0.0)
    return tl.where(takes_part, g, 0.0)


@triton.jit
def pair_masks(rows, columns, column_ok, local, images, first, two_tower):
    """([R, C] pairs that are in the softmax, [R, C] positive pairs) of view-major batches."""
    row, column = rows.to(tl.int32), columns.to(tl.int32)
    row_view, column_view = row // local, column // images
    row_image, column_image = row % local + first, column % images
    # A row is not compared with itself, or, of two towers, with its own view.
    row_key = row_view + tl.where(two_tower > 0, 0, row_view * (images - 1) + row_image)
    column_key = tl.where(two_tower > 0, column_view, column)
    compared = column_ok[None, :] & (row_key[:, None] != column_key[None, :])
    return compared, compared & (row_image[:, None] == column_image[None, :])


@triton.jit
def logits(
    held, x, x_stride, rows, row_ok, norm, bank, bank_stride, columns, column_ok, offset, kind,
    depth, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] tile of ⟨x, bank⟩ · norm + bias."""
    s = inner_products(
        held, x, x_stride, rows, row_ok, bank, bank_stride, columns, column_ok, depth,
        SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
    )  # fmt: skip
    bias = tl.load(offset + columns, mask=column_ok & ~is_cosine(kind), other=0.0)
    return s * norm[:, None] + bias[None, :]
