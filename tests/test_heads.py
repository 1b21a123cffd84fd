"""The heads: parameters in order, names, predictions, and the update of the prototype banks."""

import copy
import math

import pytest
import torch
from loss_case import NAN, bank_of, labels
from torch import Tensor, nn

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE
from fino_fast.heads import PrototypeHead, _update_bank, build_head

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def prototype_head(dim: int = 4, classes: int = 6, **arguments: object) -> PrototypeHead:
    factor = Categorical("plate", classes, **({"momentum": 0.8} | arguments))
    head = build_head(factor, dim).double()
    assert isinstance(head, PrototypeHead)
    return head


def teachers(views: int, images: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(views, images, dim, generator=generator, dtype=torch.float64) + 0.5


# --- parameters and buffers


def test_parameters_are_in_the_order_of_the_forward_pass() -> None:
    criterion = FinoLoss(
        4,
        [
            Categorical("b", 3, head="linear", hidden=(5, 6), dropout=0.5),
            Categorical("p", 3),
            Continuous("a", 2),
        ],
        contrastive=InfoNCE(learnable=True),
    )
    heads = [
        "heads.b.hidden.0.weight", "heads.b.hidden.0.bias", "heads.b.hidden.3.weight",
        "heads.b.hidden.3.bias", "heads.b.weight", "heads.b.bias", "heads.a.weight", "heads.a.bias",
    ]  # fmt: skip
    assert [name for name, _ in criterion.named_parameters()] == ["log_temperature", *heads]
    inside = nn.Sequential(nn.Linear(2, 4), criterion)
    named = [name for name, _ in inside.named_parameters()]
    assert named == ["0.weight", "0.bias", "1.log_temperature", *(f"1.{name}" for name in heads)]
    assert len(list(criterion.parameters())) == len(set(map(id, criterion.parameters()))) == 9


def test_hidden_layers_are_linear_gelu_dropout() -> None:
    head = build_head(Continuous("y", 2, hidden=(5, 6), dropout=0.25), 4)
    assert [type(layer) for layer in head.hidden] == [nn.Linear, nn.GELU, nn.Dropout] * 2
    assert [tuple(p.shape) for p in head.hidden.parameters()] == [(5, 4), (5,), (6, 5), (6,)]
    assert head.weight.shape == (2, 6)
    assert head.bias.shape == (2,)
    assert {layer.p for layer in head.hidden if isinstance(layer, nn.Dropout)} == {0.25}


def test_a_head_predicts() -> None:
    z = torch.randn(7, 4)
    plain = build_head(Categorical("c", 3, head="linear"), 4)
    torch.testing.assert_close(plain(z), z @ plain.weight.T + plain.bias)
    deep = build_head(Categorical("c", 3, head="linear", hidden=(4,)), 4)
    torch.testing.assert_close(deep(z), deep.hidden(z) @ deep.weight.T + deep.bias)


def test_a_prototype_head_has_buffers_and_no_parameters() -> None:
    head = build_head(Categorical("plate", 5, temperature=0.05), 4)
    assert not list(head.parameters())
    assert {name: (tuple(b.shape), b.dtype) for name, b in head.named_buffers()} == {
        "centroids": ((5, 4), torch.float32),
        "temperatures": ((5,), torch.float32),
        "counts": ((5,), torch.int64),
    }
    assert head.temperatures.unique().tolist() == pytest.approx([0.05])
    assert not head.counts.any()


@pytest.mark.parametrize("name", ["type", "keys", "forward", "T_destination", "a b/µ", "weight"])
def test_any_name_will_do(name: str) -> None:
    criterion = FinoLoss(
        3, [Categorical(name, 4, head="linear")], contrastive=None, backend="eager"
    )
    loss = criterion(torch.randn(1, 4, 3), {name: torch.arange(4)})
    loss.backward()
    assert criterion.heads[name].weight.grad is not None
    assert set(criterion.state_dict()) >= {f"heads.{name}.weight", f"heads.{name}.bias"}
    other = FinoLoss(3, criterion.factors, contrastive=None)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.heads[name].weight, criterion.heads[name].weight)
    assert torch.equal(copy.deepcopy(other).heads[name].weight, criterion.heads[name].weight)


# --- the bank


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("concentration", ["fixed", "ema"])
def test_bank_follows_the_definition_over_steps(concentration: str, views: int) -> None:
    head = prototype_head(concentration=concentration, temperature=0.25)
    bank = bank_of(head.factor, 4)
    for step in range(6):
        # Classes come in one after the other, at different sizes, some labels missing.
        y = labels(9, min(step + 2, 6), missing=step, seed=step)
        rows = teachers(views, 9, 4, seed=step)
        head.update(rows, y)
        bank.update(rows, y.tolist())
        torch.testing.assert_close(head.centroids, torch.stack(bank.centroids), **EXACT)
        torch.testing.assert_close(
            head.temperatures, torch.tensor(bank.temperatures, dtype=torch.float64), **EXACT
        )
        assert head.counts.tolist() == bank.counts
    norms = head.centroids.norm(dim=1)
    assert head.counts.all()
    if concentration == "fixed":
        torch.testing.assert_close(norms, torch.ones_like(norms))
        assert head.temperatures.unique().tolist() == [0.25]
    else:
        assert (norms < 0.999).any()
        assert (head.temperatures != 0.25).any()


