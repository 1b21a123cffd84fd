"""What only a GPU can show (`pytest -m gpu`), and the part of it that can be seen without one."""

import copy
import traceback
from typing import Any

import pytest
import torch
from cuda_case import FAKE_CUDA
from loss_case import embeddings, factors, metadata
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, backends, ops

pytestmark = pytest.mark.skipif(ops.LOAD_ERROR is not None, reason=str(ops.LOAD_ERROR))
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present")
# Operators whose result the host has to know.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}


class Waits(TorchDispatchMode):
    """The operators that make the host wait for the device, or copy between them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += 1
        before, after = (
            {t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor)}
            for tree in ((args, kwargs), result)
        )
        name = func.overloadpacket.__name__
        if name in WAITING or (before and after and before != after):
            ours = [f for f in traceback.extract_stack() if "fino_fast" in f.filename]
            self.found.append(f"{name} at {ours[-1].filename}:{ours[-1].lineno}")
        return result


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from fino_fast.triton import Triton

    monkeypatch.setitem(backends._FUSED, "triton", Triton())


def every_kind() -> list[Categorical | Continuous]:
    return [*factors(), Continuous("deep", role="suppress", activation="sigmoid", hidden=(4,))]


@FAKE_CUDA
@pytest.mark.usefixtures("triton_backend")
def test_the_host_never_waits_in_the_forward_pass() -> None:
    """Every operator of a step on a device without memory: shapes and devices are enough."""
    with FakeTensorMode(), torch.device("cuda"):
        criterion = FinoLoss(6, every_kind(), InfoNCE(0.1, learnable=True), backend="triton")
        z = torch.randn(2, 8, 6, requires_grad=True)
        data = {
            "cell_line": torch.zeros(8, dtype=torch.int64),
            "plate": torch.zeros(8, dtype=torch.int64),
            "exposure": torch.rand(8, 2),
            "depth": torch.rand(8),
            "deep": torch.rand(8),
        }
        with Waits() as waits:
            loss = criterion(z, data)
    assert loss.device.type == "cuda"
    assert waits.seen > 100
    assert waits.found == []


@pytest.fixture
def step() -> tuple[FinoLoss, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    criterion = FinoLoss(6, factors(), InfoNCE(0.2), backend="triton").to("cuda")
    z = embeddings(2, 9, 6).detach().float().to("cuda").requires_grad_()
    data = {name: value.to("cuda") for name, value in metadata(9).items()}
    for _ in range(2):  # compiles the kernels, fills the banks
        criterion(z, data).backward()
    torch.cuda.synchronize()
    z.grad = None
    return criterion, z, data


@NO_GPU
@pytest.mark.gpu
def test_the_host_never_waits_in_a_step(
    step: tuple[FinoLoss, Tensor, dict[str, Tensor]],
) -> None:
    criterion, z, data = step
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(z, data).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert z.grad is not None


@NO_GPU
@pytest.mark.gpu
def test_a_captured_step_equals_a_launched_one(
    step: tuple[FinoLoss, Tensor, dict[str, Tensor]],
) -> None:
    criterion, z, data = step
    plain = copy.deepcopy(criterion)
    graph = torch.cuda.CUDAGraph()
    z.grad = torch.zeros_like(z)
    with torch.cuda.graph(graph):
        z.grad.zero_()
        loss = criterion(z, data)
        loss.backward()
    for _ in range(3):
        again = z.detach().clone().requires_grad_()
        expected = plain(again, data)
        expected.backward()
        graph.replay()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(z.grad, again.grad)


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_step_compiled_as_one_graph_equals_a_launched_one(
    compiler: str, step: tuple[FinoLoss, Tensor, dict[str, Tensor]]
) -> None:
    criterion, z, data = step
    plain = copy.deepcopy(criterion)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend=compiler)
    for _ in range(2):
        again = z.detach().clone().requires_grad_()
        expected = plain(again, data)
        expected.backward()
        z.grad = None
        loss = compiled(z, data)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(z.grad, again.grad, rtol=1e-4, atol=1e-6)
