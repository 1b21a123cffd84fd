"""The EMA teacher: a moving average of the backbone, without gradient."""

import copy

import torch
from torch import nn


def build_teacher(backbone: nn.Module) -> nn.Module:
    """A copy of the backbone in evaluation mode: no dropout, running statistics."""
    return copy.deepcopy(backbone).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, backbone: nn.Module, momentum: float) -> None:
    """θ_teacher ← m·θ_teacher + (1 − m)·θ_backbone; buffers (batch statistics) are copied."""
    for mean, parameter in zip(teacher.parameters(), backbone.parameters(), strict=True):
        mean.lerp_(parameter, 1 - momentum)
    for kept, buffer in zip(teacher.buffers(), backbone.buffers(), strict=True):
        kept.copy_(buffer)
