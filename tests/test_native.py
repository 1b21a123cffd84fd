"""The native CPU backend: its operators, tiles, levels, memory, and what it does when absent."""

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from single_terms import SingleTerms
from torch import Tensor

from fino_fast import backends, native, ops
from fino_fast.eager import Eager
from fino_fast.factors import Role
from fino_fast.terms import HeadCall, Kind, OrthogonalCall, Step

NATIVE, EAGER = SingleTerms(native.Native()), SingleTerms(Eager())
T = TypeVar("T")
KINDS: list[Kind] = ["linear", "prototype", "identity", "sigmoid", "tanh"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every `empty` of torch is NaN: a write that is missed shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def head_call(
    kind: Kind, n: int, d: int, k: int, dtype: torch.dtype = torch.float32, grad: bool = True
) -> HeadCall:
    x = torch.randn(n, d, dtype=dtype, requires_grad=grad)
    bank = torch.randn(k, d, dtype=dtype)
    offset = torch.randn(k, dtype=dtype)
    counts = None
    if kind in ("linear", "prototype"):
        target = torch.randint(-1, k, (n,))
        if kind == "prototype":
            counts = torch.randint(0, 3, (k,))
            target = torch.where(counts[target.clamp_min(0)] > 0, target, -1)
            offset = offset.abs() + 0.1
        count = (target >= 0).sum()
    else:
        target = torch.rand(n, k, dtype=dtype)
        target[torch.rand(n, k) < 0.3] = torch.nan
        count = (~target.isnan()).sum()
    if kind != "prototype":
        bank.requires_grad_(grad)
        offset.requires_grad_(grad)
    smoothing = 0.1 if kind == "linear" else 0.0
    inv_count = count.clamp_min(1).to(dtype).reciprocal()
    return HeadCall(kind, x, bank, offset, target, inv_count, smoothing, counts)


def copy_of(call: HeadCall, dtype: torch.dtype) -> HeadCall:
    def copy(value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return HeadCall(
        call.kind,
        copy(call.x),
        copy(call.bank),
        copy(call.offset),
        copy(call.target),
        copy(call.inv_count),
        call.label_smoothing,
        call.counts,
    )


def head_gradients(backend: SingleTerms, call: HeadCall) -> list[Tensor]:
    """[loss, metric, ∂x, ∂bank, ∂offset], as far as they exist, in fp64."""
    result = backend.head(call)
    result.loss.backward()
    grads = [t.grad for t in (call.x, call.bank, call.offset) if t.requires_grad]
    return [t.detach().double() for t in (result.loss, result.metric, *grads)]


def contrastive_gradients(
    backend: SingleTerms, rows: Tensor, tau: float, two_tower: bool, views: int
):
    leaf = rows.detach().clone().requires_grad_()
    scale = torch.tensor(1 / tau, dtype=leaf.dtype, requires_grad=True)
    loss = backend.contrastive(leaf, scale, views, two_tower)
    loss.backward()
    return [t.detach().double() for t in (loss, leaf.grad, scale.grad)]


def assert_as_exact_as_eager(
    ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], floor: float = 2e-7
) -> None:
    """Error to fp64 at most twice what plain PyTorch loses in the same precision.

    Beside that a few roundings: PyTorch may be right to the last bit, or exactly zero.
    """
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        lost = (theirs - true).abs().max()
        assert (mine - true).abs().max() <= 2 * lost + 2e-6 * true.abs().max() + floor


def test_the_build_under_test_has_native_code():
    assert ops.LOAD_ERROR is None
    assert isinstance(backends.resolve("auto", torch.device("cpu")), native.Native)


def test_loops_run_on_the_threads_of_pytorch():
    """Compiled without OpenMP, PyTorch's parallel loops are plain ones, and say nothing."""
    for threads in (1, 2, 3):
        assert on_threads(threads, importlib.import_module("fino_fast._C").loop_threads) == threads


def test_native_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.setitem(backends._FUSED, "native", "no compiler was found")
    with pytest.raises(backends.BackendUnavailableError, match="no compiler was found"):
        backends.resolve("native", torch.device("cpu"))
    with pytest.raises(backends.BackendUnavailableError, match="serves cpu tensors"):
        backends.resolve("native", torch.device("meta"))


def test_auto_falls_back_with_one_warning(monkeypatch, recwarn):
    monkeypatch.setitem(backends._FUSED, "native", "no compiler was found")
    monkeypatch.setattr(backends, "_warned", set())
    for _ in range(2):
        assert type(backends.resolve("auto", torch.device("cpu"))) is Eager
    assert [str(w.message) for w in recwarn if w.category is RuntimeWarning] == [
        "fino_fast runs in plain PyTorch on cpu: no compiler was found"
    ]


# The sizes stand astride the sides of the tiles: one tile, an odd and an even number of them, and a
# last one of a single row.
@pytest.mark.parametrize("images", [1, 2, 31, 32, 128, 129, 257, 385, 513])
@pytest.mark.parametrize(
    ("views", "two_tower", "tau"),
    [(2, False, 0.1), (2, True, 0.1), (3, False, 0.1), (2, False, 0.01)],
)
def test_contrastive_equals_the_oracle(images, views, two_tower, tau):
    rows = torch.randn(views * images, 19)
    rows[: images // 2 + 1] *= 1e3  # the length of a row must not matter
    assert_as_exact_as_eager(
        contrastive_gradients(NATIVE, rows, tau, two_tower, views),
        contrastive_gradients(EAGER, rows, tau, two_tower, views),
        contrastive_gradients(EAGER, rows.double(), tau, two_tower, views),
        floor=1e-7 / tau,  # a rounding of the largest logit
    )


def test_more_tiles_than_are_kept_between_the_visits():
    rows = torch.randn(4200, 3)
    ours, eager, exact = (
        contrastive_gradients(terms, x, 0.1, False, 2)
        for terms, x in ((NATIVE, rows), (EAGER, rows), (EAGER, rows.double()))
    )
    assert_as_exact_as_eager(ours, eager, exact, floor=1e-6)


@pytest.mark.parametrize("tau", [0.0251, 0.0249])
def test_contrastive_on_either_side_of_the_bounded_form(tau):
    """Opposite rows: every negative logit is at its lowest possible value."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-3], [-1.0, 1e-3]])
    ours = contrastive_gradients(NATIVE, rows, tau, False, 2)
    exact = contrastive_gradients(EAGER, rows.double(), tau, False, 2)
    eager = contrastive_gradients(EAGER, rows, tau, False, 2)
    assert all(t.isfinite().all() for t in ours)
    assert_as_exact_as_eager(ours, eager, exact)


def test_zero_rows_have_the_gradient_of_the_clamped_norm():
    rows = torch.randn(8, 5)
    rows[3] = 0
    ours = contrastive_gradients(NATIVE, rows, 0.5, False, 2)
    eager = contrastive_gradients(EAGER, rows, 0.5, False, 2)
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_gives_nan_as_in_pytorch(bad):
    rows = torch.randn(6, 4)
    rows[2, 1] = bad
    assert contrastive_gradients(NATIVE, rows, 0.1, False, 2)[0].isnan()
    call = head_call("linear", 6, 4, 3, grad=False)
    call.x, call.target = rows, torch.zeros(6, dtype=torch.int64)
    assert NATIVE.head(call).loss.isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 1), (7, 5, 3), (64, 33, 1), (13, 8, 257), (130, 1, 40)]
)
def test_heads_equal_the_oracle(kind, n, d, k):
    call = head_call(kind, n, d, k)
    assert_as_exact_as_eager(
        head_gradients(NATIVE, copy_of(call, torch.float32)),
        head_gradients(EAGER, copy_of(call, torch.float32)),
        head_gradients(EAGER, copy_of(call, torch.float64)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_heads_over_several_blocks_of_rows(kind):
    """A bank so large that the scratch block holds the fewest rows, 16 at a time."""
    call = head_call(kind, 18, 2, 530_000)
    assert_as_exact_as_eager(
        head_gradients(NATIVE, copy_of(call, torch.float32)),
        head_gradients(EAGER, copy_of(call, torch.float32)),
        head_gradients(EAGER, copy_of(call, torch.float64)),
    )


@pytest.mark.parametrize("kind", ["linear", "prototype"])
def test_logits_of_ten_thousand(kind):
    call = head_call(kind, 12, 6, 9)
    call.bank = (call.bank.detach() * 1e4).requires_grad_(kind == "linear")
    if kind == "prototype":
        call.offset = torch.full((9,), 1e-4)
    ours = head_gradients(NATIVE, copy_of(call, torch.float32))
    assert all(t.isfinite().all() for t in ours)
    torch.testing.assert_close(
        ours, head_gradients(EAGER, copy_of(call, torch.float32)), rtol=1e-4, atol=1e-4
    )


def test_a_large_bank_is_recomputed_in_the_backward_pass(monkeypatch):
    call = head_call("linear", 20, 6, 11)
    at_once = head_gradients(NATIVE, copy_of(call, torch.float32))
    monkeypatch.setattr(native, "DEFERRED_BANK_BYTES", 0)
    again = copy_of(call, torch.float32)
    inputs = {t.data_ptr() for t in vars(again).values() if isinstance(t, Tensor)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        NATIVE.head(again)
    large = [tensor for tensor in kept if tensor.numel() >= again.x.numel()]
    assert {t.data_ptr() for t in large} <= inputs  # nothing was computed ahead
    torch.testing.assert_close(head_gradients(NATIVE, copy_of(call, torch.float32)), at_once)


def test_half_precision_gradients_survive_a_loss_scale():
    """Unscaled, these gradients are below the smallest fp16 number."""
    call = head_call("linear", 64, 8, 5)
    call.inv_count = torch.tensor(1e-7)
    half = copy_of(call, torch.float32)
    half.x = call.x.detach().half().requires_grad_()
    loss_scale = 2.0**16
    (NATIVE.head(half).loss * loss_scale).backward()
    (EAGER.head(call).loss * loss_scale).backward()
    assert half.x.grad is not None
    assert call.x.grad is not None
    torch.testing.assert_close(half.x.grad.float(), call.x.grad, rtol=2e-2, atol=1e-6)


def orthogonal_gradients(
    z: Tensor, design: Tensor, role: Role, backend: SingleTerms
) -> list[Tensor]:
    leaf = z.detach().clone().requires_grad_()
    value = backend.orthogonal(leaf, design, role)
    value.backward()
    return [t.detach().double() for t in (value, leaf.grad)]


# (d, k): the sweep over few groups, the squared form of many, groups of one row, one value.
@pytest.mark.parametrize(("n", "d", "k"), [(70, 40, 5), (70, 7, 20), (300, 5, 400), (40, 300, 90)])
@pytest.mark.parametrize("role", ["preserve", "suppress"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonal_equals_the_oracle(n, d, k, role, dtype):
    z = (torch.randn(n, d) + 3).to(dtype)
    categories = torch.randint(-1, k, (n,))
    values = torch.randn(n, 3)
    values[torch.rand(n) < 0.2, 1] = torch.nan
    for design in (categories, values, values[:, :1]):
        assert_as_exact_as_eager(
            orthogonal_gradients(z, design, role, NATIVE),
            orthogonal_gradients(z, design, role, EAGER),
            orthogonal_gradients(z.double(), design.double() if design.dim() > 1 else design, role,
                                 EAGER),
        )  # fmt: skip


@pytest.mark.parametrize("role", ["preserve", "suppress"])
def test_rows_that_take_no_part_in_the_orthogonal_term_may_hold_anything(role):
    z, missing = torch.randn(9, 4), torch.tensor([0, 1, 2, 1, 0, -1, 2, 2, -1])
    expected = orthogonal_gradients(z, missing, role, NATIVE)
    z[5], z[8] = torch.inf, torch.nan
    for one, two in zip(orthogonal_gradients(z, missing, role, NATIVE), expected, strict=True):
        assert torch.equal(one, two)
    value, gradient = orthogonal_gradients(z, torch.full((9,), -1), role, NATIVE)
    assert value == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize(
    ("design", "found"),
    [
        (torch.zeros(4, dtype=torch.int64), r"Long \[4\]"),
        (torch.zeros(5), r"Float \[5\]"),
        (torch.zeros(5, 0), r"Float \[5, 0\]"),
    ],
)
def test_wrong_designs_are_errors(design, found):
    with pytest.raises(RuntimeError, match=rf"int64 \[N=5\] or float \[N, d\], found {found}"):
        ops.orthogonal(torch.zeros(5, 2), [design], [True], [1.0], torch.ones(()))


def operator_samples(dtype: torch.dtype) -> Iterator[tuple[object, tuple[object, ...]]]:
    rows = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    scale = torch.tensor(5.0, dtype=dtype, requires_grad=True)
    forward = torch.ops.fino.contrastive_forward.default
    yield forward, (rows, scale, 2, False, True, False)
    yield forward, (rows.detach(), scale.detach(), 2, True, False, True)
    # Columns of other ranks: outside a process group there is no one to ask for a gradient.
    fixed = (rows.detach(), torch.randn(10, 4, dtype=dtype), scale.detach())
    yield torch.ops.fino.ranks_contrastive_forward.default, (*fixed, 2, 2, True, False)
    lse = torch.randn(6, dtype=dtype)
    yield (
        torch.ops.fino.ranks_contrastive_backward.default,
        (torch.ones((), dtype=dtype), *fixed, lse, torch.randn(10, dtype=dtype), 2, 2, True, True),
    )
    for want in (False, True):
        calls = [head_call(kind, 6, 4, 5, dtype) for kind in KINDS]
        none, half = torch.empty(0, dtype=torch.int64), torch.tensor(-0.5, dtype=dtype)
        yield (
            torch.ops.fino.heads_forward.default,
            (
                [call.x for call in calls[:3]],
                [call.bank for call in calls],
                [call.offset for call in calls],
                [call.target for call in calls],
                [call.inv_count for call in calls],
                [none if call.counts is None else call.counts for call in calls],
                [half] * 5,
                [0.5, 1.0, 2.0, 0.03, 1.0],
                list(range(5)),
                [0.1, 0.0, 0.0, 0.0, 0.0],
                [0, 1, 0, 2, 1],
                want,
                want,
                want,
            ),
        )
    call = head_call("linear", 6, 4, 5, dtype)
    wide = (call.x, call.bank, call.offset, call.target, call.inv_count)
    yield torch.ops.fino.wide_head_forward.default, (*wide, 0.1, False)
    fixed = tuple(tensor.detach() for tensor in wide)
    for want in (False, True):
        yield (
            torch.ops.fino.wide_head_backward.default,
            (torch.ones((), dtype=dtype), *fixed, lse, 0.1, want, not want, want),
        )

    z = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    designs = [torch.tensor([0, 2, -1, 0, 2, 7]), torch.randn(6, 2, dtype=dtype)] * 2
    yield (
        torch.ops.fino.orthogonal_forward.default,
        (z, designs, [False, False, True, True], [1.0, 0.1, 2.0, 0.5], half, False),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    for operator, arguments in operator_samples(dtype):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": 1}, "views each"),
        ({"views": 4}, "views each"),
        ({"first": 1}, "are not among the 3"),
        ({"columns": torch.zeros(6, 5)}, r"must be \[N, P\] and \[M, P\]"),
    ],
)
def test_wrong_calls_of_the_contrastive_operator(change, message):
    arguments = {"rows": torch.zeros(6, 4), "columns": torch.zeros(6, 4), "views": 2, "first": 0}
    arguments |= {"logit_scale": torch.ones(()), "two_tower": False} | change
    with pytest.raises(RuntimeError, match=message):
        ops.ranks_contrastive(**arguments)


def test_a_target_beyond_the_bank_is_an_error_and_no_wild_read():
    call = head_call("linear", 4, 3, 5, grad=False)
    call.target = torch.tensor([0, 1, 5, 2])
    with pytest.raises(RuntimeError, match="a target is not below K=5"):
        NATIVE.head(call)


def on_threads(threads: int, results: Callable[[], T]) -> T:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return results()
    finally:
        torch.set_num_threads(before)


def pairs(terms: SingleTerms = NATIVE, tau: float = 0.1) -> list[Tensor]:
    rows = torch.randn(1200, 32)
    return [
        tensor
        for two_tower in (False, True)
        for tensor in contrastive_gradients(terms, rows, tau, two_tower, 2)
    ]


def terms_with_shared_products(terms: SingleTerms = NATIVE) -> list[Tensor]:
    """Of the terms whose products the library shares out among the threads."""
    heads = [head_call(kind, 3000, 256, 1200) for kind in ("linear", "prototype")]
    z, labels = torch.randn(3000, 256), torch.randint(-1, 700, (3000,))
    return [
        *(tensor for head in heads for tensor in head_gradients(terms, head)),
        *orthogonal_gradients(z, labels, "preserve", terms),
        *pairs(terms, tau=0.01),  # the form for large logits
    ]


def test_bit_identical_from_run_to_run():
    for results in (pairs, terms_with_shared_products):
        assert all(map(torch.equal, on_threads(2, results), on_threads(2, results)))


def test_the_contrastive_term_is_the_same_from_any_number_of_threads():
    one, *others = [on_threads(threads, pairs) for threads in (1, 2, 3)]
    for other in others:
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_deterministic_terms_are_the_same_from_any_number_of_threads(
    bf16, wide, monkeypatch, request
):
    if bf16:
        request.getfixturevalue("bf16_products")
    if wide:
        monkeypatch.setattr(native, "DEFERRED_BANK_BYTES", 0)
    terms = SingleTerms(native.Native(), deterministic=True)

    def results() -> list[Tensor]:
        if not bf16:
            return terms_with_shared_products(terms)
        return head_gradients(terms, head_call("linear", 3000, 256, 1200, torch.bfloat16))

    one, *others = [on_threads(threads, results) for threads in (1, 2, 3)]
    for other in others:
        assert all(map(torch.equal, one, other))


def test_deterministic_terms_equal_the_others():
    terms = SingleTerms(native.Native(), deterministic=True)
    found = on_threads(2, lambda: terms_with_shared_products(terms))
    expected = on_threads(2, terms_with_shared_products)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_plain_pytorch_refuses_to_be_deterministic():
    with pytest.raises(ValueError, match="other bits from another number of CPU threads"):
        SingleTerms(Eager(), deterministic=True).head(head_call("linear", 4, 3, 5))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_level_of_this_processor_gives_the_oracle_s_result():
    import fino_fast._C as extension

    assert extension.capability() in extension.capabilities()
    for level in extension.capabilities():
        done = run_python(
            """
            import torch
            import fino_fast._C
            from fino_fast.native import Native
            from fino_fast.eager import Eager
            from single_terms import SingleTerms

            torch.manual_seed(0)
            rows = torch.randn(150, 21)
            grads = []
            for backend in map(SingleTerms, (Native(), Eager())):
                leaf = rows.clone().requires_grad_()
                loss = backend.contrastive(leaf, torch.tensor(10.0), 2, False)
                loss.backward()
                grads.append((loss.detach(), leaf.grad))
            for backend in map(SingleTerms, (Native(), Eager())):
                leaf = rows.clone().requires_grad_()
                value = backend.orthogonal(leaf, torch.arange(150) % 7, "preserve")
                value.backward()
                grads.append((value.detach(), leaf.grad))
            torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(grads[2], grads[3], rtol=1e-5, atol=1e-7)
            print(fino_fast._C.capability())
            """,
            FINO_CPU_CAPABILITY=level,
            PYTHONPATH=str(Path(__file__).parent),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == level


def test_an_unknown_level_is_refused_by_name():
    done = run_python(
        "from fino_fast import ops, _C; _C.capability()", FINO_CPU_CAPABILITY="avx1024"
    )
    assert done.returncode != 0
    assert "FINO_CPU_CAPABILITY=avx1024: this processor and binary offer baseline" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("term", ["contrastive", "heads"])
def test_extra_memory_at_16384_rows(term):
    """Peak resident memory of forward + backward, beyond the inputs and their gradients."""
    done = run_python(
        f"""
        import torch
        from pathlib import Path
        from fino_fast._C import release_scratch
        from fino_fast.native import Native
        from fino_fast.terms import ContrastiveCall, HeadCall, Step

        def peak():
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1024

        def extra(n):
            # MB of forward + backward beyond the inputs and their gradients
            x = torch.randn(n, 128, requires_grad=True)
            leaves = [x]
            if "{term}" == "heads":
                bank = torch.randn(10_000, 128, requires_grad=True)
                offset = torch.zeros(10_000, requires_grad=True)
                y = torch.randint(0, 10_000, (n,))
                leaves += [bank, offset]
            release_scratch()
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
            before = peak()
            if "{term}" == "contrastive":
                call = ContrastiveCall(x, torch.tensor(10.0), 2)
                loss = Native().step(Step(call)).contrastive
            else:
                call = HeadCall("linear", x, bank, offset, y, torch.tensor(1 / n))
                loss = Native().step(Step(heads=[call])).guides
            loss.backward()
            return peak() - before - sum(leaf.grad.nbytes for leaf in leaves) / 2**20

        extra(256)  # thread pools and the library's own workspaces
        print(extra(16384))
        """
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 96


@pytest.mark.parametrize("kind", ["contrastive", "linear", "prototype", "tanh", "orthogonal"])
def test_kept_memory_brings_nothing_into_the_next_call(kind):
    extension = importlib.import_module("fino_fast._C")

    def step(value: float) -> list[Tensor]:
        torch.manual_seed(0)
        if kind == "contrastive":
            rows = torch.randn(1200, 16) * value
            return contrastive_gradients(NATIVE, rows, 0.1, two_tower=False, views=2)
        if kind == "orthogonal":
            z, labels = torch.randn(1200, 300) * value, torch.randint(-1, 400, (1200,))
            return orthogonal_gradients(z, labels, "preserve", NATIVE)
        call = head_call(kind, 600, 16, 900)
        return head_gradients(NATIVE, replace(call, x=(call.x.detach() * value).requires_grad_()))

    extension.release_scratch()
    fresh = step(1.0)
    step(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(fresh, step(1.0), strict=True))
    assert 2**20 <= extension.release_scratch() <= 96 * 2**20
    assert extension.release_scratch() == 0


@pytest.fixture
def bf16_products() -> Iterator[None]:
    extension = importlib.import_module("fino_fast._C")
    extension.choose_bf16_products(True)
    yield
    extension.choose_bf16_products(None)


def autocast_gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """[loss, gradients] in fp64 of what people write in PyTorch: products under autocast."""
    copies = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*copies)
    value.backward()
    return [t.detach().double() for t in (value, *(copy.grad for copy in copies))]


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("two_tower", [False, True])
def test_contrastive_with_bf16_products_loses_no_more_than_pytorch_s(bf16_products, two_tower):
    rows = torch.randn(600, 64).bfloat16()

    def plain(x: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(x.float(), dim=1)
        if two_tower:
            logits, target = unit[:300] @ unit[300:].T / 0.1, torch.arange(300)
            terms = [torch.nn.functional.cross_entropy(s, target) for s in (logits, logits.T)]
            return torch.stack(terms).mean()
        logits = (unit @ unit.T / 0.1).masked_fill(torch.eye(600, dtype=torch.bool), -torch.inf)
        return torch.nn.functional.cross_entropy(logits, torch.arange(600).roll(300))

    exact = contrastive_gradients(EAGER, rows.double(), 0.1, two_tower, 2)[:2]
    ours = contrastive_gradients(NATIVE, rows, 0.1, two_tower, 2)[:2]
    theirs = autocast_gradients(plain, rows)
    for mine, other in zip(
        relative_errors(ours, exact), relative_errors(theirs, exact), strict=True
    ):
        assert mine <= 2 * other + 1e-5
    exact_products = relative_errors(
        contrastive_gradients(EAGER, rows, 0.1, two_tower, 2)[:2], exact
    )
    assert relative_errors(ours, exact)[0] > exact_products[0]  # they are bf16 products indeed


@pytest.mark.parametrize("wide", [False, True])
def test_linear_head_with_bf16_products_loses_no_more_than_pytorch_s(
    bf16_products, wide, monkeypatch
):
    if wide:
        monkeypatch.setattr(native, "DEFERRED_BANK_BYTES", 0)
    x, bank = torch.randn(500, 96).bfloat16(), torch.randn(3000, 96) * 0.1
    offset, y = torch.randn(3000), torch.randint(0, 3000, (500,))

    def plain(x: Tensor, bank: Tensor, offset: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(x, bank, offset)
        return torch.nn.functional.cross_entropy(logits.float(), y)

    def ours(backend: SingleTerms, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype), bank.to(dtype), offset.to(dtype)]
        if dtype == torch.bfloat16:  # as under autocast: rows in half precision, parameters not
            leaves[1:] = [bank.clone(), offset.clone()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        inv_count = torch.tensor(1 / 500, dtype=torch.float64)
        loss = backend.head(HeadCall("linear", *leaves, y, inv_count)).loss
        loss.backward()
        return [t.detach().double() for t in (loss, *(leaf.grad for leaf in leaves))]

    exact = ours(EAGER, torch.float64)
    theirs = autocast_gradients(plain, x, bank, offset)
    for mine, other in zip(
        relative_errors(ours(NATIVE, torch.bfloat16), exact),
        relative_errors(theirs, exact),
        strict=True,
    ):
        assert mine <= 2 * other + 1e-5


def bf16_terms(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    rows, call = torch.randn(n, 96).bfloat16(), head_call("linear", n, 96, 300, torch.bfloat16)
    return contrastive_gradients(NATIVE, rows, 0.1, False, 2) + head_gradients(NATIVE, call)


def test_bf16_products_are_the_same_from_any_number_of_threads(bf16_products):
    one, *others = [on_threads(threads, lambda: bf16_terms(700)) for threads in (1, 2, 3)]
    for other in others:
        assert all(map(torch.equal, one, other))


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_bf16_products_without_the_library_s_kernel(bf16_products):
    """Ours in plain C++: the same up to the order of a sum."""
    found = bf16_terms(200)
    with torch.backends.mkldnn.flags(enabled=False):
        for one, other in zip(bf16_terms(200), found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()))


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_bf16_rows_are_multiplied_in_fp32_where_that_is_no_slower():
    """Few rows, or no kernel of the library."""
    extension = importlib.import_module("fino_fast._C")

    def in_fp32(n: int) -> list[Tensor]:
        extension.choose_bf16_products(False)
        try:
            return bf16_terms(n)
        finally:
            extension.choose_bf16_products(None)

    assert all(map(torch.equal, bf16_terms(60), in_fp32(60)))
    expected = in_fp32(700)
    with torch.backends.mkldnn.flags(enabled=False):
        assert all(map(torch.equal, bf16_terms(700), expected))
    if extension.capability() == "avx512_bf16":
        assert not torch.equal(bf16_terms(700)[1], expected[1])


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retained_graphs_give_the_same_gradients_again(dtype, factor):
    """The last backward pass may use up what was kept; earlier ones must not hand it out."""
    call = head_call("linear", 20, 6, 11, dtype)
    orthogonal = OrthogonalCall(call.x, torch.arange(20) % 3, "preserve")
    result = NATIVE.backend.step(Step(heads=[call], orthogonal=[orthogonal]))
    assert result.guides is not None
    assert result.orthogonal is not None
    loss = (result.guides + result.orthogonal) * factor
    leaves = [call.x, call.bank, call.offset]
    runs = []
    for again in (True, True, False):
        gradients = torch.autograd.grad(loss, leaves, retain_graph=again)
        runs.append([gradient.clone() for gradient in gradients])
        for gradient in gradients:
            gradient.zero_()  # they are the caller's, like any gradient
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)
