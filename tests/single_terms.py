"""The terms of a step one by one, as the tests of a backend want them."""

from dataclasses import dataclass

from torch import Tensor

from fino_fast.factors import Role
from fino_fast.terms import (
    Backend,
    ContrastiveCall,
    HeadCall,
    HeadResult,
    OrthogonalCall,
    Step,
)


@dataclass(frozen=True)
class SingleTerms:
    """A backend's terms, each as a step of its own."""

    backend: Backend

    def contrastive(self, rows: Tensor, logit_scale: Tensor, views: int, two_tower: bool) -> Tensor:
        call = ContrastiveCall(rows, logit_scale, views, two_tower)
        term = self.backend.step(Step(contrastive=call)).contrastive
        assert term is not None
        return term

    def head(self, call: HeadCall) -> HeadResult:
        """One head as the sum of the guides."""
        result = self.backend.step(Step(heads=[call]))
        assert result.guides is not None
        return HeadResult(result.guides, result.heads[0].metric)

    def balanced(self, calls: list[HeadCall]) -> list[HeadResult]:
        """Every head by itself, with the gradient of its rows."""
        return self.backend.step(Step(heads=calls, balanced=True)).heads

    def orthogonal(self, z: Tensor, design: Tensor, role: Role) -> Tensor:
        term = self.backend.step(Step(orthogonal=[OrthogonalCall(z, design, role)])).orthogonal
        assert term is not None
        return term
