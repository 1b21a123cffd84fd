"""`FinoLoss` as a whole against the naive oracle: what it returns, and what its state becomes."""

import copy
import inspect
import math
import warnings

import oracle
import pytest
import torch
from cuda_case import FAKE_CUDA
from loss_case import NAN, Expected, bank_of, embeddings, expect, factors, labels, metadata, values
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, LambdaSchedule, checks, reference

EXACT = {"rtol": 1e-9, "atol": 1e-11}
IMAGES, DIM = 11, 6


def make(backend: str, seed: int = 0, **arguments: object) -> FinoLoss:
    """A loss with all factors in fp64, its prototype banks filled by one update."""
    torch.manual_seed(seed)
    criterion = FinoLoss(DIM, **({"factors": factors(), "backend": backend} | arguments)).double()
    fill(criterion)
    return criterion


def fill(criterion: FinoLoss) -> dict[str, oracle.Bank]:
    """Give every prototype bank some classes (not the last), and the oracle's banks the same."""
    banks = {}
    for factor in criterion.factors:
        if isinstance(factor, Categorical) and factor.head == "prototype":
            rows = embeddings(1, 24, criterion.dim, seed=77).detach()
            y = labels(24, max(factor.num_classes - 1, 1), seed=78)
            head, banks[factor.name] = criterion.heads[factor.name], bank_of(factor, criterion.dim)
            for buffer in head.buffers():
                buffer.fill_(factor.temperature if buffer is head.temperatures else 0)
            head.update(rows, y)
            banks[factor.name].update(rows, y.tolist())
    return banks


