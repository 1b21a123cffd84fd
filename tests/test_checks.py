"""Every wrong call of the loss is an error that says what is wrong, and changes nothing."""

import copy
import math

import pytest
import torch
from loss_case import NAN, embeddings, factors, metadata
from torch import Tensor

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE
from fino_fast.backends import BackendUnavailableError

IMAGES, DIM = 6, 4


def criterion(**arguments: object) -> FinoLoss:
    return FinoLoss(DIM, **({"factors": factors(), "backend": "eager"} | arguments))


def changed(name: str, row: int | tuple[int, ...], value: float) -> dict[str, Tensor]:
    data = metadata(IMAGES)
    data[name] = data[name].clone()
    data[name][row] = value
    return data


def without(name: str) -> dict[str, Tensor]:
    data = metadata(IMAGES)
    del data[name]
    return data


def replaced(name: str, value: object) -> dict[str, Tensor]:
    return metadata(IMAGES) | {name: value}  # type: ignore[return-value, dict-item]


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


BAD_METADATA = {
    "missing key": (without("plate"), "'plate'.*missing.*cell_line.*exposure"),
    "short": (replaced("plate", codes(IMAGES - 1)), r"'plate'.*\[6\].*\[5\]"),
    "rows, not images": (replaced("plate", codes(2 * IMAGES)), r"'plate'.*\[12\]"),
    "two-dimensional categories": (replaced("plate", codes(IMAGES, 1)), r"'plate'.*\[6, 1\]"),
    "wrong width": (
        replaced("exposure", torch.zeros(IMAGES, 3)), r"'exposure'.*\[6, 2\].*\[6, 3\]"),
    "flat, of width two": (
        replaced("exposure", torch.zeros(IMAGES)), r"'exposure'.*\[6, 2\].*\[6\]"),
    "short values": (replaced("depth", torch.zeros(IMAGES + 1)), r"'depth'.*\[7\]"),
    "a 0-d value": (replaced("depth", torch.tensor(1.0)), r"'depth'.*\[\]"),
    "float categories": (replaced("plate", torch.zeros(IMAGES)), "'plate'.*int64.*float32"),
    "int32 categories": (
        replaced("plate", torch.zeros(IMAGES, dtype=torch.int32)), "'plate'.*int64.*int32"),
    "bool categories": (
        replaced("plate", torch.zeros(IMAGES, dtype=torch.bool)), "'plate'.*int64.*bool"),
    "integer values": (replaced("depth", codes(IMAGES)), "'depth'.*float.*int64"),
    "complex values": (
        replaced("depth", torch.zeros(IMAGES, dtype=torch.complex64)), "'depth'.*complex64"),
    "a list": (replaced("plate", [0] * IMAGES), "'plate'.*tensor.*list"),
    "None": (replaced("depth", None), "'depth'.*tensor.*NoneType"),
    "category K": (changed("plate", 3, 7), "'plate'.*6.*row 3.*7"),
    "category −2": (changed("cell_line", 5, -2), "'cell_line'.*row 5.*-2"),
    "infinite": (changed("depth", 2, math.inf), "'depth'.*finite.*row 2.*inf"),
    "minus infinite": (changed("exposure", (4, 1), -math.inf), "'exposure'.*row 4.*-inf"),
    "another device": (replaced("depth", torch.zeros(IMAGES, device="meta")), "'depth'.*meta.*cpu"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_METADATA)
def test_bad_metadata_names_the_factor_and_the_fault(backend: str, fault: str) -> None:
    data, message = BAD_METADATA[fault]
    loss = criterion(backend=backend, balance=True)
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(ValueError, match=message):
        loss(embeddings(2, IMAGES, DIM), data)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name


BAD_EMBEDDINGS = {
    "one view without the view axis": (torch.zeros(IMAGES, DIM), r"V, B, D=4.*\[6, 4\]"),
    "four axes": (torch.zeros(1, 2, IMAGES, DIM), "V, B, D=4"),
    "wrong width": (torch.zeros(2, IMAGES, DIM + 1), r"D=4.*\[2, 6, 5\]"),
    "no view": (torch.zeros(0, IMAGES, DIM), r"\[0, 6, 4\]"),
    "no image": (torch.zeros(2, 0, DIM), r"\[2, 0, 4\]"),
    "integers": (torch.zeros(2, IMAGES, DIM, dtype=torch.int64), "floating.*int64"),
    "one view": (torch.zeros(1, IMAGES, DIM), "two or more views.*V=1"),
    "no tensor": ("rows", "str"),
    "an empty sequence": ([], "sequence"),
    "a sequence of lists": ([[0.0]], "sequence"),
    "views of two sizes": ([torch.zeros(IMAGES, DIM), torch.zeros(5, DIM)], r"differ.*\[5, 4\]"),
    "views of two dtypes": (
        [torch.zeros(IMAGES, DIM), torch.zeros(IMAGES, DIM).half()], "differ.*float16"),
    "views with a view axis": ([torch.zeros(1, IMAGES, DIM)] * 2, r"\[2, 1, 6, 4\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_EMBEDDINGS)
def test_bad_embeddings(backend: str, fault: str) -> None:
    value, message = BAD_EMBEDDINGS[fault]
    with pytest.raises(ValueError, match=message):
        criterion(backend=backend)(value, metadata(IMAGES))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("projections", torch.zeros(3, IMAGES, 2)),
        ("projections", torch.zeros(2, IMAGES + 1, 2)),
        ("projections", torch.zeros(2 * IMAGES, 2)),
        ("projections", torch.zeros(2, IMAGES, 0)),
        ("projections", torch.zeros(2, IMAGES, 2, dtype=torch.int64)),
        ("projections", [torch.zeros(IMAGES, 2), torch.zeros(IMAGES, 3)]),
        ("teacher", torch.zeros(2, IMAGES, DIM + 1)),
        ("teacher", torch.zeros(2, IMAGES - 1, DIM)),
        ("teacher", torch.zeros(IMAGES, DIM)),
        ("teacher", 3),
    ],
)
def test_bad_projections_and_teachers(backend: str, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        criterion(backend=backend)(embeddings(2, IMAGES, DIM), metadata(IMAGES), **{name: value})


def test_two_towers_need_two_views(backend: str) -> None:
    loss = criterion(backend=backend, contrastive=InfoNCE(two_tower=True))
    with pytest.raises(ValueError, match=r"two_tower.*2 views.*V=3"):
        loss(embeddings(3, IMAGES, DIM), metadata(IMAGES))


def test_nan_is_missing_and_no_error(backend: str) -> None:
    data = changed("depth", 2, NAN)
    assert criterion(backend=backend)(embeddings(2, IMAGES, DIM), data).isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim.*0"),
        ({"dim": 4.0}, "dim.*4.0"),
        ({"factors": [Categorical("a", 2), Continuous("a")]}, "'a'"),
        ({"factors": ["plate"]}, "factors.*str"),
        ({"factors": [Categorical("contrastive", 2)]}, "'contrastive'"),
        ({"factors": [Categorical("lambda", 2)]}, "'lambda'"),
        ({"factors": [Categorical("a", 2), Categorical("a/accuracy", 2)]}, "a/accuracy"),
        ({"factors": [], "contrastive": None}, "nothing to compute"),
        ({"contrastive_weight": -1.0}, "contrastive_weight"),
        ({"contrastive_weight": math.nan}, "contrastive_weight"),
        ({"balance": True, "factors": [Categorical("a", 2)]}, "balance.*two"),
        ({"balance": True, "factors": []}, "balance.*two"),
        ({"backend": "cuda"}, "backend.*auto.*native.*triton.*eager.*'cuda'"),
    ],
)
def test_senseless_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinoLoss(**({"dim": DIM, "factors": factors()} | arguments))  # type: ignore[arg-type]


def test_a_backend_asked_for_by_name_is_never_replaced_silently() -> None:
    with pytest.raises(BackendUnavailableError, match="'triton' serves cuda"):
        criterion(backend="triton")(embeddings(2, IMAGES, DIM), metadata(IMAGES))
