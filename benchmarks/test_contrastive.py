"""Claim: the symmetric sweep beats dense autograd of NT-Xent, and never stores N×N numbers."""

from typing import Any

import pytest
import torch
from contest import Step, gradients, measure
from torch import Tensor

from fino_fast.eager import Eager
from fino_fast.native import Native


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("rows", [64, 1024, 2048, 8192])
def test_nt_xent(benchmark: Any, rows: int, width: int) -> None:
    torch.manual_seed(0)
    p = torch.randn(rows, width, requires_grad=True)
    scale = torch.tensor(10.0)
    wide = p.detach().double().requires_grad_()

    def dense(x: Tensor) -> Tensor:
        return Eager().contrastive(x, scale, 2, False)

    compiled = torch.compile(dense)
    peers = _peers(p)
    steps: dict[str, Step] = {
        "native": lambda: gradients(Native().contrastive(p, scale, 2, False), [p]),
        "eager": lambda: gradients(dense(p), [p]),
        "torch.compile": lambda: gradients(compiled(p), [p]),
        **peers,
    }
    measure(
        benchmark,
        steps,
        # s_ij = s_ji: half a product for the sums, half for the weights, one for the gradients
        flops=2 * 2 * rows**2 * width,
        exact=gradients(dense(wide), [wide]),
        rounds=7 if rows < 4096 else 4,
    )


def _peers(p: Tensor) -> dict[str, Step]:
    """The same loss in the libraries that people use for it."""
    lightly = pytest.importorskip("lightly.loss", reason="install fino-fast[bench]")
    metric = pytest.importorskip("pytorch_metric_learning.losses", reason="fino-fast[bench]")
    nt_xent = lightly.NTXentLoss(temperature=0.1)
    ntxent = metric.NTXentLoss(temperature=0.1)
    half = p.shape[0] // 2
    labels = torch.arange(half).repeat(2)
    peers: dict[str, Step] = {
        "lightly": lambda: gradients(nt_xent(p[:half], p[half:]), [p]),
    }
    if p.shape[0] <= 2048:  # its pairs of indices do not fit memory beyond
        peers["pytorch-metric-learning"] = lambda: gradients(ntxent(p, labels), [p])
    return peers