def assert_step(
    criterion: FinoLoss,
    loss: Tensor,
    terms: dict[str, Tensor],
    expected: Expected,
    z: Tensor,
    p: Tensor | None = None,
) -> None:
    """Value, terms and all gradients of one step."""
    torch.testing.assert_close(loss.detach(), expected.loss, **EXACT)
    assert set(terms) - {"lambda"} == set(expected.terms) | {
        f"{factor.name}/{'accuracy' if isinstance(factor, Categorical) else 'mse'}"
        for factor in criterion.factors
    }
    for name, value in expected.terms.items():
        torch.testing.assert_close(terms[name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    for parameter in criterion.parameters():
        parameter.grad = None
    loss.backward()
    torch.testing.assert_close(z.grad, expected.z_gradient, **EXACT)
    if p is not None:
        torch.testing.assert_close(p.grad, expected.p_gradient, **EXACT)
    for name, parameter in criterion.named_parameters():
        torch.testing.assert_close(
            parameter.grad.squeeze(),
            expected.parameter_gradients[name].squeeze(),
            **EXACT,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# --- the objective


@pytest.mark.parametrize(
    "contrastive",
    [None, InfoNCE(0.2), InfoNCE(0.2, learnable=True), InfoNCE(0.5, two_tower=True)],
    ids=["guides only", "nt-xent", "learnable", "two towers"],
)
@pytest.mark.parametrize("guidance", [None, 0.3])
def test_the_whole_objective(
    backend: str, contrastive: InfoNCE | None, guidance: float | None
) -> None:
    criterion = make(backend, contrastive=contrastive, contrastive_weight=0.8,
                     schedule=LambdaSchedule("linear"))  # fmt: skip
    banks, data = fill(criterion), metadata(IMAGES)
    if contrastive is not None and contrastive.learnable:
        criterion.log_temperature.data.fill_(math.log(contrastive.temperature))
    if guidance is not None:
        criterion.set_progress(guidance)
    z = embeddings(2, IMAGES, DIM)
    loss, terms = criterion(z, data, return_terms=True)
    expected = expect(criterion, z, data, banks, guidance=1.0 if guidance is None else guidance)
    assert_step(criterion, loss, terms, expected, z)
    assert terms["lambda"].item() == pytest.approx(1.0 if guidance is None else guidance)


@pytest.mark.parametrize(("views", "images"), [(3, 5), (2, 1), (5, 2)])
def test_any_number_of_views_and_images(backend: str, views: int, images: int) -> None:
    criterion = make(backend)
    banks, data, z = fill(criterion), metadata(images), embeddings(views, images, DIM)
    loss, terms = criterion(z, data, return_terms=True)
    assert_step(criterion, loss, terms, expect(criterion, z, data, banks), z)


def test_projections_take_the_contrastive_term(backend: str) -> None:
    criterion = make(backend, contrastive_weight=1.7)
    banks, data = fill(criterion), metadata(IMAGES)
    z, p = embeddings(2, IMAGES, DIM), embeddings(2, IMAGES, 3, seed=5)
    loss, terms = criterion(z, data, projections=p, return_terms=True)
    assert_step(criterion, loss, terms, expect(criterion, z, data, banks, p), z, p)


def test_one_row_of_guides_only(backend: str) -> None:
    criterion = make(backend, contrastive=None)
    data = {
        "cell_line": torch.tensor([4]),
        "plate": torch.tensor([1]),
        "exposure": torch.tensor([[0.2, 0.9]], dtype=torch.float64),
        "depth": torch.tensor([0.3], dtype=torch.float64),
    }
    banks, z = fill(criterion), embeddings(1, 1, DIM)
    loss, terms = criterion(z, data, return_terms=True)
    assert_step(criterion, loss, terms, expect(criterion, z, data, banks), z)
    assert all(terms[f"{name}/orthogonal"] == 0 for name in ("cell_line", "plate", "exposure"))


def test_dimension_one_and_one_class(backend: str) -> None:
    criterion = FinoLoss(
        1,
        [Categorical("one", 1, head="linear", orthogonal=0.5), Categorical("p", 1, orthogonal=0.5)],
        backend=backend,
    ).double()
    data = {"one": torch.zeros(5, dtype=torch.int64), "p": torch.tensor([0, -1, 0, 0, 0])}
    banks, z = fill(criterion), embeddings(2, 5, 1)
    loss, terms = criterion(z, data, return_terms=True)
    assert_step(criterion, loss, terms, expect(criterion, z, data, banks), z)
    assert terms["one"] == terms["p"] == 0
    assert terms["one/accuracy"] == terms["p/accuracy"] == 1


def test_many_classes_few_rows(backend: str) -> None:
    criterion = FinoLoss(
        4, [Categorical("l", 301, head="linear"), Categorical("p", 301, orthogonal=1.0)],
        backend=backend,
    ).double()  # fmt: skip
    data = {"l": torch.tensor([300, 0, -1]), "p": labels(24, 300, seed=78)[:3]}
    banks, z = fill(criterion), embeddings(2, 3, 4)
    loss, terms = criterion(z, data, return_terms=True)
    assert_step(criterion, loss, terms, expect(criterion, z, data, banks), z)


# --- roles and λ


@pytest.mark.parametrize("guidance", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("index", range(4))
def test_the_gradient_to_z_is_scaled_and_that_to_the_head_is_not(
    backend: str, index: int, guidance: float
) -> None:
    """Beside the same head in the other role: opposite gradients to z, equal ones to the head."""
    factor = factors()[index]
    data, gradients = metadata(IMAGES), {}
    for role in ("preserve", "suppress"):
        arguments = {"role": role, "orthogonal": 0.0}
        if isinstance(factor, Continuous):
            arguments["activation"] = "tanh"
        changed = type(factor)(**(vars(factor) | arguments))
        criterion = make(
            backend, factors=[changed], contrastive=None, schedule=LambdaSchedule("linear")
        )
        criterion.set_progress(guidance)
        z = embeddings(1, IMAGES, DIM)
        loss = criterion(z, data)
        loss.backward()
        gradients[role] = z.grad, {n: p.grad for n, p in criterion.named_parameters()}, loss
        fill(criterion)
        criterion.set_progress(1.0)
        z = embeddings(1, IMAGES, DIM)
        full = torch.autograd.grad(criterion(z, data), z)[0]
        torch.testing.assert_close(gradients[role][0], guidance * full, **EXACT)
        assert full.abs().max() > 1e-3
    (z_kept, head_kept, kept), (z_reversed, head_reversed, reversed_) = gradients.values()
    torch.testing.assert_close(z_reversed, -z_kept, **EXACT)
    torch.testing.assert_close(reversed_, kept, **EXACT)
    assert head_kept.keys() == head_reversed.keys()
    for name, gradient in head_kept.items():
        torch.testing.assert_close(head_reversed[name], gradient, **EXACT)
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("role", ["preserve", "suppress"])
def test_the_orthogonal_gradient_is_never_reversed(backend: str, role: str) -> None:
    factor = Categorical("c", 5, role=role, head="linear", weight=0.0, orthogonal=2.0)
    criterion = make(backend, factors=[factor], contrastive=None, schedule=LambdaSchedule("linear"))
    criterion.set_progress(0.4)
    z, y = embeddings(2, IMAGES, DIM), labels(IMAGES, 5, missing=2)
    criterion(z, {"c": y}).backward()
    rows = z.detach().requires_grad_()
    x, valid = oracle.design(y.tolist() * 2)
    oracle.orthogonal(rows.flatten(0, 1), x, valid, role).backward()
    torch.testing.assert_close(z.grad, 0.4 * 2.0 * rows.grad, **EXACT)


def test_the_gradient_reverses_through_hidden_layers(backend: str) -> None:
    """±λ applies where the guide leaves the backbone, not at its last layer."""
    results = []
    for role in ("preserve", "suppress"):
        torch.manual_seed(3)
        factor = Continuous("y", 1, role=role, activation="tanh", hidden=(7, 5))
        criterion = make(
            backend, 3, factors=[factor], contrastive=None, schedule=LambdaSchedule("linear")
        )
        criterion.set_progress(0.5)
        z = embeddings(2, IMAGES, DIM)
        loss = criterion(z, {"y": values(IMAGES, 1)})
        head = criterion.heads["y"]
        leaf = z.detach().requires_grad_()
        plain = head.hidden(leaf.flatten(0, 1))
        target = values(IMAGES, 1).repeat(2, 1)
        direct = 0.03 * oracle.continuous(plain, head.weight, head.bias, target, "tanh")
        torch.testing.assert_close(loss, direct, **EXACT)
        names = [name for name, _ in criterion.named_parameters()]
        mine = torch.autograd.grad(loss, [z, *criterion.parameters()])
        theirs = torch.autograd.grad(direct, [leaf, *criterion.parameters()])
        sign = 0.5 if role == "preserve" else -0.5
        torch.testing.assert_close(mine[0], sign * theirs[0], **EXACT)
        for name, a, b in zip(names, mine[1:], theirs[1:], strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
        results.append(loss.item())
    assert results[0] == results[1]


def test_lambda_is_one_until_progress_is_set(backend: str) -> None:
    criterion = make(backend, schedule=LambdaSchedule("sigmoid", warmup=0.5))
    z, data = embeddings(2, IMAGES, DIM), metadata(IMAGES)
    assert criterion(z, data, return_terms=True)[1]["lambda"] == 1
    for progress in (0.0, 0.6, 1.0):
        criterion.set_progress(progress)
        expected = oracle.schedule("sigmoid", 0.5, progress)
        assert criterion(z, data, return_terms=True)[1]["lambda"].item() == pytest.approx(expected)


def test_a_backward_pass_after_set_progress_is_that_of_its_own_step(backend: str) -> None:
    criterion, data = make(backend, schedule=LambdaSchedule("linear")), metadata(IMAGES)
    z = embeddings(2, IMAGES, DIM)
    expected = torch.autograd.grad(copy.deepcopy(criterion)(z, data), z)[0]
    loss = criterion(z, data)
    criterion.set_progress(0.1)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected, **EXACT)


# --- missing metadata


def missing_data() -> dict[str, Tensor]:
    return {
        "cell_line": torch.full((IMAGES,), -1),
        "plate": torch.full((IMAGES,), -1),
        "exposure": torch.full((IMAGES, 2), NAN),
        "depth": torch.full((IMAGES,), NAN),
    }


@pytest.mark.parametrize("balance", [False, True])
def test_all_missing_gives_zero_with_zero_gradients(backend: str, balance: bool) -> None:
    criterion = make(backend, contrastive=None, balance=balance)
    before = copy.deepcopy(criterion.state_dict())
    z = embeddings(2, IMAGES, DIM)
    loss, terms = criterion(z, missing_data(), return_terms=True)
    loss.backward()
    assert loss.item() == 0
    assert all(value == 0 for name, value in terms.items() if name != "lambda")
    assert not z.grad.any()
    for parameter in criterion.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("gone", ["cell_line", "plate", "exposure", "depth"])
def test_one_factor_all_missing(backend: str, gone: str) -> None:
    criterion = make(backend)
    data = metadata(IMAGES) | {gone: missing_data()[gone]}
    banks, z = fill(criterion), embeddings(2, IMAGES, DIM)
    loss, terms = criterion(z, data, return_terms=True)
    assert_step(criterion, loss, terms, expect(criterion, z, data, banks), z)
    assert terms[gone] == 0


def test_an_empty_bank_gives_zero_and_fills(backend: str) -> None:
    criterion = FinoLoss(DIM, [Categorical("p", 4)], contrastive=None, backend=backend).double()
    z, y = embeddings(2, 4, DIM), torch.tensor([0, 2, 2, -1])
    loss, terms = criterion(z, {"p": y}, return_terms=True)
    loss.backward()
    assert loss.item() == terms["p"].item() == terms["p/accuracy"].item() == 0
    assert not z.grad.any()
    assert criterion.heads["p"].counts.tolist() == [2, 0, 4, 0]
    assert criterion(z, {"p": y}, return_terms=True)[1]["p"] > 0


# --- terms


def test_accuracy_and_mse_are_over_valid_rows(backend: str) -> None:
    criterion = make(backend, contrastive=None)
    data, z = metadata(IMAGES), embeddings(2, IMAGES, DIM)
    rows = z.detach().flatten(0, 1)
    head, bank = criterion.heads["cell_line"], criterion.heads["plate"]
    linear = (rows @ head.weight.T + head.bias).argmax(1)
    seen = bank.counts > 0
    cosine = torch.nn.functional.normalize(rows) @ bank.centroids.T
    nearest = cosine.masked_fill(~seen, -9).argmax(1)
    y, plate = data["cell_line"].repeat(2), data["plate"].repeat(2)
    takes_part = (plate >= 0) & seen[plate.clamp_min(0)]
    _, terms = criterion(z, data, return_terms=True)
    assert (~seen).any()
    expected = (linear == y)[y >= 0].double().mean()
    torch.testing.assert_close(terms["cell_line/accuracy"], expected, **EXACT)
    expected = (nearest == plate)[takes_part].double().mean()
    torch.testing.assert_close(terms["plate/accuracy"], expected, **EXACT)
    for name in ("exposure", "depth"):
        torch.testing.assert_close(terms[f"{name}/mse"], terms[name], **EXACT)


def test_terms_are_detached_scalars_and_the_loss_is_the_same_without_them(backend: str) -> None:
    criterion, data, z = make(backend).eval(), metadata(IMAGES), embeddings(2, IMAGES, DIM)
    loss, terms = criterion(z, data, return_terms=True)
    assert loss.shape == ()
    assert loss.requires_grad
    for value in terms.values():
        assert value.shape == ()
        assert not value.requires_grad
    assert torch.equal(criterion(z, data), loss)
    weights = {factor.name: factor for factor in criterion.factors}
    total = terms["contrastive"] + sum(
        factor.weight * terms[name] + factor.orthogonal * terms.get(f"{name}/orthogonal", 0)
        for name, factor in weights.items()
    )
    torch.testing.assert_close(loss, total, **EXACT)


def test_terms_do_not_change_with_the_next_step(backend: str) -> None:
    criterion, data = make(backend, schedule=LambdaSchedule("linear")), metadata(IMAGES)
    _, terms = criterion(embeddings(2, IMAGES, DIM), data, return_terms=True)
    before = {name: value.clone() for name, value in terms.items()}
    criterion.set_progress(0.2)
    criterion(embeddings(2, IMAGES, DIM, seed=1), data)
    assert all(torch.equal(terms[name], value) for name, value in before.items())


class NoReading(TorchDispatchMode):
    """Raises where the host asks for a value of a tensor, or for a shape that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = torch.Tag.data_dependent_output in func.tags
        if torch.Tag.dynamic_output_shape in func.tags:
            # Indexing has a shape that depends on values only where the index is a mask.
            by_number = func is torch.ops.aten.index.Tensor and all(
                index is None or index.dtype == torch.int64 for index in args[1]
            )
            waits = waits or not by_number
        if waits:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def test_the_step_never_waits_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "values_of", lambda factor, value: None)  # as on a GPU
    criterion = make("eager", balance=True, contrastive=InfoNCE(learnable=True))
    z, data = embeddings(2, IMAGES, DIM), metadata(IMAGES)
    with NoReading():
        criterion.set_progress(0.5)
        loss, _ = criterion(z, data, return_terms=True)
        loss.backward()
        with pytest.raises(AssertionError, match="wait"):
            loss.item()


@FAKE_CUDA
@pytest.mark.parametrize("validate", [False, True])
def test_values_are_checked_on_a_gpu_only_when_asked(validate: bool) -> None:
    """On a fake CUDA device, where any read of a value raises; shapes are always checked."""
    with FakeTensorMode(), torch.device("cuda"):
        criterion = FinoLoss(DIM, factors(), backend="eager", validate=validate)
        z = torch.randn(2, IMAGES, DIM, requires_grad=True)
        data = {
            "cell_line": torch.zeros(IMAGES, dtype=torch.int64),
            "plate": torch.zeros(IMAGES, dtype=torch.int64),
            "exposure": torch.zeros(IMAGES, 2),
            "depth": torch.zeros(IMAGES),
        }
        if validate:
            with pytest.raises(DataDependentOutputException):
                criterion(z, data)
        else:
            assert criterion(z, data).device.type == "cuda"
        with pytest.raises(ValueError, match="'depth'"):
            criterion(z, data | {"depth": torch.zeros(IMAGES + 1)})


# --- banks and state over steps


@pytest.mark.parametrize("concentration", ["fixed", "ema"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_several_steps(backend: str, concentration: str, with_teacher: bool) -> None:
    """Loss, gradients and bank, step after step: the loss sees the bank of the step before."""
    factor = Categorical(
        "p", 6, role="suppress", weight=0.5, temperature=0.25, momentum=0.75,
        concentration=concentration,
    )  # fmt: skip
    criterion = FinoLoss(DIM, [factor], contrastive=None, backend=backend).double()
    head, bank = criterion.heads["p"], bank_of(factor, DIM)
    for step in range(5):
        z, y = embeddings(2, 9, DIM, seed=step), labels(9, min(step + 2, 6), missing=step)
        teacher = embeddings(3, 9, DIM, seed=50 + step) if with_teacher else None
        loss, terms = criterion(z, {"p": y}, teacher=teacher, return_terms=True)
        expected = expect(criterion, z, {"p": y}, {"p": bank})
        # The buffers have moved; the backward pass is that of the bank the loss saw.
        assert_step(criterion, loss, terms, expected, z)
        assert teacher is None or teacher.grad is None
        bank.update(z if teacher is None else teacher, y.tolist())
        torch.testing.assert_close(head.centroids, torch.stack(bank.centroids), **EXACT)
        phi = torch.tensor(bank.temperatures, dtype=torch.float64)
        torch.testing.assert_close(head.temperatures, phi, **EXACT)
        assert head.counts.tolist() == bank.counts


def test_evaluation_leaves_the_state_alone(backend: str) -> None:
    criterion = make(backend, balance=True).eval()
    before = copy.deepcopy(criterion.state_dict())
    criterion(embeddings(2, IMAGES, DIM), metadata(IMAGES)).backward()
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_update_without_a_gradient_too(backend: str) -> None:
    criterion, data = make(backend, balance=True), metadata(IMAGES)
    other = copy.deepcopy(criterion)
    with torch.no_grad():
        quiet = criterion(embeddings(2, IMAGES, DIM).detach(), data)
    torch.testing.assert_close(quiet, other(embeddings(2, IMAGES, DIM), data).detach(), **EXACT)
    for ours, theirs in zip(criterion.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_state_round_trip(backend: str) -> None:
    trained = make(
        backend,
        balance=True,
        contrastive=InfoNCE(learnable=True),
        schedule=LambdaSchedule("linear"),
    )
    data = metadata(IMAGES)
    trained.set_progress(0.3)
    for step in range(3):
        trained(embeddings(2, IMAGES, DIM, seed=step), data)
    fresh = FinoLoss(
        DIM, factors(), contrastive=InfoNCE(learnable=True), schedule=LambdaSchedule("linear"),
        balance=True, backend=backend,
    ).double()  # fmt: skip
    assert fresh.load_state_dict(trained.state_dict()) == ([], [])
    z = embeddings(2, IMAGES, DIM, seed=9)
    for _ in range(2):
        assert torch.equal(fresh(z, data), trained(z, data))
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


# --- gradient balance


def test_balance_over_steps(backend: str) -> None:
    criterion = make(backend, contrastive=None, balance=True, schedule=LambdaSchedule("linear"))
    banks, data, running = fill(criterion), metadata(IMAGES), None
    criterion.set_progress(0.3)
    for step in range(4):
        z = (embeddings(2, IMAGES, DIM, seed=step) * (1 + step)).detach().requires_grad_()
        guides = expect(criterion, z, data, banks).guide_gradients
        running, scales = oracle.balance(running, [float(g.norm()) for g in guides.values()])
        loss, terms = criterion(z, data, return_terms=True)
        expected = expect(
            criterion, z, data, banks, guidance=0.3, scales=dict(zip(guides, scales, strict=True))
        )
        assert_step(criterion, loss, terms, expected, z)
        banks["plate"].update(z, data["plate"].tolist())
    assert max(scales) / min(scales) > 1.5


def test_balance_keeps_the_meaning_of_weights(backend: str) -> None:
    """Guides of one size after balancing: gradients to z are in the ratio of the weights."""
    chosen = [Categorical("a", 5, head="linear", weight=0.1), Continuous("b", weight=0.3, std=0.01)]
    sizes = []
    data = {"a": labels(IMAGES, 5), "b": values(IMAGES, 1)}
    for off in range(2):
        criterion = make(backend, factors=chosen, contrastive=None, balance=True)
        z = embeddings(1, IMAGES, DIM)
        criterion(z, data)
        norms = criterion.balance_norms
        scale = norms.log().mean().exp() / norms
        alone = [Categorical("a", 5, head="linear", weight=0.1 * (off == 0)),
                 Continuous("b", weight=0.3 * (off == 1), std=0.01)]  # fmt: skip
        other = make(backend, factors=alone, contrastive=None, balance=True)
        other.load_state_dict(criterion.state_dict())
        gradient = torch.autograd.grad(other.eval()(z, data), z)[0]
        sizes.append(float(gradient.norm()))
        assert scale.prod().item() == pytest.approx(1)
    assert sizes[1] / sizes[0] == pytest.approx(3)


def test_balance_measures_at_the_embedding_through_hidden_layers(backend: str) -> None:
    chosen = [
        Categorical("a", 5, head="linear", hidden=(7,), dropout=0.5),
        Continuous("b", role="suppress", activation="sigmoid"),
    ]
    data, z = {"a": labels(IMAGES, 5), "b": values(IMAGES, 1)}, embeddings(1, IMAGES, DIM)
    criterion = make(backend, factors=chosen, contrastive=None, balance=True)
    state = torch.get_rng_state()
    criterion(z, data)
    torch.set_rng_state(state)  # the same dropout mask
    head = criterion.heads["a"]
    loss = oracle.linear(head.hidden(z[0]), head.weight, head.bias, data["a"].tolist())
    expected = torch.autograd.grad(loss, z)[0].norm()
    torch.testing.assert_close(criterion.balance_norms[0], expected, **EXACT)


def test_a_guide_that_has_no_gradient_yet_is_left_out_of_the_balance(backend: str) -> None:
    """An empty prototype bank sends nothing in the first step: no division by zero."""
    criterion = FinoLoss(
        DIM,
        [Categorical("p", 4), Continuous("a"), Continuous("b", std=0.1)],
        contrastive=None, balance=True, backend=backend,
    ).double()  # fmt: skip
    y, a, b = labels(IMAGES, 4), values(IMAGES, 1), values(IMAGES, 1, seed=1)
    for step in range(3):
        z = embeddings(1, IMAGES, DIM, seed=step)
        loss = criterion(z, {"p": y, "a": a, "b": b})
        loss.backward()
        assert loss.isfinite()
        assert z.grad.isfinite().all()
        assert (criterion.balance_norms > 0).tolist() == [step > 0, True, True]


def test_balance_costs_no_backward_pass_a_guide(backend: str) -> None:
    """The norms come with the forward pass; autograd is not asked for them."""
    criterion, z = make(backend, contrastive=None, balance=True), embeddings(2, IMAGES, DIM)
    fired = []
    z.register_hook(lambda gradient: fired.append(gradient))
    loss = criterion(z, metadata(IMAGES))
    assert not fired
    loss.backward()
    assert len(fired) == 1


# --- precision


TOLERANCE = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (2e-3, 2e-2),
    torch.float16: (2e-3, 4e-3),
    torch.float64: (1e-9, 1e-9),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Heads in fp32 (fp64), rows in any precision: the loss is fp32 (fp64), near the oracle's."""
    criterion = FinoLoss(DIM, factors(), balance=False, backend=backend)
    if dtype == torch.float64:
        criterion.double()
    z = embeddings(2, 32, DIM).detach().to(dtype).requires_grad_()
    data, banks = metadata(32), fill(criterion)
    loss, terms = criterion(z, data, return_terms=True)
    loss.backward()
    expected = expect(criterion, z, data, banks)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    assert {value.dtype for value in terms.values()} == {wide}
    assert z.grad.dtype == dtype
    rtol, gradient_rtol = TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), expected.loss, rtol=rtol, atol=0)
    error = (z.grad.double() - expected.z_gradient).norm() / expected.z_gradient.norm()
    assert error < gradient_rtol
    for name, parameter in criterion.named_parameters():
        want = expected.parameter_gradients[name]
        assert (parameter.grad.double() - want).norm() <= gradient_rtol * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_in_fp32(backend: str, dtype: torch.dtype) -> None:
    """4,096 equal errors of 0.1: a sum in half precision would stop growing or overflow."""
    criterion = FinoLoss(1, [Continuous("y", weight=1.0)], contrastive=None, backend=backend)
    with torch.no_grad():
        criterion.heads["y"].weight.fill_(1.0)
        criterion.heads["y"].bias.zero_()
    z = torch.full((1, 4096, 1), 0.25, dtype=dtype, requires_grad=True)
    y = torch.zeros(4096)
    loss = criterion(z, {"y": y})
    loss.backward()
    assert loss.item() == pytest.approx(0.0625, rel=1e-6)
    assert criterion.heads["y"].weight.grad.item() == pytest.approx(2 * 0.25 * 0.25, rel=1e-6)


def test_fp32_metadata_beside_other_embeddings(backend: str) -> None:
    data = metadata(IMAGES)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        criterion = make(backend).float().eval()
        z = embeddings(2, IMAGES, DIM).detach().float()
        narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in narrow.items()}
        torch.testing.assert_close(criterion(z, narrow), criterion(z, wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    """Under autocast the loss is what it is without, for the rows that autocast made."""
    torch.manual_seed(0)
    backbone = torch.nn.Linear(5, DIM)
    chosen = [*factors(), Continuous("deep", hidden=(8, 4))]
    criterion = FinoLoss(DIM, chosen, contrastive=InfoNCE(learnable=True), backend=backend)
    data = metadata(IMAGES) | {"deep": values(IMAGES, 1)}
    x = torch.randn(2, IMAGES, 5)
    with torch.autocast("cpu", dtype):
        z = backbone(x)
        assert z.dtype == dtype
        fill(criterion)
        loss, terms = criterion(z, data, return_terms=True)
        assert torch.is_autocast_enabled("cpu")
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in criterion.parameters())
    assert backbone.weight.grad.isfinite().all()
    fill(criterion)
    _, outside = criterion(z.detach(), data, return_terms=True)
    for name, value in outside.items():
        if "deep" in name:  # its hidden layers do run in half precision
            torch.testing.assert_close(terms[name], value, rtol=0.05, atol=1e-3)
        else:
            torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-7)


def test_autocast_leaves_fp64_alone(backend: str) -> None:
    criterion = make(backend, factors=[Continuous("y", hidden=(4,))], contrastive=None)
    z, data = embeddings(1, IMAGES, DIM), {"y": values(IMAGES, 1)}
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(z, data)
        mixed = criterion.float()(z, data)
    outside = criterion.double()(z, data)
    assert inside.dtype == mixed.dtype == torch.float64
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mixed, outside, rtol=0.05, atol=1e-3)


