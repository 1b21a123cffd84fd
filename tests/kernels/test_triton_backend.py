"""The `triton` backend as the loss sees it: dispatch, launches, memory, and a whole step."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from fino_fast.kernels.backward import Upstream, backward
from fino_fast.kernels.bank import Bank
from fino_fast.kernels.forward import MAX_SPLITS, forward
from fino_fast.kernels.launch import Launch, intercepted, run
from fino_fast.kernels.tiles import TILES, WORKERS, forced
from kernel_case import contrastive_bank, described, head_call, names, run_heads
from loss_case import embeddings, factors, labels, metadata
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, backends, ops
from fino_fast.eager import Eager
from fino_fast.factors import Factor
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
def test_with_triton_it_serves_cuda_tensors() -> None:
    from fino_fast.triton import Triton

    FinoLoss(4)
    for name in ("auto", "triton"):
        assert type(backends.resolve(name, torch.device("cuda"))) is Triton


@pytest.fixture
def triton_on_this_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the backend that is served by the Triton kernels on `device`."""
    if device.type == "cuda":
        yield "triton"
        return
    from fino_fast.triton import Triton

    monkeypatch.setitem(backends._FUSED, "native", Triton())
    yield "native"


def steps(
    criterion: FinoLoss,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Two steps, of which the first fills the banks: loss, terms, gradients and buffers."""
    data = metadata(9) | {"deep": labels(9, 5, missing=2)}
    data = {name: value.to(device) for name, value in data.items()}
    for _ in range(2):
        z = embeddings(2, 9, 6).detach().to(device, dtype).requires_grad_()
        criterion.zero_grad()
        loss, terms = criterion(z, data, return_terms=True)
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
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert {launch.kernel.__name__ for launch in count} >= {"sweep_kernel"}


@needs_operators
def test_launches_do_not_depend_on_the_number_of_factors(
    triton_on_this_device: str, device: torch.device, cuda_launches: Counter[str]
) -> None:
    """All kernels of a whole step, forward and backward, with 0, 1, 4, 12 factors of six kinds."""
    kinds = (
        lambda name: Categorical(name, 5, head="linear", orthogonal=0.1),
        lambda name: Categorical(name, 7, role="suppress", orthogonal=0.1),
        lambda name: Continuous(name, orthogonal=0.1),
        lambda name: Categorical(name, 5, head="linear", role="suppress", orthogonal=0.1),
        lambda name: Categorical(name, 7, orthogonal=0.1),
        lambda name: Continuous(name, role="suppress", activation="tanh"),
    )

    def launches(
        number: int, contrastive: InfoNCE | None, dtype: torch.dtype = torch.float32
    ) -> tuple[list[str], list[str]]:
        chosen = [kinds[i % 6](f"f{i}") for i in range(number)]
        criterion = FinoLoss(6, chosen, contrastive, backend=triton_on_this_device).to(device)
        values = [torch.randint(-1, 5, (9,)), torch.randint(-1, 7, (9,)), torch.rand(9)]
        data = {f"f{i}": values[i % 3].to(device) for i in range(number)}
        z = torch.randn(2, 9, 6, device=device, requires_grad=True)
        p = torch.randn(2, 9, 4, device=device, dtype=dtype, requires_grad=True)
        seen: list[Launch] = []

        def all_of(first: int) -> list[str]:
            found = names(seen[first:]) + sorted(cuda_launches.elements())
            cuda_launches.clear()
            return found

        cuda_launches.clear()
        # Those of Triton are not run: what they would compute does not matter here.
        with intercepted(seen.append):
            loss = criterion(z, data, projections=None if contrastive is None else p)
            forward, size = all_of(0), len(seen)
            loss.backward()
            return forward, all_of(size)

    swept, back = ["operands", "sweep"], ["operands", "rows", "banks", "combine"]
    split, update = ["fino_group_statistics", "fino_overlap_shares"], ["fino_bank_update"]
    ended, gradient = ["fino_term_losses"], ["fino_overlap_gradient"]
    for contrastive in (None, InfoNCE(0.2, learnable=True)):
        assert launches(1, contrastive) == (swept + split + ended, back + gradient)
        for number in (4, 12):
            assert launches(number, contrastive) == (
                swept + update + split + ended,
                back + gradient,
            )
    # Nothing to train: no banks.
    alone = ["operands", "rows", "combine"]
    assert launches(0, InfoNCE(0.2)) == (swept + ended, alone)
    # Projections of a dtype of their own take launches of their own.
    forward, backward = launches(4, InfoNCE(0.2), torch.float16)
    assert forward == swept * 2 + update + split + ended * 2
    assert sorted(backward) == sorted(back + alone + gradient)


def factor_of_kind(kind: str, name: str) -> Factor:
    if kind in ("linear", "prototype"):
        return Categorical(name, 5, head=kind, role="suppress")
    return Continuous(name, 2, activation=kind)


@needs_operators
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("contrastive", [None, InfoNCE(0.2, learnable=True)])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids="-".join)
def test_at_most_three_launches_forward_and_four_backward(
    kinds: tuple[str, ...],
    contrastive: InfoNCE | None,
    balance: bool,
    triton_on_this_device: str,
    device: torch.device,
) -> None:
    """None to twelve factors of one kind, and of all kinds in turn."""
    least = 2 if balance else int(contrastive is None)
    for number in range(least, 13):
        chosen = [factor_of_kind(kinds[f % len(kinds)], f"f{f}") for f in range(number)]
        criterion = FinoLoss(
            6, chosen, contrastive, balance=balance, backend=triton_on_this_device
        ).to(device)
        data = {
            factor.name: torch.randint(5, (4,), device=device)
            if isinstance(factor, Categorical)
            else torch.rand(4, 2, device=device)
            for factor in chosen
        }
        z = torch.randn(2, 4, 6, device=device, requires_grad=True)
        seen: list[Launch] = []
        # Not run: what they would compute does not matter here.
        with intercepted(seen.append):
            loss = criterion(z, data)
            forward = ["operands", "sweep", *(["rows"] if balance else [])]
            assert names(seen) == forward
            loss.backward()
        swept = [] if contrastive is None and balance else ["rows"]
        trained = ["banks"] if number and kinds != ("prototype",) else []
        assert names(seen[len(forward) :]) == ["operands", *swept, *trained, "combine"]


@needs_operators
@pytest.mark.parametrize("balanced", [False, True])
def test_operators(balanced: bool, device: torch.device) -> None:
    """Schema, fakes and autograd registration of the operators."""
    from fino_fast.triton_ops import step_forward

    calls = [head_call(kind, 6, 4, 3, torch.float32, seed=f) for f, kind in enumerate(KINDS)]
    x, p = (calls[f].x.to(device).requires_grad_() for f in (0, 1))
    none = torch.empty(0, dtype=torch.int64, device=device)
    one = torch.tensor(-0.5, device=device)
    torch.library.opcheck(
        step_forward,
        (
            [*[x] * 5, p],
            [*(c.bank.to(device).requires_grad_(c.kind != "prototype") for c in calls), p.detach()],
            [*(c.offset.to(device) for c in calls), one.detach().clone().requires_grad_()],
            [*(c.target.to(device) for c in calls), none],
            [*(c.inv_count.to(device) for c in calls), one],
            [*(none if c.counts is None else c.counts.to(device) for c in calls), none],
            [one] * 6, list(range(6)), [0.1, *[0.0] * 5], [1.0] * 6, [*[0] * 5, 1], [2, 0, 0],
            balanced, True, True,
        ),
    )  # fmt: skip


@needs_operators
@pytest.mark.usefixtures("cuda_launches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_compiled_step_equals_a_plain_one(
    dtype: torch.dtype, triton_on_this_device: str, device: torch.device
) -> None:
    torch._dynamo.reset()
    kinds = [
        Categorical("cell_line", 5, head="linear", label_smoothing=0.1, orthogonal=0.5),
        Categorical("plate", 7, role="suppress", orthogonal=0.5),
    ]
    plain = FinoLoss(6, kinds, contrastive=None, backend=triton_on_this_device)
    plain = plain.to(device, dtype)
    traced = copy.deepcopy(plain)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    compiled.named_parameters, compiled.named_buffers = (
        traced.named_parameters,
        traced.named_buffers,
    )
    found, expected = (steps(loss, device, dtype) for loss in (compiled, plain))
    close = {"rtol": 1e-9, "atol": 1e-11}
    if dtype == torch.float32:
        close = {"rtol": 1e-5, "atol": 1e-6}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")


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
    weights = torch.empty(classes, depth, **make)
    offset, label = torch.empty(classes, **make), torch.empty(n, dtype=torch.int64, **make)
    one = torch.empty((), **make)
    counts = torch.empty(classes, dtype=torch.int64, **make)

    def head(kind: int) -> Bank:
        return Bank(kind, 0, x, weights, offset, label, one, counts, 0.0, 1.0, one)

    linear, prototypes = head(0), [head(1), head(1)]
    pairs = contrastive_bank(x, x, one, 2, 0, False)
    tiles = TILES[9, torch.bfloat16]
    copies = 2 * classes * depth  # a bank in the dtype of the rows
    room = max(
        WORKERS * sizes.outer * (2 * sizes.chunk + 4 * depth)
        for sizes in (*tiles.rows, *tiles.banks)
    )
    sums = 4 * 20 * n * MAX_SPLITS + 4 * (n + classes)

    def launch(launch: Launch) -> None:
        programs.append(launch.programs)

    with intercepted(launch), forced(tiles):
        banks = [linear, *prototypes, pairs]
        with Allocated() as allocated:
            result = forward(banks)
        assert allocated.bytes <= 1.1 * (3 * copies + 2 * n * depth + sums)
        for bank, vectors in zip(prototypes, result.prototypes, strict=True):
            bank.vectors, bank.is_ready = vectors, True
        with Allocated() as allocated:
            upstream = [Upstream(one, lse, lse, True) for lse in result.lse]
            backward(banks, upstream, [x], [], True)
        # Of one bank the weights are converted, and get a gradient.
        gradients = 4 * n * depth + 2 * 4 * classes * (depth + 1) + x.nbytes
        assert allocated.bytes <= 1.1 * (copies + 2 * n * depth + 2 * room + gradients)
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
    near_rows = x.to(device)
    expected, found = (
        forward([contrastive_bank(rows, rows, scale, 2, 0, False)]).losses
        for rows in (near_rows, far)
    )
    assert torch.equal(found, expected)
    call = head_call("linear", n, 4, n, torch.float32)
    near = run_heads([call], device)
    call.bank = far.copy_(call.bank.to(device))
    again = run_heads([call], device)
    assert torch.equal(again.losses, near.losses)
    assert again.bank[0] is not None
    assert near.bank[0] is not None
    assert torch.equal(again.bank[0], near.bank[0])


def test_gradients_beyond_31_bits(device: torch.device) -> None:
    """The rows of all parts of a bank's gradient, and the coefficients of the last program."""
    launches: list[Launch] = []
    n, depth, classes = 65536, 768, 1_000_000
    make = {"device": "meta"}
    with intercepted(launches.append), forced(TILES[9, torch.bfloat16]):
        one, lse = torch.empty((), **make), torch.empty(n, **make)
        bank = Bank(
            0,
            0,
            torch.empty(n, depth, dtype=torch.bfloat16, **make),
            torch.empty(classes, depth, **make),
            torch.empty(classes, **make),
            torch.empty(n, dtype=torch.int64, **make),
            one,
            torch.empty(0, dtype=torch.int64, **make),
            0.0,
            1.0,
            one,
        )
        backward([bank], [Upstream(one, lse, lse, True)], [bank.x], [], True)
    (operands, _, banks, _) = launches
    # What the kernel counts in 32 bits fits.
    assert banks.arguments["items"] + banks.arguments["workers"] < 2**31
    assert described(operands, 1, "share")[0] * described(operands, 1, "parts")[0] < 2**31
    assert banks.arguments["scratch_size"] < 2**31
    tile = TILES[9, torch.bfloat16].rows[0]
    assert tile.outer * classes < 2**31  # the largest offset inside a tile of values
