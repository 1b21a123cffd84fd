"""Claim: the heads' sweep needs no N×K matrix and is no slower than those that store it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contest import Step, gradients, measure
from torch import Tensor

from fino_fast.eager import Eager
from fino_fast.native import Native
from fino_fast.terms import HeadCall

ROWS, DIM = 4096, 768


@pytest.mark.parametrize("classes", [100, 1000, 10_000])
def test_linear_head(benchmark: Any, classes: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, DIM, requires_grad=True)
    weight = (torch.randn(classes, DIM) * 0.02).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    target = torch.randint(0, classes, (ROWS,))

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), target)

    compiled = torch.compile(dense)
    leaves = [x, weight, bias]
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def native() -> list[Tensor]:
        call = HeadCall("linear", x, weight, bias, target, torch.tensor(1 / ROWS))
        return gradients(Native().heads([call], False)[0].loss, leaves)

    steps: dict[str, Step] = {
        "native": native,
        "eager": lambda: gradients(dense(*leaves), leaves),
        "torch.compile": lambda: gradients(compiled(*leaves), leaves),
        # Its default chunk is slow on a CPU.
        "linear_cross_entropy": lambda: gradients(
            F.linear_cross_entropy(x, weight, target, linear_bias=bias, options=chunks), leaves
        ),
    }
    measure(
        benchmark,
        steps,
        flops=3 * 2 * ROWS * classes * DIM,
        exact=gradients(dense(*wide), wide),
        rounds=4,
    )


@pytest.mark.parametrize("classes", [1000, 12_493])
def test_prototype_head(benchmark: Any, classes: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, DIM, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    bank = F.normalize(torch.randn(classes, DIM), dim=1)
    phi, counts = torch.full((classes,), 0.1), torch.ones(classes, dtype=torch.int64)
    target = torch.randint(0, classes, (ROWS,))

    def loss(backend: Eager, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        inv_count = torch.tensor(1 / ROWS, dtype=dtype)
        call = HeadCall("prototype", x, bank, phi, target, inv_count, counts=counts)
        return backend.heads([call], False)[0].loss

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
        rounds=4,
    )