def test_a_double_module_of_fp32_rows_returns_fp32(backend: str) -> None:
    criterion = make(backend, factors=[Continuous("y", hidden=(4,))], contrastive=None)
    loss, terms = criterion(embeddings(1, 5, DIM).float(), {"y": values(5, 1)}, return_terms=True)
    assert loss.dtype == torch.float32
    assert terms["y"].dtype == torch.float32


# --- inputs


def test_embeddings_as_a_sequence(backend: str) -> None:
    criterion, data = make(backend).eval(), metadata(IMAGES)
    z = embeddings(2, IMAGES, DIM)
    expected = criterion(z, data, projections=z, teacher=z)
    for kind in (list, tuple):
        views = kind(view.detach().requires_grad_() for view in z)
        loss = criterion(views, data, projections=views, teacher=views)
        torch.testing.assert_close(loss, expected, **EXACT)
        loss.backward()
        gradient = torch.autograd.grad(criterion(z, data), z)[0]
        torch.testing.assert_close(torch.stack([v.grad for v in views]), gradient, **EXACT)


def test_strided_and_expanded_inputs(backend: str) -> None:
    criterion, data = make(backend).eval(), metadata(IMAGES)
    z = embeddings(2, IMAGES, DIM).detach()
    expected = criterion(z, data)
    transposed = z.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    assert not transposed.is_contiguous()
    strided = {name: torch.stack([value, value], 1)[:, 0] for name, value in data.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    loss = criterion(transposed, strided)
    torch.testing.assert_close(loss, expected, **EXACT)
    gradient = torch.autograd.grad(loss, transposed)[0]
    z.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(criterion(z, data), z)[0], **EXACT)

    one = {
        "cell_line": torch.tensor(2).expand(IMAGES),
        "plate": torch.tensor([1]).expand(IMAGES),
        "exposure": torch.tensor([0.25, 0.5]).expand(IMAGES, 2),
        "depth": torch.tensor(0.5).expand(IMAGES),
    }
    row = z.detach()[:, :1].expand(2, IMAGES, DIM)
    dense = criterion(row.clone(), {name: value.clone() for name, value in one.items()})
    torch.testing.assert_close(criterion(row, one), dense, **EXACT)


