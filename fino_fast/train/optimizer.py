"""AdamW with layer-wise decay of the learning rate."""

import torch
from timm.optim import (  # type: ignore[attr-defined]  # re-exported without saying so
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from .config import OptimizerConfig
from .model import Student
from .schedule import Schedule


def build_optimizer(student: Student, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over backbone, projector and criterion.

    A backbone's layer l of n learns at `lr · layer_decay^(n − l)` (BEiT); projector and criterion
    learn at `lr`. Vectors (norms, biases, a temperature) and what the backbone itself excludes
    (position embeddings) are not decayed.
    """
    exempt: set[str] = getattr(student.backbone, "no_weight_decay", set)()
    groups = param_groups_layer_decay(
        student.backbone,
        weight_decay=config.weight_decay,
        no_weight_decay_list=exempt,
        layer_decay=config.layer_decay,
    )
    for group in groups:
        group["backbone"] = True
    for module in (student.projector, student.criterion):
        if module is not None:
            groups += new_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def new_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    groups = param_groups_weight_decay(module, weight_decay)
    return [{**group, "lr_scale": 1.0, "backbone": False} for group in groups]


def set_learning_rates(
    optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, lr: float
) -> None:
    """Give every group its learning rate at `step`."""
    for group in optimizer.param_groups:
        start = schedule.frozen if group["backbone"] else 0
        group["lr"] = lr * group["lr_scale"] * schedule.learning_rate(step, start=start)
