"""The native terms against the oracle over random shapes, dtypes, strides and masks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import (
    EAGER,
    KINDS,
    NATIVE,
    assert_as_exact_as_eager,
    contrastive_gradients,
    copy_of,
    head_call,
    head_gradients,
    orthogonal_gradients,
)
from torch import Tensor

FUZZ = settings(max_examples=60, deadline=None, derandomize=True, database=None)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "every other", "one row expanded"])
# What a half-precision gradient is rounded to at the end, beside what is lost before.
FLOOR = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout; or the first row in every place."""
    if layout == "transposed":
        return rows.T.contiguous().T
    if layout == "every other":
        return torch.stack([rows, rows], 1).flatten(0, 1)[::2]
    if layout == "one row expanded":
        return rows[:1].expand_as(rows)
    return rows


def floor_of(dtype: torch.dtype, exact: list[Tensor], scale: float = 10.0) -> float:
    """A few roundings of fp32, and that of the result.

    The gradient at a row is what remains of one `scale` times as large without its part along it.
    """
    largest = max(float(tensor.abs().max()) for tensor in exact)
    return 2e-7 * (1 + scale) + FLOOR.get(dtype, 0.0) * largest


# One image alone has a loss of exactly 0, and a width of 1 a gradient of exactly 0: PyTorch finds
# them as x − x, a sweep up to rounding. Both are in test_terms.py.
@FUZZ
@given(
    views=st.integers(2, 4),
    images=st.integers(2, 150),
    width=st.integers(2, 70),
    tau=st.sampled_from([0.01, 0.05, 0.1, 1.0, 30.0]),
    two_tower=st.booleans(),
    dtype=DTYPES,
    layout=LAYOUTS,
    seed=st.integers(0, 2**31),
)
def test_contrastive(views, images, width, tau, two_tower, dtype, layout, seed):
    torch.manual_seed(seed)
    views = 2 if two_tower else views
    rows = laid_out(torch.randn(views * images, width).to(dtype), layout)
    exact = contrastive_gradients(EAGER, rows.double(), tau, two_tower, views)
    assert_as_exact_as_eager(
        contrastive_gradients(NATIVE, rows, tau, two_tower, views),
        contrastive_gradients(EAGER, rows, tau, two_tower, views),
        exact,
        floor_of(dtype, exact, 1 / tau),
    )


@FUZZ
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 120),
    d=st.integers(1, 70),
    k=st.integers(1, 200),
    dtype=DTYPES,
    layout=LAYOUTS,
    seed=st.integers(0, 2**31),
)
def test_heads(kind, n, d, k, dtype, layout, seed):
    torch.manual_seed(seed)
    call = head_call(kind, n, d, k, dtype)
    call.x = laid_out(call.x.detach(), layout).requires_grad_()
    if call.bank.requires_grad:
        call.bank = laid_out(call.bank.detach(), layout).requires_grad_()
    else:
        call.bank = laid_out(call.bank, layout)
    exact = head_gradients(EAGER, copy_of(call, torch.float64))
    assert_as_exact_as_eager(
        head_gradients(NATIVE, copy_of(call, dtype)),
        head_gradients(EAGER, copy_of(call, dtype)),
        exact,
        floor_of(dtype, exact),
    )


@FUZZ
@given(
    n=st.integers(1, 150),
    d=st.integers(1, 90),
    groups=st.integers(1, 100),
    values=st.integers(0, 3),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    role=st.sampled_from(["preserve", "suppress"]),
    dtype=DTYPES,
    layout=LAYOUTS,
    seed=st.integers(0, 2**31),
)
def test_orthogonal(n, d, groups, values, missing, role, dtype, layout, seed):
    torch.manual_seed(seed)
    z = laid_out(torch.randn(n, d).to(dtype), layout)
    left_out = torch.rand(n) < missing
    if values:
        design = torch.randn(n, values).masked_fill(left_out[:, None], torch.nan)
    else:
        design = torch.randint(groups, (n,)).masked_fill(left_out, -1)
    wide = design.double() if values else design
    exact = orthogonal_gradients(z.double(), wide, role, EAGER)
    assert_as_exact_as_eager(
        orthogonal_gradients(z, design, role, NATIVE),
        orthogonal_gradients(z, design, role, EAGER),
        exact,
        floor_of(dtype, exact),
    )
