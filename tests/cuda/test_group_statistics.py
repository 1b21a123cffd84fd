import ctypes

import pytest
import torch
from cuda_case import SHAPES, categories, missing, rows, run_from_the_last_thread, sorted_labels
from cuda_case import values as continuous
from torch import Tensor

from fino_fast import cuda, reference
from fino_fast.reference import orthonormal_design

NOTHING = torch.empty(0, dtype=torch.float64)
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]


@pytest.fixture(autouse=True)
def library(on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_library", lambda: on_host)


def turned(matrix: Tensor) -> Tensor:
    """The same with neighbouring rows side by side in memory."""
    return matrix.T.contiguous().T


def statistics(z: Tensor, designs: list[Tensor], groups: list[int]) -> Statistics:
    order, labels = sorted_labels(designs)
    basis = [
        NOTHING if design.dim() == 1 else turned(orthonormal_design(design, ~missing(design)))
        for design in designs
    ]
    wanted = [True] * len(designs)
    return cuda.group_statistics(z, order, labels, basis, groups, wanted, 0, len(z))


def exact(z: Tensor, design: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Z, S, U) of the valid rows in fp64, zero elsewhere; from loops over the categories."""
    valid = ~missing(design)
    centred = torch.zeros_like(z, dtype=torch.float64)
    centred[valid] = z[valid].double() - z[valid].double().mean(0)
    s = torch.zeros_like(centred)
    if design.dim() == 2:
        basis = orthonormal_design(design, valid)
        s = basis @ (basis.T @ centred)
    elif len(design[valid].unique()) > 1:
        for label in design[valid].unique():
            s[design == label] = centred[design == label].mean(0)
    return centred, s, centred - s


def expanded(found: Statistics, groups: list[int], designs: list[Tensor], f: int) -> Tensor:
    """S of factor f from M."""
    means, group = found[0].double().split(groups)[f], found[2][f]
    if designs[f].dim() == 2:
        return orthonormal_design(designs[f], ~missing(designs[f])) @ means
    return torch.where((group >= 0)[:, None], means[group.clamp_min(0)], 0.0)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize(("n", "width", "classes"), SHAPES)
def test_all_factors_split_the_rows(n: int, width: int, classes: int) -> None:
    """Categories, values, every row its own class, one class, no valid row: in one launch."""
    designs = [
        categories(n, classes),
        continuous(n, 3),
        torch.arange(n).flip(0),
        torch.zeros(n, dtype=torch.int64),
        torch.full((n,), -1),
    ]
    groups = [min(classes, n), 3, n, 2, 1]
    z = rows(n, width)
    of_no_use = torch.stack([missing(design) for design in designs[:2]]).all(0)
    z[of_no_use] = torch.nan
    for f, design in enumerate(designs):
        if f > 1:  # rows that take part somewhere are finite, the others may hold anything
            design[of_no_use] = -1
    means, sizes, group, mean, squares, rest = found = statistics(z, designs, groups)
    sums = squares.double().sum(1).split(groups, dim=1)
    for f, design in enumerate(designs):
        centred, s, u = exact(z, design)
        valid = ~missing(design)
        size = max(1.0, float(centred.abs().max()))
        assert torch.equal(group[f] < 0, ~valid)
        assert error(rest[f], u) <= 4e-7 * size
        assert error(expanded(found, groups, designs, f), s) <= 4e-7 * size
        if valid.any():
            assert error(mean[f], z[valid].double().mean(0)) <= 1e-12
        total = float(centred.square().sum()) + 1e-12
        assert abs(float(sums[f][0].sum() - s.square().sum())) <= 1e-6 * total
        assert abs(float(sums[f][1].sum() - u.square().sum())) <= 1e-6 * total
        if design.dim() == 1:
            labels, counts = design[valid].unique(return_counts=True)
            assert sizes.split(groups)[f].tolist() == [
                *counts.tolist(), *[0] * (groups[f] - len(labels))
            ]  # fmt: skip
            for g, label in enumerate(labels):
                rows_of = design == label
                assert (group[f][rows_of] == g).all()
                found_of = sums[f][:, g]
                expected = torch.stack([part[rows_of].square().sum() for part in (s, u)])
                assert error(found_of, expected) <= 1e-6 * total
            assert (means.split(groups)[f][len(labels) :] == 0).all()
            assert (sums[f][:, len(labels) :] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_as_exact_as_the_reference(offset: float) -> None:
    """Error to fp64 at most twice that of plain PyTorch in fp32."""
    z = rows(200, 40) + offset
    labels = categories(200, 9)
    found = statistics(z, [labels], [9])
    _, s, u = exact(z, labels)
    valid = labels >= 0
    mask = valid[:, None].float()
    theirs = (z * mask - (z * mask).sum(0) / mask.sum()) * mask
    theirs_s = reference.explained(theirs, labels, valid)
    assert error(expanded(found, [9], [labels], 0), s) <= 2 * error(theirs_s, s)
    assert error(found[5][0], u) <= 2 * error(theirs - theirs_s, u)
    for found_sum, their_part, part in zip(
        found[4].double().sum((1, 2)), (theirs_s, theirs - theirs_s), (s, u), strict=True
    ):
        expected = part.square().sum()
        rounding = 1e-7 * expected
        assert (
            error(found_sum, expected) <= 2 * error(their_part.square().sum(), expected) + rounding
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    z, labels = rows(20, 37).to(dtype), categories(20, 3)
    z[0, 0], z[1, 0] = 2.0**-24, -(2.0**-14)  # subnormal and smallest normal of fp16
    half, full = statistics(z, [labels], [3]), statistics(z.float(), [labels], [3])
    for found, expected in zip(half[:5], full[:5], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(half[5][0], full[5][0].to(dtype))


def test_the_order_of_threads_and_strides_changes_no_bit(on_host: ctypes.CDLL) -> None:
    z, designs, groups = rows(50, 40), [categories(50, 5), continuous(50, 2)], [5, 2]
    first = statistics(z, designs, groups)
    run_from_the_last_thread(on_host, True)
    again = statistics(turned(z), designs, groups)
    run_from_the_last_thread(on_host, False)
    for found, expected in zip((*again[:5], *again[5]), (*first[:5], *first[5]), strict=True):
        assert torch.equal(found, expected)


def test_the_rest_of_some_rows_only() -> None:
    """As where every rank keeps that of its own rows."""
    z, designs = rows(50, 40), [categories(50, 5), continuous(50, 2)]
    *_, whole = statistics(z, designs, [5, 2])
    order, labels = sorted_labels(designs)
    basis = [NOTHING, orthonormal_design(designs[1], ~missing(designs[1]))]
    *_, some = cuda.group_statistics(z, order, labels, basis, [5, 2], [True, True], 20, 15)
    for found, expected in zip(some, whole, strict=True):
        assert torch.equal(found, expected[20:35])


def test_more_factors_than_a_launch_takes() -> None:
    designs = [categories(6, 3, seed=f) for f in range(33)]
    z, groups = rows(6, 2), [3] * 33
    means, *_ = statistics(z, designs, groups)
    alone, *_ = statistics(z, designs[-1:], [3])
    assert torch.equal(means[-3:], alone)


def far_rows(n: int, width: int) -> Tensor:
    """[N, D] without contents; torch.empty would be filled by the poison."""
    try:
        storage = torch.UntypedStorage(4 * n * width)
    except RuntimeError as error:
        pytest.skip(f"no {4 * n * width:,} bytes of address space: {error}")
    return torch.empty(0).set_(storage, 0, (n, width), (width, 1))


def test_rows_beyond_31_bits(on_host: ctypes.CDLL) -> None:
    """Row 33 lies beyond entry 2³¹; the pages between are never touched."""
    n, width = 34, 2**26
    z, rest, means = far_rows(n, width), far_rows(n, width), far_rows(2, width)
    z[0, :32], z[33, :32] = 1.0, 4.0
    labels = torch.full((n,), -1)
    labels[0], labels[33] = 0, 1
    order, ordered = sorted_labels([labels])
    sizes, squares = torch.empty(2), torch.empty(4)
    mean, group = torch.empty(32, dtype=torch.float64), torch.empty(n, dtype=torch.int64)
    factor = {
        "order": order[0], "labels": ordered[0], "basis": None, "means": means, "sizes": sizes,
        "group": group, "mean": mean, "squares": squares, "rest": rest, "groups": 2,
    }  # fmt: skip
    # Only the first of the 2²¹ stripes: the host runs them one after another.
    on_host.host_first_stripe(
        cuda._table(cuda._Factor, [factor]),
        ctypes.c_void_p(z.data_ptr()),
        *(ctypes.c_int64(size) for size in (n, width, 2)),
    )
    assert mean.tolist() == [2.5] * 32
    assert means[:, :32].tolist() == [[-1.5] * 32, [1.5] * 32]
    assert rest[33, :32].tolist() == rest[1, :32].tolist() == [0.0] * 32
    assert squares.tolist() == [72.0, 72.0, 0.0, 0.0]


def test_operator() -> None:
    designs = [categories(6, 3), continuous(6, 2)]
    order, labels = sorted_labels(designs)
    basis = [NOTHING, orthonormal_design(designs[1], ~missing(designs[1]))]
    torch.library.opcheck(
        cuda.group_statistics, (rows(6, 3), order, labels, basis, [3, 2], [True, False], 2, 3)
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [(2, "CUDA error 2, because"), (209, r"because; build .* TORCH_CUDA_ARCH_LIST=12\.0")],
)
def test_a_refused_launch_is_an_error(
    code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def fino_group_statistics(self, *arguments: object) -> int:
            return code

    def because(error: int) -> bytes:
        assert error == code
        return b"because"

    Refusing.fino_error_string = staticmethod(because)
    monkeypatch.setattr(cuda, "_library", Refusing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    with pytest.raises(RuntimeError, match=f"fino_group_statistics: .*{said}"):
        statistics(rows(3, 2), [categories(3, 2)], [2])
