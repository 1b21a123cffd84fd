"""What changes with the step: learning rate, λ's progress, the teacher's momentum.

All are pure functions of the step, so resuming needs no state of theirs.
"""

import math
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Schedule:
    """The steps of a run: `total`, of which the backbone is frozen for the first `frozen`, with
    learning rates that rise for `warmup` steps."""

    total: int
    warmup: int
    frozen: int

    @classmethod
    def of_shares(cls, total: int, *, warmup: float, frozen: float) -> Self:
        """From shares in [0, 1) of the total; at least one step is left unfrozen."""
        return cls(total, round(warmup * total), min(round(frozen * total), total - 1))

    def learning_rate(self, step: int, *, start: int = 0) -> float:
        """Share of the full learning rate at `step`: linear warm-up, then a half cosine to 0.

        Args:
            step: 0 … total − 1.
            start: the step at which the parameters join, `frozen` for a backbone that was; their
                warm-up begins there, because their optimizer state does too.
        """
        rise = min(1.0, (step - start + 1) / self.warmup) if self.warmup else 1.0
        if step < start:
            return 0.0
        return rise * 0.5 * (1 + math.cos(math.pi * step / self.total))

    def progress(self, step: int) -> float:
        """What `FinoLoss.set_progress` takes: 0 … 1, counted from the unfreezing."""
        return max(0, step - self.frozen) / (self.total - self.frozen)

    def teacher_momentum(self, step: int, base: float) -> float:
        """Momentum of the moving average: a half cosine from `base` to 1, as in DINO."""
        return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / self.total))