def test_a_single_value_may_be_a_column_or_not(backend: str) -> None:
    criterion = make(backend, factors=[Continuous("y", orthogonal=1.0)]).eval()
    z, y = embeddings(2, IMAGES, DIM), values(IMAGES, 1, missing=2)
    assert torch.equal(criterion(z, {"y": y}), criterion(z, {"y": y[:, 0]}))


def test_extra_keys_are_ignored(backend: str) -> None:
    criterion, data, z = make(backend).eval(), metadata(IMAGES), embeddings(2, IMAGES, DIM)
    extra = data | {"comment": "a string", "image_id": torch.arange(3), 7: None}
    assert torch.equal(criterion(z, extra), criterion(z, data))


def test_nothing_given_is_changed(backend: str) -> None:
    criterion, data, z = make(backend), metadata(IMAGES), embeddings(2, IMAGES, DIM)
    teacher = embeddings(2, IMAGES, DIM, seed=4)
    before = [value.detach().clone() for value in (*data.values(), z, teacher)]
    criterion(z, data, teacher=teacher).backward()
    for now, then in zip((*data.values(), z, teacher), before, strict=True):
        torch.testing.assert_close(now.detach(), then, rtol=0, atol=0, equal_nan=True)


def test_contrastive_alone(backend: str) -> None:
    criterion, z = FinoLoss(DIM, backend=backend), embeddings(2, IMAGES, DIM)
    loss, terms = criterion(z, {}, return_terms=True)
    torch.testing.assert_close(loss, oracle.info_nce(z, 0.1), **EXACT)
    assert set(terms) == {"contrastive", "lambda"}


