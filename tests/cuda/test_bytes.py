"""What the CUDA kernels load and store, counted on the host, against the formulas of the page."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_case import built_for_the_host, categories, rows, sorted_labels
from torch import Tensor

from fino_fast import cuda, heads
from fino_fast.factors import Categorical
from fino_fast.reference import orthonormal_design

N, D, G, WARP = 2048, 64, 8, 32
STRIPES = D // cuda.STRIPE
NOTHING = torch.empty(0, dtype=torch.float64)


class Watching:
    """Passes launches on, and counts what each does to the memory at the addresses it gets.

    Attributes:
        counted: argument or field of the table → (bytes read, bytes written), by all threads.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.host_read.restype = library.host_written.restype = ctypes.c_int64
        self.sizes: dict[str, int] = {}
        self.counted: dict[str, tuple[int, int]] = {}

    def __getattr__(self, name: str) -> Any:
        def launcher(table: Any, *rest: Any) -> int:
            addresses = {field: getattr(table[0], field) for field, *_ in table[0]._fields_}
            pointers = [value.value for value in rest if isinstance(value, ctypes.c_void_p)]
            addresses |= {f"argument {i}": address for i, address in enumerate(pointers)}
            self.library.host_forget()
            ranges = {
                field: self.library.host_watch(ctypes.c_void_p(addresses[field]), ctypes.c_int64(n))
                for field, n in self.sizes.items()
            }
            error = getattr(self.library, name)(table, *rest)
            self.counted = {
                field: (self.library.host_read(number), self.library.host_written(number))
                for field, number in ranges.items()
            }
            return int(error)

        return launcher


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("counted")
    return built_for_the_host(folder, "counted.cpp", "-fsanitize=thread")


@pytest.fixture
def watching(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watching]:
    watching = Watching(library)
    monkeypatch.setattr(cuda, "_library", lambda: watching)
    return watching


def check(watching: Watching, read: dict[str, float], written: dict[str, float]) -> None:
    """Assert the formula of every array, 15 % either way; of one that is not named, none."""
    for field, counts in watching.counted.items():
        for found, formula in zip(counts, (read, written), strict=True):
            expected = formula.get(field, 0)
            assert expected / 1.15 <= found <= 1.15 * expected, f"{field}: {found} of {expected}"


