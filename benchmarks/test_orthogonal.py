"""Claim: the orthogonal terms cost little more than the products they need, and no N×N array."""

from typing import Any

import pytest
import torch
from contest import Step, gradients, measure
from torch import Tensor

from fino_fast.factors import Role
from fino_fast.native import Native
from fino_fast.reference import orthogonal
from fino_fast.terms import OrthogonalCall
from fino_fast.terms import Step as Terms

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
        return orthogonal(z, labels, role)

    def native() -> list[Tensor]:
        term = Native().step(Terms(orthogonal=[OrthogonalCall(z, labels, role)])).orthogonal
        assert term is not None
        return gradients(term, [z])

    torch.compiler.reset()
    compiled = torch.compile(dense)
    steps: dict[str, Step] = {
        "native": native,
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
