"""The `triton` backend as the loss sees it: dispatch, launches, memory, and a whole step."""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from fino_fast.kernels.contrastive_backward import contrastive_backward
from fino_fast.kernels.contrastive_forward import contrastive_forward
from fino_fast.kernels.heads import MAX_SPLITS, Heads, Upstream, heads_gradient, heads_loss
from fino_fast.kernels.launch import Launch, intercepted, run
from fino_fast.kernels.tiles import TILES, WORKERS, forced
from kernel_case import head_call, run_heads
from loss_case import embeddings, factors, labels, metadata
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, backends, ops
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
def triton_on_this_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the backend that is served by the Triton kernels on `device`."""
    if device.type == "cuda":
        yield "triton"
        return
    from fino_fast.triton import KERNELS, Triton

    library = torch.library.Library("fino", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name.removeprefix("fino::"), kernel, "CPU", allow_override=True)
    monkeypatch.setitem(backends._FUSED, "native", Triton())
    yield "native"
    library._destroy()


def steps(
    criterion: FinoLoss,
    device: torch.device,
    call: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None,
) -> dict[str, Tensor]:
    """Two steps, of which the first fills the banks: loss, terms, gradients and buffers."""
    call = criterion if call is None else call
    data = metadata(9) | {"deep": labels(9, 5, missing=2)}
    data = {name: value.to(device) for name, value in data.items()}
    for _ in range(2):
        z = embeddings(2, 9, 6).detach().to(device).requires_grad_()
        criterion.zero_grad()
        loss, terms = call(z, data, return_terms=True)
        loss.backward()
    assert z.grad is not None
    gradients = {f"gradient {name}": p.grad for name, p in criterion.named_parameters()}
    return (
        {"loss": loss, "gradient z": z.grad} | terms | gradients | dict(criterion.named_buffers())
    )


@needs_operators
@pytest.mark.parametrize("balance", [False, True])
def test_a_step_of_the_loss_equals_eager(
    balance: bool, triton_on_this_device: str, device: torch.device, count: list[Launch]
) -> None:
    contrastive = InfoNCE(0.2, learnable=True)
    deep = Categorical("deep", 5, head="linear", role="suppress", hidden=(7,))
    fused = FinoLoss(
        6, [*factors(), deep], contrastive, balance=balance, backend=triton_on_this_device
    ).double()
    fused.to(device)
    fused.set_progress(0.3)
    eager = copy.deepcopy(fused)
    eager.backend = "eager"
    found, expected = steps(fused, device), steps(eager, device)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Label smoothing is passed in fp32.
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert {launch.kernel.__name__ for launch in count} >= {"heads_sweep_kernel"}


@needs_operators
def test_launches_do_not_depend_on_the_number_of_factors(
    triton_on_this_device: str, device: torch.device
) -> None:
    """A whole step, forward and backward, with 1, 4 and 12 factors of three kinds."""
    kinds = (
        lambda name: Categorical(name, 5, head="linear", role="suppress"),
        lambda name: Categorical(name, 7),
        lambda name: Continuous(name),
    )

    def launches(number: int, contrastive: InfoNCE | None) -> tuple[list[str], list[str]]:
        chosen = [kinds[i % 3](f"f{i}") for i in range(number)]
        criterion = FinoLoss(6, chosen, contrastive, backend=triton_on_this_device).to(device)
        values = [torch.randint(-1, 5, (9,)), torch.randint(-1, 7, (9,)), torch.rand(9)]
        data = {f"f{i}": values[i % 3].to(device) for i in range(number)}
        z = torch.randn(2, 9, 6, device=device, requires_grad=True)
        seen: list[list[str]] = [[]]

        def note(launch: Launch) -> None:
            # Not run: what the kernels would compute does not matter here.
            seen[-1].append(launch.kernel.__name__.removesuffix("_kernel"))

        with intercepted(note):
            loss = criterion(z, data)
            forward, seen[-1] = seen[-1], []
            loss.backward()
        return forward, seen[-1]

    forward, backward = launches(1, None)
    assert forward == ["operands", "heads_sweep", "heads_rows"]
    assert backward == ["operands", "heads_rows", "heads_banks", "heads_combine"]
    assert launches(4, None) == launches(12, None) == (forward, backward)
    contrastive = ["operands", "contrastive_forward", "row_sum"]
    assert launches(12, InfoNCE(0.2))[0] == contrastive + forward


@needs_operators
def test_operators(device: torch.device) -> None:
    """Schema, fakes and autograd registration of the operators of the heads."""
    from fino_fast.triton import heads_loss as operator

    calls = [head_call(kind, 5, 4, 3, torch.float32, seed=f) for f, kind in enumerate(KINDS)]
    x = calls[0].x.to(device).requires_grad_()
    none = torch.empty(0, dtype=torch.int64, device=device)
    torch.library.opcheck(
        operator,
        (
            [x] * 5,
            [c.bank.to(device).requires_grad_(c.kind != "prototype") for c in calls],
            [c.offset.to(device) for c in calls],
            [c.target.to(device) for c in calls],
            [c.inv_count.to(device) for c in calls],
            [none if c.counts is None else c.counts.to(device) for c in calls],
            [torch.tensor(-0.5, device=device)] * 5,
            list(range(5)), [0.1, 0.0, 0.0, 0.0, 0.0], [0] * 5,
            [c.kind == "prototype" for c in calls], True, True,
        ),
    )  # fmt: skip


@needs_operators
def test_a_compiled_step_equals_eager(triton_on_this_device: str, device: torch.device) -> None:
    torch._dynamo.reset()
    kinds = [
        Categorical("cell_line", 5, head="linear", label_smoothing=0.1),
        Categorical("plate", 7, role="suppress"),
    ]
    plain = FinoLoss(6, kinds, contrastive=None, backend=triton_on_this_device)
    plain = plain.double().to(device)
    traced = copy.deepcopy(plain)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    compiled.named_parameters, compiled.named_buffers = (
        traced.named_parameters,
        traced.named_buffers,
    )
    found, expected = steps(compiled, device), steps(plain, device)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


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

    table = Heads(
        [x, x], [bank, bank], [offset, offset], [label, label], [one, one], [counts, counts],
        [0, 1], [0.0, 0.0],
    )  # fmt: skip
    linear = Heads([x], [bank], [offset], [label], [one], [], [0], [0.0])
    tiles = TILES[9, 2]
    copies = 2 * classes * depth  # a bank in the dtype of the rows
    room = WORKERS * tiles.rows * (2 * tiles.chunk + 4 * depth)
    sums = 2 * 20 * n * MAX_SPLITS + 4 * (n + classes)

    def launch(launch: Launch) -> None:
        programs.append(launch.programs)

    with intercepted(launch), forced(tiles):
        with Allocated() as allocated:
            _, _, lse, kept = heads_loss(table, [False, True])
        assert allocated.bytes <= 1.1 * (2 * copies + room + sums + 4 * n * depth)
        with Allocated() as allocated:
            upstream = Upstream(lse[:, 0], [one, one], [0, 0], lse, kept)
            heads_gradient(upstream, [x], linear, [0], True, True)
        gradients = 4 * n * depth + 2 * 4 * classes * (depth + 1) + x.nbytes
        assert allocated.bytes <= 1.1 * (copies + 2 * room + gradients)
        with Allocated() as allocated:
            lse = torch.empty(n, **make)
            contrastive_forward(x, x, one, 2, 0, False)
            contrastive_backward(one, x, x, one, lse, lse, 2, 0, False)
        assert allocated.bytes <= 1.1 * (room + 2 * 2 * n * depth + 4 * 8 * n)
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
    near = run_heads([call], device)
    call.bank = far.copy_(call.bank.to(device))
    again = run_heads([call], device)
    assert torch.equal(again[0], near[0])
    assert torch.equal(again[3][0], near[3][0])


def test_gradients_beyond_31_bits(device: torch.device) -> None:
    """The rows of all parts of a bank's gradient, and the coefficients of the last program."""
    launches: list[Launch] = []
    n, depth, classes = 65536, 768, 1_000_000
    make = {"device": "meta"}
    with intercepted(launches.append), forced(TILES[9, 2]):
        table = Heads(
            [torch.empty(n, depth, dtype=torch.bfloat16, **make)],
            [torch.empty(classes, depth, **make)],
            [torch.empty(classes, **make)],
            [torch.empty(n, dtype=torch.int64, **make)],
            [torch.empty((), **make)],
            [],
            [0],
            [0.0],
        )
        lse = torch.empty(1, n, **make)
        nothing = torch.empty(0, **make)
        upstream = Upstream(lse[:, 0], [lse[0, 0]], [0], lse, [nothing])
        heads_gradient(upstream, table.x, table, [0], True, True)
    (banks,) = [x for x in launches if x.kernel.__name__ == "heads_banks_kernel"]
    # What the kernel counts in 32 bits fits.
    assert banks.arguments["items"] + banks.arguments["workers"] < 2**31
    assert max(banks.arguments["share"]) * max(banks.arguments["parts"]) < 2**31
    assert banks.arguments["scratch_size"] < 2**31
    tile = TILES[9, 2]
    assert tile.rows * classes < 2**31  # the largest offset inside a tile of values
