"""The kernels of csrc/cuda on the host, and the rows they are tested with."""

import ctypes
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from fino_fast import overlap, reference
from fino_fast.factors import Role
from fino_fast.terms import OrthogonalCall

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
FAKE_CUDA = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10") or not torch.backends.cuda.is_built(),
    reason="fake tensors on a CUDA device need a CUDA build of PyTorch 2.10 or later",
)
SHAPES = [(1, 1, 1), (1, 5, 3), (2, 33, 1), (13, 70, 4), (40, 31, 100), (300, 3, 2)]


def built_for_the_host(folder: Path, source: str = "host_launch.cpp", *flags: str) -> ctypes.CDLL:
    """The launchers of csrc/cuda/launch.h; the device code is that of the GPU.

    Args:
        folder: for the library, `on_host.so`.
        source: in tests/cuda.
        flags: of the compiler, and not of the linker.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    compiled, library = folder / "on_host.o", folder / "on_host.so"
    subprocess.run(
        [
            compiler, "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", *flags,
            "-Wno-unknown-pragmas", f"-I{SOURCES}", "-c",
            str(Path(__file__).parent / "cuda" / source), "-o", str(compiled),
        ],
        check=True,
    )  # fmt: skip
    subprocess.run([compiler, "-shared", str(compiled), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class Counting:
    """The library on the host, and how often each of its launchers was called."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.calls = library, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.library, name)


def run_from_the_last_thread(library: ctypes.CDLL, reverse: bool) -> None:
    """The order in which the threads of a block run between two barriers."""
    library.host_order(ctypes.c_bool(reverse))


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    """[N, D] normal numbers far from zero."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 10


def categories(n: int, classes: int, seed: int = 1) -> Tensor:
    """[N], a tenth of them missing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return labels.masked_fill_(torch.rand(n, generator=generator) < 0.1, -1)


def values(n: int, width: int, seed: int = 2) -> Tensor:
    """[N, d], some rows missing, a constant column last where there are several."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(n, width, generator=generator)
    if width > 1:
        y[:, -1] = 0.5
    y[torch.rand(n, generator=generator) < 0.2] = torch.nan
    return y


def missing(design: Tensor) -> Tensor:
    """[N], the rows that take no part."""
    return design < 0 if design.dim() == 1 else design.isnan().any(1)


def sorted_labels(designs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(order, sorted labels) [F, N] of categories and values."""
    labels = [
        design if design.dim() == 1 else torch.where(missing(design), -1, 0) for design in designs
    ]
    ordered, order = torch.sort(torch.stack(labels), stable=True)
    return order, ordered


def call(z: Tensor, design: Tensor, role: Role, classes: int = 0) -> OrthogonalCall:
    """A term at half strength of the guidance."""
    guidance = torch.tensor(0.5, device=z.device)
    return OrthogonalCall(z, design.to(z.device), role, guidance, 1.0, classes)


def by_products(calls: list[OrthogonalCall]) -> list[Tensor]:
    """R of every call by the kernels of csrc/cuda, the sweep in plain PyTorch."""
    terms: dict[int, Tensor] = {}
    for split in overlap.split(calls):
        swept = [
            (bank.scale * bank.rows.float() @ bank.vectors.T).square().sum() * bank.inv_count
            for bank in split.swept
        ]
        terms |= zip(split.members, split.terms(swept).unbind(0), strict=True)
    return [terms[f] for f in range(len(calls))]


def by_reference(z: Tensor, design: Tensor, role: Role) -> tuple[Tensor, Tensor]:
    """(R, 0.5 · ∂R/∂z) by autograd through the reference, in the dtype of z."""
    z = torch.where(missing(design)[:, None], 0.0, z).requires_grad_()
    term = reference.orthogonal(z, design, role)
    return term.detach(), 0.5 * torch.autograd.grad(term, z)[0]
