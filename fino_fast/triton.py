"""The `triton` backend: the operators of `fino_fast.ops`, served by Triton kernels on a GPU.

Importing this module registers the kernels for CUDA tensors.
"""

import torch
from torch import Tensor

from . import cuda, reference
from .distributed import gather_views
from .factors import Role
from .kernels.contrastive_backward import contrastive_backward
from .kernels.contrastive_forward import contrastive_forward
from .kernels.heads import heads_forward
from .native import Native

KERNELS = {
    "fino::contrastive_forward": contrastive_forward,
    "fino::contrastive_backward": contrastive_backward,
    "fino::heads_forward": heads_forward,
}

for _name, _kernel in KERNELS.items():
    torch.library.impl(_name, "CUDA", _kernel)


class Triton(Native):
    """The operators of the `native` backend on a GPU: their fakes and autograd formulas are shared.

    The kernels are compiled and interpreted in the tests; docs/gpu.md says what was run.
    """

    def orthogonal(self, z: Tensor, metadata: Tensor, role: Role) -> Tensor:
        explained = cuda.explained if cuda.AVAILABLE else reference.explained
        return reference.orthogonal(gather_views(z, 1), gather_views(metadata, 1), role, explained)