def statistics(
    watching: Watching, z: Tensor, labels: Tensor, basis: Tensor, groups: int
) -> tuple[Tensor, ...]:
    b = z.element_size()
    watching.sizes = {
        "order": 8 * N, "labels": 8 * N, "basis": 8 * N * groups, "means": 4 * groups * D,
        "sizes": 4 * groups, "group": 8 * N, "mean": 8 * D, "squares": 8 * STRIPES * groups,
        "rest": b * N * D, "argument 0": b * N * D,
    }  # fmt: skip
    if not basis.numel():
        del watching.sizes["basis"]
    order, ordered = sorted_labels([labels])
    return cuda.group_statistics(z, order, ordered, [basis], [groups], [True], 0, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_statistics_of_categories(dtype: torch.dtype, watching: Watching) -> None:
    z, b = rows(N, D).to(dtype), dtype.itemsize
    statistics(watching, z, torch.arange(N) % G, NOTHING, G)
    per_row = N * STRIPES * WARP  # every thread has the row's number and label: one load of a warp
    check(
        watching,
        {"argument 0": 3 * b * N * D, "means": 4 * N * D, "order": 3 * 8 * per_row,
         "labels": 3 * 16 * per_row},
        {"means": 4 * G * D, "rest": b * N * D, "squares": 8 * STRIPES * G, "group": 8 * N,
         "mean": 8 * D, "sizes": 4 * G},
    )  # fmt: skip


def test_group_statistics_of_values(watching: Watching) -> None:
    z, d = rows(N, D), 2
    values = torch.rand(N, d, generator=torch.Generator().manual_seed(0))
    basis = orthonormal_design(values, torch.ones(N, dtype=torch.bool))
    statistics(watching, z, torch.zeros(N, dtype=torch.int64), basis, d)
    per_row = N * STRIPES * WARP
    visits = 2 + d
    check(
        watching,
        {"argument 0": visits * 4 * N * D, "means": 4 * d * N * D, "order": visits * 8 * per_row,
         "labels": 2 * 16 * per_row, "basis": 2 * 8 * d * per_row},
        # ‖U‖² has one group.
        {"means": 4 * d * D, "rest": 4 * N * D, "squares": 4 * STRIPES * (2 * d), "group": 8 * N,
         "mean": 8 * D, "sizes": 4 * d},
    )  # fmt: skip


def test_overlap_shares(watching: Watching) -> None:
    groups = 40
    squares = torch.rand(2, STRIPES, groups)
    sizes = torch.ones(groups)
    watching.sizes = {
        "squares": 8 * STRIPES * groups, "sizes": 4 * groups, "sums": 8 * groups,
        "factors": 4 * groups, "coefficients": 16,
    }  # fmt: skip
    cuda.overlap_shares(squares, sizes, [groups], [True], N)
    check(
        watching,
        {"squares": 8 * STRIPES * groups, "sizes": 4 * groups},
        {"sums": 8 * groups, "factors": 4 * groups, "coefficients": 16},
    )


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_term_losses_of_classes(splits: int, smoothing: float, watching: Watching) -> None:
    p = N * splits
    watching.sizes = {"sums": 4 * 4 * p, "best": 4 * p, "labels": 8 * N, "lse": 4 * N}
    cuda.term_losses(
        torch.rand(4, p), torch.zeros(p, dtype=torch.int32), [torch.zeros(N, dtype=torch.int64)],
        [torch.ones(())], [splits], [10], [smoothing], [1.0], [False], torch.empty(1, N),
    )  # fmt: skip
    planes = 4 if smoothing else 3
    read = {"sums": 4 * planes * p, "best": 4 * N, "labels": 8 * N}
    check(watching, read, {"lse": 4 * N})


def test_term_losses_of_errors(watching: Watching) -> None:
    watching.sizes = {"sums": 4 * 4 * N, "best": 4 * N, "lse": 4 * N}
    cuda.term_losses(
        torch.rand(4, N), torch.zeros(N, dtype=torch.int32), [torch.empty(0, dtype=torch.int64)],
        [torch.ones(())], [1], [2], [0.0], [1.0], [True], torch.empty(1, N),
    )  # fmt: skip
    check(watching, {"sums": 2 * 4 * N}, {"lse": 4 * N})


@pytest.mark.parametrize("preserve", [True, False])
def test_overlap_gradient(preserve: bool, watching: Watching) -> None:
    z, labels = rows(N, D), categories(N, G).clamp_min(0)
    means, sizes, group, mean, *_ = statistics(watching, z, labels, NOTHING, G)
    watching.sizes = {
        "group": 8 * N, "mean": 8 * D, "means": 4 * G * D, "sizes": 4 * G, "coefficients": 16,
        "scale": 4, "argument 0": 4 * N * D, "argument 1": 4 * N * D,
    }  # fmt: skip
    if preserve:
        watching.sizes |= {"at_rest": 4 * N * D, "at_means": 4 * G * D}
    at_rest = torch.ones(N, D) if preserve else torch.empty(0)
    coefficients = torch.ones(1, 2, dtype=torch.float64)
    cuda.overlap_gradient(
        torch.ones(1), z, means, sizes, group, mean, coefficients, [NOTHING], [G], [at_rest],
        means.clone(),
    )  # fmt: skip
    read = {"argument 0": 4, "means": 4, "mean": 8}
    # Whether the row takes part, and of which group it is; then what all threads share.
    read |= {"group": 16, "coefficients": 16, "scale": 4}
    if preserve:
        read |= {"at_rest": 4, "at_means": 4, "sizes": 4}
    check(
        watching,
        {field: size * N * D for field, size in read.items()},
        {"argument 1": 4 * N * D},
    )


def test_bank_update(watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two views of rows in classes of four."""
    views, n, classes = 2, 64, 100
    monkeypatch.setattr(cuda, "serves", lambda bank, rows: True)
    head = heads.PrototypeHead(Categorical("plate", classes), D)
    head.centroids.normal_()
    watching.sizes = {
        "order": 8 * n, "centroids": 4 * classes * D, "counts": 8 * classes, "scratch": 4 * n * D,
        "argument 0": 4 * views * n * D,
    }  # fmt: skip
    head.update(torch.randn(views, n, D), torch.arange(n) // 4)
    touched = n // 4 * D
    # A row: whether it is finite, its norm, its distance. A centroid: its norm, the distances of
    # its four rows, the sum; the sums are added four times, divided, measured, scaled.
    threads = 128
    check(
        watching,
        {"argument 0": 3 * 4 * views * n * D, "centroids": 4 * views * touched * (1 + 4 + 1),
         "scratch": 4 * views * touched * (4 + 1 + 1 + 1), "order": 8 * views * n * threads,
         "counts": 8 * n // 4 * threads},
        {"centroids": 4 * views * touched, "scratch": 4 * views * touched * (1 + 4 + 1),
         "counts": 8 * n // 4},
    )  # fmt: skip
