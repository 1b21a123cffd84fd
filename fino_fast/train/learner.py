"""One optimisation step, and everything that it moves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fino_fast.data.order import derive_key
from fino_fast.errors import FinoError

from .config import TrainConfig
from .model import Student, embed
from .optimizer import build_optimizer, set_learning_rates
from .schedule import Schedule
from .teacher import build_teacher, update_teacher
from .world import World


class DivergedError(FinoError):
    """A loss or gradient is not finite; the weights were not touched by that step."""


@dataclass
class Learner:
    """Student, teacher and optimizer of one rank.

    Everything random in a step is drawn from a generator seeded by (seed, step, rank), so what is
    to be restored on resuming is `models` and `optimizer` alone.
    """

    config: TrainConfig
    schedule: Schedule
    world: World
    student: Student
    teacher: nn.Module | None = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    _frozen: bool | None = field(init=False, default=None)
    _parallel: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.student.to(self.world.device)
        self.optimizer = build_optimizer(self.student, self.config.optimizer)
        self.teacher = build_teacher(self.student.backbone) if self.config.teacher else None

    @property
    def models(self) -> nn.ModuleDict:
        """All that a checkpoint keeps, by the names it has there."""
        modules: dict[str, nn.Module] = {"student": self.student}
        if self.teacher is not None:
            modules["teacher"] = self.teacher
        return nn.ModuleDict(modules)

    def _set_frozen(self, frozen: bool) -> None:
        """Freeze or unfreeze the backbone, and let the ranks average what gradients are left."""
        self._frozen = frozen
        keep = self.config.backbone.batch_statistics == "kept"
        self.student.freeze_backbone(frozen, keep_statistics=keep)
        self._parallel = self.student
        if self.world.size > 1 and any(p.requires_grad for p in self.student.parameters()):
            # Again at the unfreezing, because DDP looks at requires_grad only once.
            self._parallel = distribute(self.student)

    def step(
        self, step: int, views: Sequence[Tensor], metadata: Mapping[str, Tensor]
    ) -> dict[str, Tensor | float]:
        """Learn from one batch.

        Args:
            step: 0 … total − 1.
            views: tensors [V, B, C, H, W], one for each image size, the global views first.
            metadata: factor name → [B] or [B, d], or [V, B] where views differ.

        Returns:
            `loss`, the terms of `FinoLoss`, `grad_norm` (before clipping) and `lr`.

        Raises:
            DivergedError: the loss or its gradient is not finite; names step and term.
        """
        if self._frozen is not (frozen := step < self.schedule.frozen):
            self._set_frozen(frozen)
        torch.manual_seed(derive_key(self.config.seed, step, self.world.rank))
        device = self.world.device
        views = [images.to(device, non_blocking=True) for images in views]
        metadata = {name: value.to(device, non_blocking=True) for name, value in metadata.items()}
        self.student.criterion.set_progress(self.schedule.progress(step))
        lr = self.config.optimizer.lr * self.schedule.learning_rate(step)
        set_learning_rates(self.optimizer, self.schedule, step, self.config.optimizer.lr)

        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            target = None
            if self.teacher is not None:
                with torch.no_grad():
                    target = embed(self.teacher, views[:1])
            loss, terms = self._parallel(views, metadata, target)
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        terms = {"loss": loss.detach(), **terms, "grad_norm": norm}
        self._check_finite(step, terms)
        if self.config.optimizer.clip is not None:
            clip_grads_with_norm_(parameters, self.config.optimizer.clip, norm)
        self.optimizer.step()
        if self.world.size > 1:
            average_buffers(self.student.backbone)
        if self.teacher is not None and self.config.teacher is not None:
            momentum = self.schedule.teacher_momentum(step, self.config.teacher.momentum)
            update_teacher(self.teacher, self.student.backbone, momentum)
        return {**terms, "lr": lr}

    def _check_finite(self, step: int, terms: dict[str, Tensor]) -> None:
        if torch.isfinite(terms["loss"] + terms["grad_norm"]):
            return
        values = {name: float(value) for name, value in terms.items()}
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        parameters = [
            name
            for name, parameter in self.student.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        where = f"; first parameter with such a gradient: {parameters[0]}" if parameters else ""
        raise DivergedError(
            f"step {step + 1}: not finite: {', '.join(wrong)}{where}. The weights are those from "
            "before this step. Try a smaller optimizer.lr, or precision: fp32"
        )


def distribute(student: Student) -> DistributedDataParallel:
    """The student with its gradients averaged over the ranks.

    Buffers are not sent before each forward pass: the banks are equal on all ranks already, and may
    be large.
    """
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(student, **options)


def average_buffers(module: nn.Module) -> None:
    """Give all ranks the mean of their running batch statistics."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
