"""The frozen schema: indices that never move, statistics equal to NumPy's, honest encodings."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fino_fast.data.declaration import Declaration
from fino_fast.data.files import write_json
from fino_fast.data.freezing import SchemaBuilder
from fino_fast.data.schema import Schema
from fino_fast.data.statistics import Moments
from fino_fast.errors import ConfigError, DataError


def frozen(
    factor: dict[str, Any],
    raw: pa.Array,
    splits: list[str] | None = None,
    previous: Schema | None = None,
    fresh: list[bool] | None = None,
) -> Schema:
    declaration = Declaration.model_validate({"factors": {"f": {"role": "preserve"} | factor}})
    names = pa.array(splits or ["adapt"] * len(raw))
    counts = pa.array(fresh or [True] * len(raw))
    schemas = []
    for piece in (len(raw) or 1, 1):
        builder = SchemaBuilder(declaration, previous)
        for start in range(0, len(raw), piece):
            part = raw.slice(start, piece)
            builder.add({"f": part}, names.slice(start, piece), counts.slice(start, piece))
        schemas.append(builder.schema())
    # The same, up to rounding, whether the rows come at once or one by one.
    whole, parts = ({**s.factors["f"].model_dump(), "moments": None} for s in schemas)
    assert whole == parts
    return schemas[0]


CATEGORY = {"kind": "categorical"}
NUMBER = {"kind": "continuous"}

VALUES = hnp.arrays(
    np.float64,
    st.tuples(st.integers(0, 20), st.just(2)),
    elements=st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)),
)


@given(parts=st.lists(VALUES, min_size=1, max_size=4))
def test_merged_moments_equal_those_of_all_values(parts: list[np.ndarray]) -> None:
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merged(Moments.of(part))
    for d in range(2):
        seen = np.concatenate([part[:, d] for part in parts])
        seen = seen[~np.isnan(seen)]
        assert merged.count[d] == len(seen)
        if len(seen):
            scale = np.abs(seen).max() + 1
            assert merged.mean[d] == pytest.approx(seen.mean(), rel=1e-12, abs=1e-12 * scale)
            assert merged.std[d] == pytest.approx(seen.std(), rel=1e-9, abs=1e-7 * scale)
            assert merged.minimum[d] == seen.min()
            assert merged.maximum[d] == seen.max()


def test_statistics_come_from_the_adaptation_split_alone() -> None:
    raw = pa.array([1.0, None, 4.0, 100.0])
    factor = frozen(NUMBER, raw, ["adapt", "adapt", "adapt", "test"]).factors["f"]
    assert (factor.mean, factor.std) == ([2.5], [1.5])
    assert (factor.low, factor.high) == ([1.0], [4.0])
    assert (factor.observed, factor.missing) == (2, 1)


def test_vocabulary_is_in_order_of_appearance_and_only_grows() -> None:
    first = frozen(CATEGORY, pa.array(["b", None, "a", "b"]))
    assert first.factors["f"].vocabulary == ["b", "a"]
    assert first.factors["f"].counts == [2, 1]
    second = frozen(CATEGORY, pa.array(["0", "a", "b"]), previous=first)
    assert second.factors["f"].vocabulary == ["b", "a", "0"]
    assert second.factors["f"].counts == [3, 2, 1]
    assert second.factors["f"].missing == 1


def test_declared_vocabulary_gives_the_indices() -> None:
    factor = frozen(CATEGORY | {"vocabulary": ["x", "y", "z"]}, pa.array(["z", "x"])).factors["f"]
    assert factor.vocabulary == ["x", "y", "z"]
    assert factor.encode(pa.array(["z", None, "x"])).tolist() == [2, -1, 0]


def test_rows_tried_again_do_not_count_twice() -> None:
    first = frozen(NUMBER, pa.array([1.0, 3.0]))
    second = frozen(NUMBER, pa.array([3.0, 5.0]), previous=first, fresh=[False, True])
    assert second.factors["f"].mean == [3.0]
    assert second.factors["f"].observed == 3


def test_unknown_value_is_an_error_or_counted() -> None:
    factor = frozen(CATEGORY, pa.array(["a", "b"])).factors["f"]
    later = pa.array(["b", "new", None, "new"])
    with pytest.raises(DataError, match=r"'new' \(2×\)"):
        factor.encode(later)
    assert factor.encode(later, strict=False).tolist() == [1, -1, -1, -1]
    assert factor.unknown_values(later) == {"new": 2}


def test_cyclic_values_are_sine_and_cosine() -> None:
    raw = pa.array([0.0, 6.0, 18.0, 30.0, None])
    encoded = frozen({"kind": "cyclic", "period": 24}, raw).factors["f"].encode(raw)
    expected = [[0, 1], [1, 0], [-1, 0], [1, 0]]
    np.testing.assert_allclose(encoded[:4], expected, atol=1e-6)
    assert np.isnan(encoded[4]).all()


def test_multi_values_are_indicators() -> None:
    raw = pa.array([["a", "b"], None, [], ["b"]], pa.list_(pa.string()))
    factor = frozen({"kind": "multi"}, raw).factors["f"]
    assert factor.width == 2
    np.testing.assert_array_equal(
        factor.encode(raw), [[1, 1], [math.nan, math.nan], [0, 0], [0, 1]]
    )
    np.testing.assert_allclose(factor.mean, [1 / 3, 2 / 3])
    np.testing.assert_allclose(factor.std, [math.sqrt(2) / 3, math.sqrt(2) / 3])


def test_several_numbers_keep_their_own_missing_entries() -> None:
    raw = pa.array([[1.0, None], [None, None], [3.0, 5.0], [2.0, 6.0]], pa.list_(pa.float64(), 2))
    factor = frozen({"kind": "continuous", "columns": ["x", "y"]}, raw).factors["f"]
    assert factor.mean == [2.0, 5.5]
    assert (factor.observed, factor.missing) == (3, 1)
    encoded = factor.encode(raw)
    assert encoded.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(encoded), [[0, 1], [1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("factor", "raw", "told"),
    [
        (NUMBER, pa.array([0.1, 0.1, 0.1]), "constant"),
        (NUMBER, pa.array([None, None], pa.float64()), "missing in every row"),
        (CATEGORY, pa.array([None, None], pa.string()), "missing in every row"),
        ({"kind": "cyclic", "period": 24}, pa.array([3.0, 3.0]), "constant"),
        (
            {"kind": "continuous", "columns": ["x", "y"]},
            pa.array([[1.0, None], [2.0, None]], pa.list_(pa.float64(), 2)),
            "a column without any value",
        ),
    ],
)
def test_a_factor_that_cannot_teach_is_an_error_unless_ignored(
    factor: dict[str, Any], raw: pa.Array, told: str
) -> None:
    with pytest.raises(DataError, match=f"factor 'f' .*{told}"):
        frozen(factor, raw)
    schema = frozen(factor | {"role": "ignore"}, raw)
    assert all(math.isfinite(v) for v in schema.factors["f"].std + schema.factors["f"].mean)


def test_no_row_of_the_adaptation_split() -> None:
    with pytest.raises(DataError, match="adaptation split 'adapt'; found 'train', 'test'"):
        frozen(CATEGORY, pa.array(["a", "b"]), ["train", "test"])


def test_json_round_trip_and_hash(tmp_path: Path) -> None:
    schema = frozen(NUMBER, pa.array([0.1, 0.2, 0.7]))
    digest = write_json(tmp_path / "schema.json", schema.content())
    again = Schema.read(tmp_path / "schema.json")
    assert again == schema
    assert digest == schema.hash == again.hash


@pytest.mark.parametrize(
    "change",
    [
        {"splits": ["other"]},
        {"splits": []},
        {"factors": {}},
        {"version": 2},
        {"surprise": 1},
    ],
)
def test_inconsistent_schema_file_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    content = frozen(CATEGORY, pa.array(["a", "b"])).content() | change
    (tmp_path / "schema.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"schema\.json"):
        Schema.read(tmp_path / "schema.json")


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        ({"kind": "categorical", "role": "supress"}, "role"),
        ({"kind": "category", "role": "suppress"}, "kind"),
        ({"kind": "cyclic", "role": "suppress"}, "period"),
        ({"kind": "continuous", "role": "suppress", "low": 1}, "both low and high"),
        ({"kind": "continuous", "role": "suppress", "low": 1, "high": 1}, "must be below"),
        ({"kind": "continuous", "role": "suppress", "lwo": 1}, "unknown key"),
        ({"kind": "categorical", "role": "suppress", "vocabulary": ["a", "a"]}, "twice"),
    ],
)
def test_a_wrong_declaration_names_the_key(
    tmp_path: Path, factor: dict[str, Any], told: str
) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(json.dumps({"factors": {"camera": factor}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=told) as caught:
        Declaration.from_yaml(path)
    assert "camera" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("delimiter", ["µ", '"', "\n", "", ";;"])
def test_a_delimiter_that_no_table_has_is_refused(delimiter: str) -> None:
    content = {"table": {"delimiter": delimiter}, "factors": {"f": CATEGORY | {"role": "ignore"}}}
    with pytest.raises(ConfigError, match=r"table\.delimiter: .*found"):
        Declaration.checked(content, "schema.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML's own reader would keep the last, and drop a factor without a word."""
    path = tmp_path / "schema.yaml"
    line = "  plate: {kind: categorical, role: preserve}\n"
    path.write_text("factors:\n" + line + line, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the key 'plate' stands there twice(.|\n)*line 3"):
        Declaration.from_yaml(path)


WRITTEN = b"""version: 1
table: {delimiter: ";", decimal: ",", missing: ["-1"]}
split: {column: fold, adaptation: train}
factors:
  um: &um {kind: continuous, role: preserve, low: 0, high: 2.5}
  hour: {kind: cyclic, role: ignore, period: 24}
  plate: {kind: categorical, role: suppress, vocabulary: [a, b]}
"""


@settings(deadline=None)
@given(
    place=st.integers(0, len(WRITTEN)),
    noise=st.binary(max_size=12) | st.text(max_size=6).map(str.encode),
    keep=st.booleans(),
)
@example(place=9, noise=b"2020-13-41 ", keep=True)  # looks like a date
@example(place=9, noise=b"[" * 1000, keep=True)
@example(place=9, noise=b"9" * 5000, keep=True)
@example(place=len(WRITTEN), noise=b"  loop: &loop [*loop]\n", keep=True)
def test_random_bytes_in_a_schema_give_only_our_own_errors(
    written: Path, place: int, noise: bytes, keep: bool
) -> None:
    rest = WRITTEN[place:] if keep else WRITTEN[place + len(noise) :]
    written.write_bytes(WRITTEN[:place] + noise + rest)
    with contextlib.suppress(ConfigError):
        Declaration.from_yaml(written)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schema") / "schema.yaml"


def test_more_splits_than_the_index_tells_apart() -> None:
    """An id named as the split column, say."""
    names = ["adapt", *(f"s{i}" for i in range(65_535))]
    raw = pa.array(["a", "b"] * (len(names) // 2))
    declaration = Declaration.model_validate(
        {"split": {"column": "id"}, "factors": {"f": CATEGORY | {"role": "preserve"}}}
    )
    builder = SchemaBuilder(declaration, None)
    builder.add({"f": raw}, pa.array(names), pa.array([True] * len(names)))
    with pytest.raises(DataError, match=r"split\.column: 'id' names 65536 splits, at most 65535"):
        builder.schema()