def test_views_are_taken_one_after_the_other() -> None:
    """The second view meets a class that the first one has made known."""
    head = prototype_head(classes=1)
    first, second = teachers(2, 1, 4, seed=0).unbind(0)
    head.update(torch.stack([first, second]), torch.tensor([0]))
    u, v = (x[0] / x[0].norm() for x in (first, second))
    expected = 0.8 * u + 0.2 * v
    torch.testing.assert_close(head.centroids[0], expected / expected.norm(), **EXACT)
    assert head.counts.tolist() == [2]


def test_an_update_touches_only_the_classes_of_the_batch() -> None:
    head = prototype_head(concentration="ema")
    head.update(teachers(2, 12, 4, seed=1), torch.arange(12) % 6)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    storage = {name: buffer.data_ptr() for name, buffer in head.named_buffers()}
    head.update(teachers(2, 4, 4, seed=2), torch.tensor([2, 4, -1, 4]))
    untouched = [0, 1, 3, 5]
    for name, buffer in head.named_buffers():
        assert torch.equal(buffer[untouched], before[name][untouched])
        assert buffer.data_ptr() == storage[name]  # in place, no copy of the bank
    assert head.counts.tolist() == [4, 4, 6, 4, 8, 4]
    assert not torch.isclose(head.centroids[[2, 4]], before["centroids"][[2, 4]]).any()


def test_an_update_without_labels_changes_nothing() -> None:
    head = prototype_head(concentration="ema")
    head.update(teachers(1, 12, 4, seed=1), torch.arange(12) % 6)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    head.update(teachers(2, 3, 4, seed=2), torch.full((3,), -1))
    for name, buffer in head.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_row_that_is_not_finite_does_not_enter_the_bank(bad: float) -> None:
    clean, dirty = prototype_head(concentration="ema"), prototype_head(concentration="ema")
    for step in range(2):
        rows, y = teachers(1, 6, 4, seed=step), torch.tensor([0, 1, 1, 1, 5, 5])
        clean.update(rows[:, [0, 1, 3]], y[[0, 1, 3]])
        rows[0, [2, 4, 5], 1] = bad
        dirty.update(rows, y)
    for ours, theirs in zip(dirty.buffers(), clean.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_opposite_rows_leave_a_finite_bank() -> None:
    head = prototype_head(classes=2)
    rows = torch.tensor([[[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0.0, 0, 0, 0]]], dtype=torch.float64)
    head.update(rows, torch.tensor([0, 0, 1]))
    assert head.centroids.isfinite().all()
    assert head.counts.tolist() == [2, 1]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_its_ends(momentum: float) -> None:
    head = prototype_head(classes=1, momentum=momentum)
    one, two = teachers(2, 1, 4, seed=0).split(1)
    head.update(one, torch.tensor([0]))
    head.update(two, torch.tensor([0]))
    kept = (one if momentum else two)[0, 0]
    torch.testing.assert_close(head.centroids[0], kept / kept.norm(), **EXACT)


def test_bank_takes_embeddings_of_half_precision() -> None:
    head = build_head(Categorical("plate", 3, momentum=0.5), 4)
    rows = teachers(2, 8, 4, seed=0).to(torch.bfloat16)
    y = labels(8, 3)
    bank = bank_of(head.factor, 4)
    head.update(rows, y)
    bank.update(rows.double(), y.tolist())
    assert head.centroids.dtype == torch.float32
    torch.testing.assert_close(
        head.centroids.double(), torch.stack(bank.centroids), rtol=1e-6, atol=1e-6
    )


def test_update_takes_teachers_that_require_a_gradient() -> None:
    head = prototype_head()
    head.update(teachers(1, 4, 4, seed=0).requires_grad_(), torch.arange(4))
    assert not head.centroids.requires_grad


@pytest.mark.parametrize("unit_norm", [False, True])
def test_operator(unit_norm: bool) -> None:
    bank = torch.randn(5, 4), torch.rand(5), torch.tensor([0, 3, 1, 0, 2])
    y = torch.tensor([1, 1, -1, 3, 0, 1])
    torch.library.opcheck(_update_bank, (*bank, torch.randn(2, 6, 4), y, 0.9, unit_norm))


def test_one_update_of_a_large_bank_costs_no_more_than_of_a_small_one() -> None:
    """Bytes allocated by an update, by the profiler: rows, not classes."""
    peaks = []
    for classes in (100, 200_000):
        head = build_head(Categorical("plate", classes), 16)
        rows, y = torch.randn(2, 32, 16), torch.arange(32)
        head.update(rows, y)
        with torch.profiler.profile(profile_memory=True) as profile:
            head.update(rows, y)
        peaks.append(sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()))
    assert 0 < peaks[1] <= 1.1 * peaks[0]
