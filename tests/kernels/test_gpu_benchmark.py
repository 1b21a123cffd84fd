"""What `make bench DEVICE=cuda` measures, small, so that it runs on the day there is a GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fino_fast import backends, ops

pytestmark = pytest.mark.skipif(ops.LOAD_ERROR is not None, reason=str(ops.LOAD_ERROR))
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Compiled in tests of their own; or not installed without a GPU, or not in an older PyTorch.
ELSEWHERE = {"torch.compile", "triton, compiled", "liger", "cut_cross_entropy"}
if not hasattr(F, "linear_cross_entropy"):
    ELSEWHERE.add("chunked")


@pytest.fixture
def contenders(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_contenders

    from fino_fast.triton import Triton

    # By its name in the interpreter, too.
    monkeypatch.setitem(backends._SERVES, "triton", device.type)
    monkeypatch.setitem(backends._FUSED, "triton", Triton())
    yield gpu_contenders
    for name in ("gpu_contenders", "contest"):
        del sys.modules[name]


@pytest.mark.parametrize("claim", ["linear head", "contrastive", "whole loss"])
def test_the_contenders_agree_with_fp64_in_parts(
    claim: str, contenders: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contest import check

    torch.manual_seed(0)
    make = {"device": device.type, "dtype": torch.bfloat16}
    monkeypatch.setattr(contenders, "EXACT_ENTRIES", 1000)
    if claim == "linear head":
        contest = contenders.linear_head(50, 37, 32, make)
    elif claim == "contrastive":
        contest = contenders.contrastive(20, 32, make)
    else:
        contest = contenders.whole_loss(12, 32, device.type)
    exact = contest.exact()
    named = [name for name in contest.steps if name not in ELSEWHERE]
    assert named[:2] == ["triton", "eager"]
    for name in named:
        check(name, contest.steps[name](), exact)
