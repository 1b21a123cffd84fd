"""From schema and overrides to the loss's factors."""

from typing import Any

import pyarrow as pa
import pytest

from fino_fast import Categorical, Continuous, FinoLoss
from fino_fast.data.declaration import Declaration
from fino_fast.data.freezing import SchemaBuilder
from fino_fast.data.schema import Schema
from fino_fast.errors import ConfigError
from fino_fast.train.config import FactorOverride, TrainConfig
from fino_fast.train.factors import build_factors


@pytest.fixture(scope="module")
def schema() -> Schema:
    declaration = Declaration.checked(
        {
            "factors": {
                "camera": {"kind": "categorical", "role": "suppress"},
                "exposure": {"kind": "continuous", "role": "suppress"},
                "depth": {"kind": "continuous", "role": "preserve", "columns": ["x", "y"]},
                "hour": {"kind": "cyclic", "role": "preserve", "period": 24},
                "stains": {"kind": "multi", "role": "preserve"},
                "defect": {"kind": "categorical", "role": "ignore"},
                "site": {"kind": "continuous", "role": "ignore"},
            }
        },
        "test",
    )
    raw = {
        "camera": pa.array(["b", "a", "b", None]),
        "exposure": pa.array([0.5, 1.0, 1.5, None]),
        "depth": pa.array(
            [[0.0, 10.0], [2.0, 20.0], [4.0, 60.0], [2.0, 30.0]], pa.list_(pa.float64(), 2)
        ),
        "hour": pa.array([0.0, 6.0, 12.0, 18.0]),
        "stains": pa.array([["dapi"], ["dapi", "actin"], [], None]),
        "defect": pa.array(["no", "yes", "no", "no"]),
        "site": pa.array([1.0, 1.0, 1.0, 1.0]),
    }
    builder = SchemaBuilder(declaration, previous=None)
    builder.add(raw, splits=pa.array(["adapt"] * 4), fresh=pa.array([True] * 4))
    return builder.schema()


def build(schema: Schema, **overrides: dict[str, Any]) -> dict[str, Categorical | Continuous]:
    read = {name: FactorOverride.checked(override, name) for name, override in overrides.items()}
    return {factor.name: factor for factor in build_factors(schema, read)}


def test_the_schema_alone(schema: Schema) -> None:
    factors = build(schema)
    assert list(factors) == ["camera", "exposure", "depth", "hour", "stains"]
    assert factors["camera"] == Categorical("camera", 2, role="suppress")
    assert factors["exposure"] == Continuous(
        "exposure", 1, role="suppress", activation="sigmoid", low=[0.5], high=[1.5]
    )
    depth = schema.factors["depth"]
    assert depth.mean == [2, 30]
    assert factors["depth"] == Continuous("depth", 2, mean=depth.mean, std=depth.std)
    assert factors["hour"] == Continuous("hour", 2, activation="tanh", low=[-1, -1], high=[1, 1])
    assert factors["stains"] == Continuous(
        "stains", 2, activation="sigmoid", low=[0, 0], high=[1, 1]
    )
    FinoLoss(8, list(factors.values()))


def test_overrides(schema: Schema) -> None:
    factors = build(
        schema,
        camera={"role": "preserve", "head": "linear", "hidden": [16], "dropout": 0.5, "weight": 1},
        exposure={"activation": "tanh", "orthogonal": 0.1},
        depth={"role": "ignore"},
        defect={"role": "suppress", "temperature": 0.05, "concentration": "ema", "momentum": 0.9},
    )
    assert factors["camera"] == Categorical(
        "camera", 2, role="preserve", head="linear", hidden=(16,), dropout=0.5, weight=1
    )
    assert factors["exposure"] == Continuous(
        "exposure", role="suppress", activation="tanh", low=[0.5], high=[1.5], orthogonal=0.1
    )
    assert "depth" not in factors
    assert factors["defect"] == Categorical(
        "defect", 2, role="suppress", temperature=0.05, concentration="ema", momentum=0.9
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"camra": {"weight": 1}}, r"factors\.camra: .*no such factor; it has camera, defect"),
        ({"defect": {"weight": 1}}, r"factors\.defect: .*role of 'defect' is ignore.*weight"),
        ({"exposure": {"head": "linear"}}, r"factors\.exposure: head does not apply to a cont"),
        (
            {"camera": {"activation": "tanh"}},
            r"factors\.camera: activation does not apply to a cat",
        ),
        ({"camera": {"hidden": [8]}}, r"factors\.camera: .*'camera'.*hidden.*head='linear'"),
        ({"exposure": {"activation": "identity"}}, r"factors\.exposure: .*unbounded"),
        ({"site": {"role": "preserve"}}, r"factors\.site: .*std must be a finite number > 0"),
        ({"site": {"role": "suppress"}}, r"factors\.site: .*high"),
    ],
)
def test_overrides_that_do_not_fit_name_the_factor(
    schema: Schema, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(schema, **overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"role": "supress"}, r"factors\.camera\.role: .*'preserve', 'suppress'.*'supress'"),
        ({"wieght": 1}, r"unknown key 'factors\.camera\.wieght'"),
        ({"weight": -1}, r"factors\.camera\.weight: .*found -1"),
        ({"weight": float("nan")}, r"factors\.camera\.weight"),
    ],
)
def test_unreadable_overrides_name_the_key(override: dict[str, Any], message: str) -> None:
    content = {
        "data": "shards",
        "output": "run",
        "backbone": {"name": "test_vit"},
        "factors": {"camera": override},
    }
    with pytest.raises(ConfigError, match=message):
        TrainConfig.checked(content, "config.yaml")
