"""Values of buffers that a compiled backward pass must not read again.

A compiled step may recompute in its backward pass what it read from a buffer in the forward pass,
although the step has moved the buffer meanwhile: silently wrong gradients (pytorch/pytorch#197039).
The partitioner never recomputes an operator that it does not know, hence this one.
"""

import torch
from torch import Tensor


@torch.library.custom_op("fino_fast::frozen", mutates_args=())
def _frozen(value: Tensor) -> Tensor:
    return value.clone()


@_frozen.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


def frozen(value: Tensor) -> Tensor:
    """`value` as it is now, in the backward pass too; without gradient.

    Args:
        value: computed from buffers, and no view of one.
    """
    frozen: Tensor = _frozen(value) if torch.compiler.is_compiling() else value
    return frozen