# --- autograd habits


def test_backward_twice_with_a_retained_graph(backend: str) -> None:
    criterion = make(backend, balance=True, contrastive=InfoNCE(learnable=True))
    z, data = embeddings(2, IMAGES, DIM), metadata(IMAGES)
    loss = criterion(z, data)
    inputs = [z, *criterion.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_upstream_gradient_scales_everything(backend: str) -> None:
    criterion = make(backend, contrastive=InfoNCE(learnable=True)).eval()
    z, data = embeddings(2, IMAGES, DIM), metadata(IMAGES)
    inputs = [z, *criterion.parameters()]
    plain = torch.autograd.grad(criterion(z, data), inputs)
    scaled = torch.autograd.grad(criterion(z, data) * 1024, inputs)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b, 1024 * a, **EXACT)


def test_gradient_accumulation(backend: str) -> None:
    """Two losses, then one backward pass: the sum of two steps taken singly."""
    data, steps = metadata(IMAGES), [embeddings(2, IMAGES, DIM, seed=s) for s in (1, 2)]
    arguments = {"balance": True, "contrastive": InfoNCE(learnable=True)}
    one, two = make(backend, **arguments), make(backend, **arguments)
    sum(one(z, data) for z in steps).backward()
    together = [z.grad.clone() for z in steps]
    for z, expected in zip(steps, together, strict=True):
        z.grad = None
        two(z, data).backward()
        torch.testing.assert_close(z.grad, expected, **EXACT)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


