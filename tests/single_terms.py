"""The terms of a step one by one, as the tests of a backend want them."""

from dataclasses import dataclass, replace

from torch import Tensor

from fino_fast.factors import Role
from fino_fast.terms import (
    Backend,
    ContrastiveCall,
    HeadCall,
    HeadResult,
    OrthogonalCall,
    Step,
    StepResult,
)


@dataclass(frozen=True)
class SingleTerms:
    """A backend's terms, each as a step of its own."""

    backend: Backend
    deterministic: bool = False

    def step(self, step: Step) -> StepResult:
        return self.backend.step(replace(step, deterministic=self.deterministic))

    def contrastive(self, rows: Tensor, logit_scale: Tensor, views: int, two_tower: bool) -> Tensor:
        call = ContrastiveCall(rows, logit_scale, views, two_tower)
        term = self.step(Step(contrastive=call)).contrastive
        assert term is not None
        return term

    def head(self, call: HeadCall) -> HeadResult:
        """One head as the sum of the guides."""
        result = self.step(Step(heads=[call]))
        assert result.guides is not None
        return HeadResult(result.guides, result.heads[0].metric)

    def balanced(self, calls: list[HeadCall]) -> list[HeadResult]:
        """Every head by itself, with the gradient of its rows."""
        return self.step(Step(heads=calls, balanced=True)).heads

    def orthogonal(self, z: Tensor, design: Tensor, role: Role) -> Tensor:
        term = self.step(Step(orthogonal=[OrthogonalCall(z, design, role)])).orthogonal
        assert term is not None
        return term
