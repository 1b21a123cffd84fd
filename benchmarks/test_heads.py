"""Claim: the heads' sweep needs no N×K matrix and is no slower than those that store it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contest import Step, gradients, measure
from torch import Tensor

from fino_fast import Categorical
from fino_fast.eager import Eager
from fino_fast.heads import PrototypeHead
from fino_fast.native import Native
from fino_fast.terms import Backend, HeadCall
from fino_fast.terms import Step as Terms

ROWS, DIM = 4096, 768
# Rows a chunk of F.linear_cross_entropy; its default is slow on a CPU.
CHUNK = 1024


def _linear(benchmark: Any, rows: int, dim: int, classes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, dim).to(dtype).requires_grad_()
    weight = (torch.randn(classes, dim) * 0.02).to(dtype).requires_grad_()
    bias = torch.zeros(classes, dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    leaves = [x, weight, bias]
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(CHUNK, 2**26 // classes))

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), target)

    def chunked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, target, linear_bias=bias, options=chunks)

    def native() -> list[Tensor]:
        call = HeadCall("linear", x, weight, bias, target, torch.tensor(1 / rows))
        return gradients(_guide(Native(), call), leaves)

    steps: dict[str, Step] = {
        "native": native,
        "linear_cross_entropy": lambda: gradients(chunked(*leaves), leaves),
    }
    if classes <= 10_000:
        torch.compiler.reset()
        compiled = torch.compile(dense)
        steps["eager"] = lambda: gradients(dense(*leaves), leaves)
        steps["torch.compile"] = lambda: gradients(compiled(*leaves), leaves)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        exact = gradients(dense(*wide), wide)
    else:  # gigabytes even in fp32: the peer is the measure
        exact = [tensor.double() for tensor in gradients(chunked(*leaves), leaves)]
    # Near its bar, and too slow for more than two rounds in the usual time; the dense peers take
    # seconds in bf16.
    budget = 20.0 if classes != 10_000 else 60.0 if dtype == torch.float32 else 100.0
    measure(benchmark, steps, flops=3 * 2 * rows * classes * dim, exact=exact, budget=budget)


def _guide(backend: Backend, call: HeadCall) -> Tensor:
    loss = backend.step(Terms(heads=[call])).guides
    assert loss is not None
    return loss


@pytest.mark.parametrize("classes", [100, 1000, 10_000])
def test_linear_head(benchmark: Any, classes: int) -> None:
    _linear(benchmark, ROWS, DIM, classes, torch.float32)


@pytest.mark.parametrize("classes", [10_000])
def test_linear_head_bf16(benchmark: Any, classes: int) -> None:
    _linear(benchmark, ROWS, DIM, classes, torch.bfloat16)


@pytest.mark.parametrize("classes", [1_000_000])
def test_linear_head_of_a_million_classes(benchmark: Any, classes: int) -> None:
    """1024 rows, D = 256: bank and gradient are 1 GB each; nothing else of that size."""
    _linear(benchmark, 1024, 256, classes, torch.float32)
    bank_gradient_mb = classes * 257 * 4 / 2**20
    assert benchmark.extra_info["memory_mb"]["native"] <= bank_gradient_mb + 256


@pytest.mark.parametrize("classes", [1000, 12_493])
def test_prototype_head(benchmark: Any, classes: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, DIM, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    bank = F.normalize(torch.randn(classes, DIM), dim=1)
    phi, counts = torch.full((classes,), 0.1), torch.ones(classes, dtype=torch.int64)
    target = torch.randint(0, classes, (ROWS,))

    def loss(backend: Backend, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        inv_count = torch.tensor(1 / ROWS, dtype=dtype)
        call = HeadCall("prototype", x, bank, phi, target, inv_count, counts=counts)
        return _guide(backend, call)

    torch.compiler.reset()
    compiled = torch.compile(lambda x: loss(Eager(), x))
    steps: dict[str, Step] = {
        "native": lambda: gradients(loss(Native(), x), [x]),
        "eager": lambda: gradients(loss(Eager(), x), [x]),
        "torch.compile": lambda: gradients(compiled(x), [x]),
    }
    measure(
        benchmark,
        steps,
        flops=2 * 2 * ROWS * classes * DIM,
        exact=gradients(loss(Eager(), wide, torch.float64), [wide]),
    )


def test_bank_update(benchmark: Any) -> None:
    """Claim: the update of a bank of 1,000,000 classes costs what that of 1,000 costs."""
    torch.manual_seed(0)
    teacher, labels = torch.randn(2, ROWS // 2, 256), torch.randint(0, 1000, (ROWS // 2,))
    heads = {
        classes: PrototypeHead(Categorical("c", classes), 256) for classes in (1000, 1_000_000)
    }

    start = F.normalize(torch.randn(1000, 256), dim=1)

    def update(classes: int) -> list[Tensor]:
        head = heads[classes]
        # Every round from the same state, so that the result stays the same.
        head.centroids[:1000], head.counts[:1000] = start, 1
        head.update(teacher, labels)
        return [head.centroids[:1000]]

    exact = [tensor.double() for tensor in update(1000)]
    measure(
        benchmark,
        {"native": lambda: update(1_000_000), "a bank of 1,000": lambda: update(1000)},
        exact=exact,
    )