def test_a_learnable_projector_in_front(backend: str) -> None:
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(DIM, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    projector.double()
    criterion, data = make(backend, factors=[]), {}
    z = embeddings(2, IMAGES, DIM)
    criterion(z, data, projections=projector(z)).backward()
    mine = [z.grad, *(p.grad.clone() for p in projector.parameters())]
    leaf = z.detach().requires_grad_()
    theirs = torch.autograd.grad(
        oracle.info_nce(projector(leaf), 0.1), [leaf, *projector.parameters()]
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_frozen_heads_and_frozen_rows(backend: str) -> None:
    """Only what requires a gradient gets one, and the value does not depend on it."""
    criterion, data, z = make(backend).eval(), metadata(IMAGES), embeddings(2, IMAGES, DIM)
    loss = criterion(z, data)
    criterion(z.detach(), data).backward()
    assert all(p.grad is not None for p in criterion.parameters())
    assert z.grad is None
    expected = torch.autograd.grad(loss, z)[0]
    criterion.requires_grad_(False)
    frozen = criterion(z, data)
    torch.testing.assert_close(torch.autograd.grad(frozen, z)[0], expected, **EXACT)
    assert not criterion(z.detach(), data).requires_grad


def test_the_same_input_gives_the_same_bits(backend: str) -> None:
    results = []
    for _ in range(2):
        criterion, z = make(backend, balance=True), embeddings(2, IMAGES, DIM)
        loss = criterion(z, metadata(IMAGES))
        results.append([loss, *torch.autograd.grad(loss, [z, *criterion.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- reference


def test_reference_is_the_same_objective(backend: str) -> None:
    contrastive = InfoNCE(0.2)
    criterion = make(backend, contrastive=contrastive, contrastive_weight=0.7).eval()
    heads = {}
    for name, head in criterion.heads.items():
        heads[name] = {key: value.detach().clone() for key, value in head.state_dict().items()}
        for key, _ in head.named_parameters():
            heads[name][key].requires_grad_()
    data, p = metadata(IMAGES), embeddings(2, IMAGES, 3, seed=5)
    z, leaf = embeddings(2, IMAGES, DIM), embeddings(2, IMAGES, DIM)
    criterion.schedule = LambdaSchedule("linear")
    criterion.set_progress(0.4)
    loss, terms = criterion(z, data, projections=p, return_terms=True)
    expected, expected_terms = reference.fino_loss(
        leaf, data, criterion.factors, heads, contrastive=contrastive, contrastive_weight=0.7,
        projections=p, guidance=0.4,
    )  # fmt: skip
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(z.grad, leaf.grad, **EXACT)
    for name, value in expected_terms.items():
        torch.testing.assert_close(terms[name], value.detach(), **EXACT)
    for name, head in criterion.heads.items():
        for key, parameter in head.named_parameters():
            torch.testing.assert_close(parameter.grad, heads[name][key].grad, **EXACT)


def test_reference_scales_the_guides() -> None:
    criterion = make("eager", contrastive=None).eval()
    heads = {name: head.state_dict() for name, head in criterion.heads.items()}
    scales = {"cell_line": 2.0, "plate": 0.5, "exposure": 1.0, "depth": 3.0}
    banks, data, z = fill(criterion), metadata(IMAGES), embeddings(2, IMAGES, DIM)
    heads["plate"] = criterion.heads["plate"].state_dict()
    loss, _ = reference.fino_loss(z, data, criterion.factors, heads, guide_scales=scales)
    expected = expect(criterion, z, data, banks, scales=scales)
    torch.testing.assert_close(loss.detach(), expected.loss, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected.z_gradient, **EXACT)


# --- the public door


def test_signature() -> None:
    parameters = inspect.signature(FinoLoss).parameters
    assert {n: p.default for n, p in parameters.items() if p.default is not p.empty} == {
        "factors": (),
        "contrastive": InfoNCE(0.1),
        "contrastive_weight": 1.0,
        "schedule": LambdaSchedule("sigmoid", warmup=0.0),
        "balance": False,
        "backend": "auto",
        "validate": False,
        "deterministic": False,
    }
    assert next(iter(parameters)) == "dim"


def test_the_example_of_the_documentation() -> None:
    criterion = FinoLoss(
        dim=768,
        factors=[
            Categorical("cell_line", 35, role="preserve", head="linear", weight=0.03,
                        orthogonal=0.01, label_smoothing=0.0, hidden=(), dropout=0.0),
            Categorical("plate", 5000, role="suppress", head="prototype", weight=0.03,
                        temperature=0.023, momentum=0.99, concentration="fixed", orthogonal=0.1),
            Continuous("exposure", 1, role="suppress", weight=0.03, low=0.0, high=2.0,
                       activation="sigmoid", hidden=(512, 512, 256), dropout=0.5),
        ],
        contrastive=InfoNCE(temperature=0.1),
        contrastive_weight=1.0,
        schedule=LambdaSchedule("sigmoid", warmup=0.0),
        balance=False,
        backend="auto",
    )  # fmt: skip
    z = torch.randn(2, 8, 768, requires_grad=True)
    data = {
        "cell_line": torch.randint(35, (8,)),
        "plate": torch.randint(5000, (8,)),
        "exposure": 2 * torch.rand(8),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "auto" may tell that it runs eager
        loss, terms = criterion(
            z, data, projections=torch.randn(2, 8, 128), teacher=torch.randn(3, 8, 768),
            return_terms=True,
        )  # fmt: skip
    loss.backward()
    assert z.grad.isfinite().all()
    assert set(terms) == {
        "contrastive", "lambda", "cell_line", "cell_line/orthogonal", "cell_line/accuracy",
        "plate", "plate/orthogonal", "plate/accuracy", "exposure", "exposure/mse",
    }  # fmt: skip
    assert criterion.heads["plate"].counts.sum() == 3 * 8
