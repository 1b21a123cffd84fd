"""Every term of every backend against the naive oracle, with fp64 gradcheck and its invariances."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import NAN, embeddings, labels, values
from single_terms import SingleTerms
from torch import Tensor
from torch.autograd import gradcheck

from fino_fast.backends import resolve
from fino_fast.terms import HeadCall

EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture
def terms(backend: str) -> SingleTerms:
    return SingleTerms(resolve(backend, torch.device("cpu")))


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients to `inputs`."""
    torch.testing.assert_close(actual, expected, **EXACT)
    got = torch.autograd.grad(actual, inputs, materialize_grads=True)
    want = torch.autograd.grad(expected, inputs, materialize_grads=True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def leaf(*shape: int, seed: int = 9, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


# --- contrastive


@pytest.mark.parametrize(
    ("views", "images", "dim", "two_tower"),
    [(2, 7, 5, False), (3, 5, 4, False), (2, 6, 5, True), (2, 1, 3, False), (2, 1, 3, True),
     (5, 1, 3, False), (2, 4, 1, False), (2, 67, 17, False)],
)  # fmt: skip
def test_contrastive(
    terms: SingleTerms, views: int, images: int, dim: int, two_tower: bool
) -> None:
    p = embeddings(views, images, dim)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    actual = terms.contrastive(p.flatten(0, 1), 1 / temperature, views, two_tower)
    expected = oracle.info_nce(p, temperature, two_tower)
    assert_same(actual, expected, [p, temperature])


@pytest.mark.parametrize("two_tower", [False, True])
def test_two_views_are_nt_xent_and_two_towers_are_clip(terms: SingleTerms, two_tower: bool) -> None:
    p = embeddings(2, 6, 5)
    unit = torch.nn.functional.normalize(p, dim=-1)
    if two_tower:
        logits, target = unit[0] @ unit[1].T / 0.2, torch.arange(6)
        cross_entropy = torch.nn.functional.cross_entropy
        expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    else:
        rows = unit.flatten(0, 1)
        logits = (rows @ rows.T / 0.2).fill_diagonal_(-math.inf)
        target = torch.arange(12).roll(6)
        expected = torch.nn.functional.cross_entropy(logits, target)
    scale = torch.tensor(5.0, dtype=torch.float64)
    torch.testing.assert_close(
        terms.contrastive(p.flatten(0, 1), scale, 2, two_tower), expected, **EXACT
    )


def test_contrastive_gradcheck(terms: SingleTerms) -> None:
    for views, images, two_tower in [(2, 3, False), (3, 2, False), (2, 3, True)]:
        rows, scale = leaf(views * images, 4), leaf(1, scale=0).exp().detach() * 3
        assert gradcheck(
            lambda r, s, v=views, t=two_tower: terms.contrastive(r, s.squeeze(0), v, t),
            (rows, scale.requires_grad_()),
        )


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_contrastive_logits_may_be_huge(terms: SingleTerms, scale: float) -> None:
    p = embeddings(2, 5, 6)
    temperature = torch.tensor(1 / scale, dtype=torch.float64)
    actual = terms.contrastive(p.flatten(0, 1), 1 / temperature, 2, False)
    assert_same(actual, oracle.info_nce(p, temperature), [p])


def test_contrastive_of_a_zero_row_is_finite(terms: SingleTerms) -> None:
    p = embeddings(2, 3, 4).detach()
    p[0, 1] = 0
    actual = terms.contrastive(p.flatten(0, 1), torch.tensor(5.0, dtype=torch.float64), 2, False)
    torch.testing.assert_close(actual, oracle.info_nce(p, 0.2), **EXACT)


# --- heads


def inverse(count: int) -> Tensor:
    return torch.tensor(1 / max(count, 1), dtype=torch.float64)


def linear_call(z: Tensor, w: Tensor, b: Tensor, y: Tensor, smoothing: float) -> HeadCall:
    return HeadCall("linear", z, w, b, y, inverse(int((y >= 0).sum())), smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("rows", "dim", "classes", "missing"),
    [(11, 5, 4, 3), (1, 3, 4, 0), (6, 1, 3, 0), (5, 3, 1, 1), (4, 3, 5, 4), (3, 2, 97, 0)],
)
def test_linear(
    terms: SingleTerms, rows: int, dim: int, classes: int, missing: int, smoothing: float
) -> None:
    z, w, b = leaf(rows, dim), leaf(classes, dim, seed=1), leaf(classes, seed=2)
    y = labels(rows, classes, missing)
    result = terms.head(linear_call(z, w, b, y, smoothing))
    assert_same(result.loss, oracle.linear(z, w, b, y.tolist(), smoothing), [z, w, b])
    valid = [i for i in range(rows) if y[i] >= 0]
    hits = [int((w @ z[i] + b).argmax()) == y[i] for i in valid]
    assert result.metric.item() == pytest.approx(sum(hits) / max(len(valid), 1))
    assert not result.metric.requires_grad


def prototype_bank(classes: int, dim: int, seen: list[int], ema: bool = False) -> oracle.Bank:
    bank = oracle.Bank(classes, dim, 0.2, 0.9, ema)
    directions = leaf(classes, dim, seed=3).detach()
    for k in seen:
        bank.centroids[k] = directions[k] if ema else oracle.unit(directions[k])
        bank.counts[k], bank.temperatures[k] = k + 1, 0.2 + 0.05 * k
    return bank


def prototype_call(z: Tensor, bank: oracle.Bank, y: list[int]) -> HeadCall:
    target = torch.tensor([k if k >= 0 and bank.counts[k] else -1 for k in y])
    return HeadCall(
        "prototype",
        z,
        torch.stack(bank.centroids),
        torch.tensor(bank.temperatures, dtype=torch.float64),
        target,
        inverse(int((target >= 0).sum())),
        0.0,
        torch.tensor(bank.counts),
    )


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(
    ("rows", "dim", "classes", "seen"),
    [(11, 5, 6, [0, 2, 3]), (9, 4, 6, [0, 1, 2, 3, 4, 5]), (1, 3, 4, [1]), (5, 1, 3, [0, 2]),
     (6, 3, 1, [0]), (6, 3, 4, []), (4, 3, 97, [0, 50, 96])],
)  # fmt: skip
def test_prototype(
    terms: SingleTerms, rows: int, dim: int, classes: int, seen: list[int], ema: bool
) -> None:
    z, bank = leaf(rows, dim), prototype_bank(classes, dim, seen, ema)
    y = labels(rows, classes, missing=rows // 4).tolist()
    result = terms.head(prototype_call(z, bank, y))
    assert_same(result.loss, oracle.prototype(z, bank, y), [z])
    hits = []
    for row, k in zip(z, y, strict=True):
        if k in seen:
            cosines = {
                c: (oracle.unit(row) @ oracle.unit(bank.centroids[c])).item() / bank.temperatures[c]
                for c in seen
            }
            hits.append(max(cosines, key=cosines.__getitem__) == k)
    assert result.metric.item() == pytest.approx(sum(hits) / max(len(hits), 1))


def continuous_call(z: Tensor, w: Tensor, b: Tensor, y: Tensor, activation: str) -> HeadCall:
    return HeadCall(activation, z, w, b, y, inverse(int((~y.isnan()).sum())))


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "tanh"])
@pytest.mark.parametrize(
    ("rows", "dim", "outputs", "missing"),
    [(11, 5, 3, 7), (1, 3, 1, 0), (6, 1, 1, 2), (4, 3, 2, 8), (5, 3, 9, 11)],
)
def test_continuous(
    terms: SingleTerms, rows: int, dim: int, outputs: int, missing: int, activation: str
) -> None:
    z, w, b = leaf(rows, dim), leaf(outputs, dim, seed=1), leaf(outputs, seed=2)
    y = values(rows, outputs, missing)
    result = terms.head(continuous_call(z, w, b, y, activation))
    assert_same(result.loss, oracle.continuous(z, w, b, y, activation), [z, w, b])
    assert result.metric.item() == pytest.approx(result.loss.item())


def test_heads_gradcheck(terms: SingleTerms) -> None:
    z, w, b, y = leaf(5, 3), leaf(4, 3, seed=1), leaf(4, seed=2), torch.tensor([0, 3, -1, 1, 3])
    y_float, bank = values(5, 4, missing=6), prototype_bank(4, 3, [0, 1, 3])

    def loss(call: HeadCall) -> Tensor:
        return terms.head(call).loss

    assert gradcheck(lambda *x: loss(linear_call(*x, y, 0.1)), (z, w, b))
    assert gradcheck(lambda x: loss(prototype_call(x, bank, y.tolist())), (z,))
    for activation in ("identity", "sigmoid", "tanh"):
        assert gradcheck(lambda *x, a=activation: loss(continuous_call(*x, y_float, a)), (z, w, b))


def test_heads_return_the_gradient_of_their_rows(terms: SingleTerms) -> None:
    z, w, b = leaf(6, 3), leaf(4, 3, seed=1), leaf(4, seed=2)
    bank, y = prototype_bank(4, 3, [0, 1, 3]), labels(6, 4, missing=2)
    calls = [
        linear_call(z, w, b, y, 0.1),
        prototype_call(z, bank, y.tolist()),
        continuous_call(z, w, b, values(6, 4, missing=5), "tanh"),
    ]
    for result in terms.balanced(calls):
        assert result.gradient is not None
        assert not result.gradient.requires_grad
        [expected] = torch.autograd.grad(result.loss, z, retain_graph=True)
        torch.testing.assert_close(result.gradient, expected, **EXACT)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_row_without_metadata_may_hold_anything(terms: SingleTerms, bad: float) -> None:
    clean = leaf(5, 3).detach()
    dirty = clean.clone()
    dirty[2] = bad
    w, b, bank = leaf(4, 3, seed=1), leaf(4, seed=2), prototype_bank(4, 3, [0, 1, 3])
    y, y_float = torch.tensor([0, 3, -1, 1, 3]), values(5, 4)
    y_float[2] = NAN
    results = []
    for rows in (clean, dirty):
        z = rows.clone().requires_grad_()
        calls = [
            linear_call(z, w, b, y, 0.1),
            prototype_call(z, bank, y.tolist()),
            continuous_call(z, w, b, y_float, "sigmoid"),
        ]
        losses = [terms.head(call).loss for call in calls] + [
            terms.orthogonal(z, metadata, role)
            for metadata in (y, y_float)
            for role in ("preserve", "suppress")
        ]
        gradients = torch.autograd.grad(sum(losses), [z, w, b])
        results.append([*torch.stack(losses).unbind(), *gradients])
    for with_clean, with_dirty in zip(*results, strict=True):
        torch.testing.assert_close(with_dirty, with_clean, **EXACT)


# --- orthogonal suppression


ROLES = pytest.mark.parametrize("role", ["preserve", "suppress"])


@ROLES
@pytest.mark.parametrize(
    ("rows", "dim", "classes", "missing"),
    [(14, 4, 3, 4), (5, 9, 3, 0), (9, 1, 3, 1), (8, 3, 50, 1), (40, 7, 13, 9)],
)
def test_orthogonal_of_categories(
    terms: SingleTerms, rows: int, dim: int, classes: int, missing: int, role: str
) -> None:
    z, y = embeddings(1, rows, dim)[0].detach().requires_grad_(), labels(rows, classes, missing)
    expected = oracle.orthogonal(z, *oracle.design(y.tolist()), role)
    assert_same(terms.orthogonal(z, y, role), expected, [z])


@ROLES
@pytest.mark.parametrize(
    ("rows", "dim", "columns", "missing"),
    [(14, 4, 1, 4), (15, 4, 3, 4), (7, 11, 2, 0), (9, 1, 1, 1)],
)
def test_orthogonal_of_values(
    terms: SingleTerms, rows: int, dim: int, columns: int, missing: int, role: str
) -> None:
    z, y = embeddings(1, rows, dim)[0].detach().requires_grad_(), values(rows, columns, missing)
    valid = [i for i in range(rows) if not y[i].isnan().any()]
    assert_same(terms.orthogonal(z, y, role), oracle.orthogonal(z, y[valid], valid, role), [z])


@ROLES
def test_orthogonal_of_a_rank_deficient_design(terms: SingleTerms, role: str) -> None:
    """A constant column and a multiple of another one add nothing to the column space."""
    z, y = embeddings(1, 9, 5)[0].detach().requires_grad_(), values(9, 2)
    doubled = torch.cat([y[:, :1], torch.full((9, 1), 3.7), -2 * y[:, :1], y[:, 1:]], 1)
    torch.testing.assert_close(
        terms.orthogonal(z, doubled, role), terms.orthogonal(z, y, role), **EXACT
    )


@ROLES
def test_orthogonal_gradcheck(terms: SingleTerms, role: str) -> None:
    for metadata in (torch.tensor([0, 1, 1, -1, 2, 0, 2]), values(7, 2, missing=2)):
        assert gradcheck(lambda z, m=metadata: terms.orthogonal(z, m, role), (leaf(7, 3),))
        assert gradcheck(lambda z, m=metadata: terms.orthogonal(z, m, role), (leaf(7, 9),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    "metadata",
    [torch.zeros(24, dtype=torch.int64), torch.full((24,), -1), torch.full((24, 2), 0.7),
     torch.full((24, 1), NAN)],
    ids=["one class", "all missing", "constant", "all NaN"],
)  # fmt: skip
@ROLES
def test_orthogonal_is_zero_where_nothing_is_explained(
    terms: SingleTerms, role: str, metadata: Tensor, offset: float, dtype: torch.dtype
) -> None:
    """Rounding must not pass for a direction: the value is 0, and so is the gradient."""
    if metadata.is_floating_point():
        metadata = metadata.to(dtype)
    z = (leaf(24, 8).detach() + offset).to(dtype).requires_grad_()
    value = terms.orthogonal(z, metadata, role)
    [gradient] = torch.autograd.grad(value, z)
    assert abs(value.item()) <= 1e-6
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlap_is_zero_where_nothing_is_left(terms: SingleTerms, dtype: torch.dtype) -> None:
    z = leaf(4, 8).to(dtype).detach().requires_grad_()
    for metadata in (torch.arange(4), values(4, 3).to(dtype)):
        value = terms.orthogonal(z, metadata, "preserve")
        assert value.item() == 0
        assert not torch.autograd.grad(value, z)[0].any()
        assert terms.orthogonal(z, metadata, "suppress").item() == pytest.approx(1)


def test_orthogonal_denominators_below_1e_12_give_zero(terms: SingleTerms) -> None:
    z, y = leaf(8, 3).detach(), torch.arange(8) % 2
    for role, power in (("suppress", 2), ("preserve", 4)):
        norm = oracle_denominator(z, y, role)
        above, below = ((factor * 1e-12 / norm) ** (1 / power) for factor in (1.1, 0.9))
        assert terms.orthogonal(above * z, y, role) > 1e-3
        assert terms.orthogonal(below * z, y, role) == 0


def oracle_denominator(z: Tensor, y: Tensor, role: str) -> float:
    z = z - z.mean(0)
    s = torch.stack([z[y == k].mean(0) for k in y])
    if role == "suppress":
        return float((z**2).sum())
    return float((s**2).sum() * ((z - s) ** 2).sum())


SIZES = {
    "rows": st.integers(1, 12),
    "dim": st.integers(1, 6),
    "kinds": st.integers(1, 5),
    "seed": st.integers(0, 2**16),
    "role": st.sampled_from(["preserve", "suppress"]),
    "continuous": st.booleans(),
}


def drawn(rows: int, dim: int, kinds: int, seed: int, continuous: bool) -> tuple[Tensor, Tensor]:
    z, missing = leaf(rows, dim, seed=seed).detach() + 1, seed % (rows + 1)
    if continuous:
        return z, values(rows, kinds, missing, seed)
    return z, labels(rows, kinds, missing, seed)


def test_orthogonal_properties(terms: SingleTerms) -> None:
    """In [0, 1]; the same after a rotation, a scale, a shift of z, and any order of the rows."""

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(**SIZES, scale=st.floats(0.05, 50))
    def check(
        rows: int, dim: int, kinds: int, seed: int, role: str, continuous: bool, scale: float
    ) -> None:
        z, metadata = drawn(rows, dim, kinds, seed, continuous)
        value = terms.orthogonal(z, metadata, role)
        assert -1e-12 <= value <= 1 + 1e-12
        rotation = torch.linalg.qr(leaf(dim, dim, seed=seed + 1).detach()).Q
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        for other, m in (
            (scale * z @ rotation, metadata),
            (z - 3, metadata),
            (z[order], metadata[order]),
        ):
            torch.testing.assert_close(
                terms.orthogonal(other, m, role), value, rtol=1e-6, atol=1e-8
            )

    check()


def test_heads_and_contrastive_do_not_see_the_order(terms: SingleTerms) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        images=st.integers(1, 9),
        dim=st.integers(1, 5),
        classes=st.integers(1, 6),
        seed=st.integers(0, 2**16),
    )
    def check(images: int, dim: int, classes: int, seed: int) -> None:
        p = embeddings(2, images, dim, seed).detach()
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
        scale = torch.tensor(4.0, dtype=torch.float64)

        def contrastive(rows: Tensor) -> Tensor:
            return terms.contrastive(rows.flatten(0, 1), scale, 2, False)

        torch.testing.assert_close(contrastive(p[:, order]), contrastive(p), **EXACT)
        # Neither which view comes first nor the length of a row matters.
        torch.testing.assert_close(contrastive(p.flip(0)), contrastive(p), **EXACT)
        torch.testing.assert_close(contrastive(7 * p), contrastive(p), **EXACT)

        z, y = p[0], labels(images, classes, seed % (images + 1), seed)
        w, b = leaf(classes, dim, seed=seed), leaf(classes, seed=seed + 1)
        bank = prototype_bank(classes, dim, list(range(0, classes, 2)))

        def losses(order: Tensor) -> Tensor:
            calls = [
                linear_call(z[order], w, b, y[order], 0.2),
                prototype_call(z[order], bank, y[order].tolist()),
                continuous_call(
                    z[order], w, b, values(images, classes, seed % images, seed)[order], "tanh"
                ),
            ]
            return torch.stack([terms.head(call).loss for call in calls])

        torch.testing.assert_close(losses(order), losses(torch.arange(images)), **EXACT)

    check()
