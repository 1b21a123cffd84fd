"""Continuous metadata that differ from view to view.

Without a contrastive term nothing ties the views of an image together, so V views of B images with
values of their own are V·B images of one view: that is what the oracle is asked about.
"""

import pytest
import torch
from loss_case import NAN, embeddings, expect, labels, values
from torch import Tensor

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, reference

VIEWS, IMAGES, DIM = 3, 7, 5
EXACT = {"rtol": 1e-9, "atol": 1e-11}
FACTORS = [
    Continuous("scale", 1, orthogonal=0.3, mean=0.4, std=0.3),
    Continuous(
        "shift", 2, role="suppress", orthogonal=0.2, activation="tanh", low=(-1, 0), high=(2, 1)
    ),
    Categorical("line", 4, head="linear", orthogonal=0.1),
]


def metadata() -> dict[str, Tensor]:
    return {
        "scale": values(VIEWS * IMAGES, 1, missing=4, seed=1).view(VIEWS, IMAGES),
        "shift": values(VIEWS * IMAGES, 2, missing=5, seed=2).view(VIEWS, IMAGES, 2),
        "line": labels(IMAGES, 4, missing=1, seed=3),
    }


def flat(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of V·B images of one view."""
    return {
        "scale": data["scale"].flatten(),
        "shift": data["shift"].flatten(0, 1),
        "line": data["line"].repeat(VIEWS),
    }


def criterion(backend: str, **arguments: object) -> FinoLoss:
    torch.manual_seed(0)
    arguments = {"contrastive": None} | arguments
    return FinoLoss(DIM, FACTORS, backend=backend, **arguments).double()


def test_against_the_oracle(backend: str) -> None:
    loss_of, data, z = criterion(backend), metadata(), embeddings(VIEWS, IMAGES, DIM)
    loss, terms = loss_of(z, data, return_terms=True)
    loss.backward()
    expected = expect(loss_of, z.detach().reshape(1, -1, DIM), flat(data), {})
    torch.testing.assert_close(loss.detach(), expected.loss, **EXACT)
    for name, value in expected.terms.items():
        torch.testing.assert_close(terms[name], value, **EXACT)
    torch.testing.assert_close(z.grad.reshape(1, -1, DIM), expected.z_gradient, **EXACT)
    for name, gradient in expected.parameter_gradients.items():
        torch.testing.assert_close(loss_of.get_parameter(name).grad, gradient, **EXACT)


def test_the_reference_says_the_same() -> None:
    loss_of, data, z = criterion("eager"), metadata(), embeddings(VIEWS, IMAGES, DIM).detach()
    heads = {
        name: {"weight": head.weight, "bias": head.bias} for name, head in loss_of.heads.items()
    }
    whole, terms = reference.fino_loss(z, data, FACTORS, heads)
    loss, found = loss_of(z, data, return_terms=True)
    torch.testing.assert_close(whole, loss, **EXACT)
    for name, value in terms.items():
        torch.testing.assert_close(found[name], value.detach(), **EXACT)


@pytest.mark.parametrize("images", [1, 3, IMAGES])
def test_equal_views_are_one_value_an_image(backend: str, images: int) -> None:
    """Also where V = B, and with a contrastive term."""
    loss_of = criterion(backend, contrastive=InfoNCE())
    z = embeddings(VIEWS, images, DIM).detach()
    one = {
        "scale": values(images, 1, seed=4)[:, 0],
        "shift": values(images, 2, seed=5),
        "line": labels(images, 4, seed=6),
    }
    each = one | {name: one[name].expand(VIEWS, *one[name].shape) for name in ("scale", "shift")}
    column = one | {"scale": one["scale"][:, None]}
    expected = loss_of(z, one)
    assert torch.equal(loss_of(z, each), expected)
    assert torch.equal(loss_of(z, column), expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", torch.zeros(VIEWS + 1, IMAGES), r"'scale'.*\[3, 7\].*7 images.*found \[4, 7\]"),
        ("shift", torch.zeros(VIEWS, IMAGES), r"'shift'.*\[3, 7, 2\].*found \[3, 7\]"),
        ("shift", torch.zeros(VIEWS, IMAGES, 3), r"'shift'.*found \[3, 7, 3\]"),
        ("line", torch.zeros(VIEWS, IMAGES, dtype=torch.int64), r"'line'.*found \[3, 7\]"),
    ],
)
def test_wrong_shapes_are_named(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criterion("eager")(embeddings(VIEWS, IMAGES, DIM), metadata() | {name: value})


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_an_infinite_value_is_named_by_its_row(name: str) -> None:
    data = metadata()
    data[name] = torch.full_like(data[name], NAN)
    data[name][2, 5] = float("inf")
    with pytest.raises(ValueError, match=rf"'{name}'.*row {2 * IMAGES + 5} has \[inf"):
        criterion("eager")(embeddings(VIEWS, IMAGES, DIM), data)
