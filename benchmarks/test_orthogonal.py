"""Claim: the orthogonal terms cost little more than the products they need, and no N×N array."""

from typing import Any

import pytest
import torch
from contest import Step, gradients, measure
from torch import Tensor

from fino_fast.eager import Eager
from fino_fast.factors import Role
from fino_fast.native import Native

ROWS, DIM = 4096, 768


@pytest.mark.parametrize("groups", [50, 5000])
@pytest.mark.parametrize("role", ["preserve", "suppress"])
def test_orthogonal(benchmark: Any, groups: int, role: Role) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, groups, (ROWS // 2,)).repeat(2)
    present = labels.unique().numel()
    z = (torch.randn(ROWS, DIM) + torch.randn(groups, DIM)[labels]).requires_grad_()
    wide = z.detach().double().requires_grad_()

    def dense(z: Tensor) -> Tensor:
        return Eager().orthogonal(z, labels, role)

    torch.compiler.reset()
    compiled = torch.compile(dense)
    steps: dict[str, Step] = {
        "native": lambda: gradients(Native().orthogonal(z, labels, role), [z]),
        "eager": lambda: gradients(dense(z), [z]),
        "torch.compile": lambda: gradients(compiled(z), [z]),
    }
    # The cheaper of a sweep over the groups and the squared form, whose symmetric half is enough.
    sweep = 3 * 2 * ROWS * present * DIM
    squared = (1 + 0.5) * 2 * (ROWS + present) * DIM**2
    measure(
        benchmark,
        steps,
        flops=0.0 if role == "suppress" else min(sweep, squared),
        exact=gradients(dense(wide), [wide]),
    )
