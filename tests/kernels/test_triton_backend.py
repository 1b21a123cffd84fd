"""The `triton` backend as the loss sees it: dispatch, launches, memory, and a whole step."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from fino_fast.kernels.contrastive_backward import contrastive_backward
from fino_fast.kernels.contrastive_forward import contrastive_forward
from fino_fast.kernels.heads import MAX_SPLITS, heads_forward
from fino_fast.kernels.launch import Launch, intercepted, run
from fino_fast.kernels.tiles import TILES, forced
from kernel_case import head_call, run_heads
from loss_case import embeddings, factors, metadata
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fino_fast import FinoLoss, InfoNCE, backends, ops
from fino_fast.eager import Eager
from fino_fast.ops import KINDS

needs_operators = pytest.mark.skipif(ops.LOAD_ERROR is not None, reason=str(ops.LOAD_ERROR))


@pytest.fixture
def count() -> Iterator[list[Launch]]:
    """The launches of the test so far."""
    seen: list[Launch] = []

    def runner(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    with intercepted(runner):
        yield seen


@pytest.fixture
def gpu_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_FUSED", dict(backends._FUSED))
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.usefixtures("gpu_found")
def test_without_triton_auto_warns_once_and_runs_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LOAD_ERROR", None)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    FinoLoss(4)
    gpu = torch.device("cuda")
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert type(backends.resolve("auto", gpu)) is Eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(backends.resolve("auto", gpu)) is Eager
    with pytest.raises(backends.BackendUnavailableError, match="triton is not installed"):
        backends.resolve("triton", gpu)


@needs_operators
@pytest.mark.usefixtures("gpu_found")
def test_with_triton_the_operators_have_kernels_for_cuda() -> None:
    from fino_fast.triton import KERNELS, Triton

    FinoLoss(4)
    for name in ("auto", "triton"):
        assert type(backends.resolve(name, torch.device("cuda"))) is Triton
    for operator in KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")


@pytest.fixture
def triton_on_this_device(device: torch.device) -> Iterator[str]:
    """Name of the backend whose operators are the Triton kernels on `device`."""
    if device.type == "cuda":
        yield "triton"
        return
    from fino_fast.triton import KERNELS

    library = torch.library.Library("fino", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name.removeprefix("fino::"), kernel, "CPU", allow_override=True)
    yield "native"
    library._destroy()


@needs_operators
@pytest.mark.parametrize("balance", [False, True])
def test_a_step_of_the_loss_equals_eager(
    balance: bool, triton_on_this_device: str, device: torch.device, count: list[Launch]
) -> None:
    contrastive = InfoNCE(0.2, learnable=True)
    fused = FinoLoss(
        6, factors(), contrastive, balance=balance, backend=triton_on_this_device
    ).double()
    fused.to(device)
    eager = copy.deepcopy(fused)
    eager.backend = "eager"
    data = {name: value.to(device) for name, value in metadata(9).items()}
    results = []
    for criterion in (fused, eager):
        for _ in range(2):  # the first step fills the banks
            z = embeddings(2, 9, 6).detach().to(device).requires_grad_()
            criterion.zero_grad()
            loss, terms = criterion(z, data, return_terms=True)
            loss.backward()
        gradients = {name: p.grad for name, p in criterion.named_parameters()}
        results.append((loss, z.grad, terms, gradients, dict(criterion.named_buffers())))
    for found, expected in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)  # smoothing is fp32
    for found, expected in zip(results[0][2:], results[1][2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert {launch.kernel.__name__ for launch in count} >= {"heads_sweep_kernel"}


def test_launches_do_not_depend_on_the_number_of_heads(
    device: torch.device, count: list[Launch]
) -> None:
    def launches(heads: int, want: bool) -> int:
        before = len(count)
        calls = [head_call(KINDS[f % 2], 3, 4, 3, torch.float32, seed=f) for f in range(heads)]
        run_heads(calls, want, want, device)
        return len(count) - before

    assert launches(2, True) == launches(7, True) == 3
    assert launches(2, False) == launches(7, False) == 3


def test_launches_of_the_contrastive_term(device: torch.device, count: list[Launch]) -> None:
    p, scale = torch.randn(6, 4, device=device), torch.ones((), device=device)
    _, lse = contrastive_forward(p, p, scale, 2, 0, False)
    assert len(count) == 3
    contrastive_backward(scale, p, p, scale, lse, lse, 2, 0, False)
    assert len(count) == 6


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "clone", "_to_copy"):
            self.bytes += result.nbytes
        return result


def test_memory_of_a_million_classes_and_65536_rows() -> None:
    """Nothing of N·N or N·K; the programs can be counted in 31 bits."""
    n, depth, classes, programs = 65536, 768, 1_000_000, []
    make = {"device": "meta"}
    x = torch.empty(n, depth, dtype=torch.bfloat16, **make)
    bank = torch.empty(classes, depth, **make)
    offset, label = torch.empty(classes, **make), torch.empty(n, dtype=torch.int64, **make)
    one = torch.empty((), **make)
    counts = torch.empty(classes, dtype=torch.int64, **make)

    def heads(want: bool) -> int:
        with Allocated() as allocated:
            heads_forward(
                [x, x], [bank, bank], [offset, offset], [label, label], [one, one],
                [counts, counts], [0, 1], [0.0, 0.0], want, want,
            )  # fmt: skip
        return allocated.bytes

    with intercepted(lambda launch: programs.append(launch.programs)), forced(TILES[9, 2]):
        small = 4 * (n + classes) + 2 * 20 * n * MAX_SPLITS
        assert heads(False) <= 1.1 * small
        assert heads(True) <= 1.1 * (2 * 4 * n * depth + 4 * classes * (depth + 1) + small)
        with Allocated() as allocated:
            lse = torch.empty(n, **make)
            contrastive_forward(x, x, one, 2, 0, False)
            contrastive_backward(one, x, x, one, lse, lse, 2, 0, False)
        assert allocated.bytes <= 1.1 * (2 * n * depth + 4 * 6 * n)
    assert max(programs) < 2**31


def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """A row stride of 2²⁶ entries puts row 40 beyond 2³¹; the pages between are never touched."""
    stride, n = 2**26, 40
    x = torch.randn(n, 4)
    try:
        # torch.empty would be filled by the poison.
        storage = torch.UntypedStorage(4 * (stride * (n - 1) + 4), device=device)
    except RuntimeError as error:
        pytest.skip(f"no 10 GB of address space: {error}")
    far = torch.empty(0, device=device).set_(storage, 0, (n, 4), (stride, 1))
    far.copy_(x)
    scale = torch.ones((), device=device)
    expected, _ = contrastive_forward(x.to(device), x.to(device), scale, 2, 0, False)
    found, _ = contrastive_forward(far, far, scale, 2, 0, False)
    assert torch.equal(found, expected)
    call = head_call("linear", n, 4, n, torch.float32)
    weights = run_heads([call], True, True, device)
    strided: list[Tensor] = [far.copy_(call.bank.to(device))]
    again = heads_forward(
        [call.x.to(device)], strided, [call.offset.to(device)], [call.target.to(device)],
        [call.inv_count.to(device)], [torch.empty(0, dtype=torch.int64, device=device)], [0], [0.0],
        True, True,
    )  # fmt: skip
    assert torch.equal(again[0], weights[0])
    assert torch.equal(again[3][0], weights[3][0])
