"""`fino-fast audit` against sets whose associations are known by design, and against oracles."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.labs import make_lab
from PIL import Image
from scipy import stats
from scipy.stats.contingency import association

from fino_fast.cli import main
from fino_fast.data import ShardSet
from fino_fast.evaluate.audit import Audit, audit
from fino_fast.evaluate.audit_association import (
    ETA,
    Association,
    Contingency,
    correlation_ratio,
    cramers_v,
    rank_correlation,
)
from fino_fast.evaluate.audit_factors import FactorAudit
from fino_fast.evaluate.audit_report import heat_map

ROWS = 96


def names(role: str = "ignore", kind: str = "categorical") -> dict[str, Any]:
    return {"kind": kind, "role": role}


def sealed(
    root: Path, factors: dict[str, dict[str, Any]], columns: dict[str, list[str]]
) -> ShardSet:
    """Ingest real images whose table has these columns; a column `split` names the splits."""
    lab = make_lab(root, len(next(iter(columns.values()))))
    lab.schema = {"factors": factors}
    if "split" in columns:
        lab.schema["split"] = {"column": "split"}
    for i, row in enumerate(lab.rows):
        lab.rows[i] = {"id": row["id"], "file": row["file"]} | {
            name: values[i] for name, values in columns.items()
        }
    lab.ingest()
    return lab.open()


def pair(found: Audit, first: str, second: str) -> Association:
    return next(a for a in found.associations if {a.first, a.second} == {first, second})


def factor(found: Audit, name: str) -> FactorAudit:
    return next(f for f in found.factors if f.name == name)


def topics(found: Audit, topic: str) -> list[list[str]]:
    return [advice.factors for advice in found.advice if advice.topic == topic]


@pytest.fixture(scope="module")
def designed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Factors that are copies of each other, independent by design, or partly missing."""
    i = np.arange(ROWS)
    camera = [f"cam|{k}" for k in i % 4]
    return sealed(
        tmp_path_factory.mktemp("designed") / "lab",
        {
            "camera": names("suppress"),
            "antibody": names("preserve"),  # a copy of the camera under other names
            "region": names("preserve"),  # every region with every camera, equally often
            "depth": {"kind": "continuous", "role": "preserve"},  # rises with the camera
            "squared": {"kind": "continuous", "role": "ignore"},  # a monotone function of depth
            "hour": {"kind": "cyclic", "role": "ignore", "period": 24},
            "tags": names(kind="multi"),
            "gappy": names("preserve"),  # missing with two cameras, and some more
        },
        {
            "camera": camera,
            "antibody": [f"é{k}" for k in 3 - i % 4],
            "region": [f"r{k}" for k in i // 4 % 3],
            "depth": [f"{10 * (k % 4) + k / ROWS:.6f}" for k in i],
            "squared": [f"{(10 * (k % 4) + k / ROWS) ** 2:.6f}" for k in i],
            "hour": [str(6 * (k % 4)) for k in i],
            "tags": [["a;b", "b;a", "c", ""][k % 4] for k in i],
            "gappy": ["" if k % 4 < 2 or k % 24 == 3 else f"g{k % 8}" for k in i],
            "split": ["adapt" if k < 72 else "test" for k in i],
        },
    )


@pytest.fixture(scope="module")
def found(designed: ShardSet) -> Audit:
    return audit(designed)


def test_pairs_known_by_design(found: Audit) -> None:
    copy = pair(found, "camera", "antibody")
    assert (copy.value, copy.uncorrected, copy.rows) == (pytest.approx(1), pytest.approx(1), ROWS)
    assert (copy.lambda_first, copy.lambda_second) == (1, 1)
    independent = pair(found, "camera", "region")
    assert independent.value == 0
    assert independent.uncorrected == pytest.approx(0, abs=1e-7)
    assert (independent.lambda_first, independent.lambda_second) == (0, 0)
    assert pair(found, "depth", "squared").value == pytest.approx(1)
    assert pair(found, "camera", "hour").value == pytest.approx(1)


def test_correlation_ratio_by_hand(designed: ShardSet, found: Audit) -> None:
    depth = np.asarray(designed.raw("depth"))
    region = np.asarray(designed.raw("region"))
    between = sum(
        (region == r).sum() * (depth[region == r].mean() - depth.mean()) ** 2
        for r in np.unique(region)
    )
    eta2 = between / ((depth - depth.mean()) ** 2).sum()
    ratio = pair(found, "region", "depth")
    assert ratio.uncorrected == pytest.approx(eta2, rel=1e-9)
    assert ratio.value == 0  # below what three groups reach by chance
    near = pair(found, "camera", "depth")
    assert 0.99 < near.value < near.uncorrected < 1
    assert near.strength == pytest.approx(np.sqrt(near.value))


def test_a_multi_valued_factor_is_compared_by_combination(found: Audit) -> None:
    tags = factor(found, "tags")
    assert tags.missing == 0.25
    # 24 rows each of {a, b}, {b, a} and {c}: a and b occur 48 times, c 24 times.
    assert tags.classes.largest == ("a", 48)
    assert tags.classes.smallest == ("c", 24)
    share = np.array([48, 48, 24]) / 120
    assert tags.classes.effective == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    compared = pair(found, "camera", "tags")
    assert compared.rows == 72
    assert compared.lambda_second == 1  # the camera tells the combination
    assert compared.lambda_first == pytest.approx(0.5)  # {a, b} comes from two cameras
    assert compared.uncorrected == pytest.approx(1)


def test_gaps_by_split_and_their_cause(found: Audit) -> None:
    gappy = factor(found, "gappy")
    missing = np.array([k % 4 < 2 or k % 24 == 3 for k in range(ROWS)])
    assert gappy.missing == missing.mean()
    assert gappy.missing_by_split == {"adapt": missing[:72].mean(), "test": missing[72:].mean()}
    assert ["gappy", "camera"] in topics(found, "missingness")
    assert ["gappy", "region"] not in topics(found, "missingness")
    assert topics(found, "missing") == [["gappy"]]


def test_confounded_roles_only(found: Audit) -> None:
    """Copies count against each other where one is preserved and the other suppressed."""
    confounded = topics(found, "confounded")
    assert ["antibody", "camera"] in confounded
    assert ["depth", "camera"] in confounded
    assert not any("region" in who or "hour" in who for who in confounded)
    text = next(a.text for a in found.advice if a.factors == ["antibody", "camera"])
    assert "Cramér's V 1.000 on 96 rows" in text


def test_few_images_a_plate_do_not_hide_what_plates_determine(tmp_path: Path) -> None:
    """The correction of V takes small groups for chance; λ counts that there is no exception."""
    i = np.arange(48)
    factors = {"plate": names("suppress"), "drug": names("preserve"), "site": names("preserve")}
    shards = sealed(
        tmp_path,
        factors,
        {
            "plate": [f"p{k // 2}" for k in i],
            "drug": [f"d{k // 2 % 4}" for k in i],
            "site": [f"s{k % 2}" for k in i],
        },
    )
    result = audit(shards)
    assert 0.6 < pair(result, "plate", "drug").value < 0.8
    assert pair(result, "drug", "plate").lambda_first == 1
    assert topics(result, "confounded") == [["drug", "plate"]]


def test_heat_map_shows_names_as_they_are(tmp_path: Path) -> None:
    figure = heat_map(["$a", "b$"], [Association("$a", "b$", ETA, 0.25, 0.3, 9)])
    figure.savefig(tmp_path / "map.png")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$a", "b$"]
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.50"]  # √η²
    assert len(heat_map(["alone"], []).axes[0].texts) == 0


def test_ranges(designed: ShardSet, found: Audit) -> None:
    (depth,) = factor(found, "depth").ranges
    values = np.asarray(designed.raw("depth"))
    expected = (values.min(), values.max(), values.mean(), values.std())
    assert (depth.minimum, depth.maximum, depth.mean, depth.std) == pytest.approx(expected)
    adapt = values[designed.rows_of("adapt")]
    share = ((values < adapt.min()) | (values > adapt.max())).mean()
    assert depth.outside == share > 0
    (hour,) = factor(found, "hour").ranges
    assert (hour.minimum, hour.maximum) == (0, 18)
    assert (hour.mean, hour.std) == (None, None)  # evenly round the clock
    assert hour.concentration == pytest.approx(0, abs=1e-12)


def test_a_circular_mean_wraps(tmp_path: Path) -> None:
    hours = ["23", "1", "23", "1"]
    shards = sealed(
        tmp_path, {"hour": {"kind": "cyclic", "role": "ignore", "period": 24}}, {"hour": hours}
    )
    result = audit(shards)
    (hour,) = factor(result, "hour").ranges
    assert min(hour.mean, 24 - hour.mean) == pytest.approx(0, abs=1e-9)
    assert hour.concentration == pytest.approx(np.cos(2 * np.pi / 24))
    assert (result.associations, result.missingness, result.advice) == ([], [], [])


def test_constant_single_missing_and_split_advice(tmp_path: Path) -> None:
    i = np.arange(24)
    shards = sealed(
        tmp_path / "lab",
        {
            "lens": names(),
            "well": names("suppress"),
            "note": names("ignore"),
            "plate": names("suppress"),
            "late": names(),
            "empty": {"kind": "continuous", "role": "ignore"},
            "flat": {"kind": "continuous", "role": "ignore"},
            "sound": names("preserve"),
        },
        {
            "lens": ["20x"] * 24,
            "well": [f"w{k}" for k in i],
            "note": [f"n{k}" for k in i],
            "plate": [f"p{k % 2 + 2 * (k >= 12)}" for k in i],
            "late": [f"l{k % 3}" if k >= 12 else "" for k in i],
            "empty": [""] * 24,
            "flat": ["0.5"] * 24,
            "sound": [f"s{k % 3}" for k in i],
            "split": ["adapt" if k < 12 else "test" for k in i],
        },
    )
    result = audit(shards)
    assert topics(result, "constant") == [["flat"], ["lens"]]
    assert topics(result, "once") == [["well"]]  # ignored notes may be what they like
    assert topics(result, "missing") == [["empty"]]
    splits = [advice.text for advice in result.advice if advice.topic == "splits"]
    assert len(splits) == 4  # wells and notes are in one split each, too
    assert "'plate': the split 'test' shares no value with 'adapt'" in "\n".join(splits)
    assert "'late' is observed in the split 'test' only." in splits
    assert not any("sound" in advice.factors for advice in result.advice)
    well = factor(result, "well").classes
    assert (well.seen, well.once, well.vocabulary, well.adapt_once) == (24, 24, 24, 12)
    assert well.effective == pytest.approx(24)
    # A factor with a value a row determines everything and tells nothing.
    assert pair(result, "well", "sound").value is None
    assert pair(result, "sound", "well").lambda_first is None
    assert pair(result, "lens", "sound").value is None
    assert pair(result, "empty", "sound").rows == 0
    assert factor(result, "empty").ranges == []


def test_nothing_observed_at_all(tmp_path: Path) -> None:
    factors = {
        "a": names(),
        "b": names(kind="multi"),
        "c": {"kind": "continuous", "role": "ignore", "low": 0, "high": 1},
        "d": {"kind": "cyclic", "role": "ignore", "period": 24},
    }
    shards = sealed(tmp_path / "lab", factors, {name: ["NA"] * 5 for name in factors})
    out = tmp_path / "out"
    assert main(["audit", str(shards.folder), "--out", str(out)]) == 0
    content = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert [f["missing"] for f in content["factors"]] == [1] * 4
    assert all(p["value"] is None and p["rows"] == 0 for p in content["associations"])
    assert [a["topic"] for a in content["advice"]] == ["missing"] * 4


def test_numbers_whose_squares_underflow(tmp_path: Path) -> None:
    shards = sealed(
        tmp_path,
        {"x": {"kind": "continuous", "role": "ignore"}, "side": names()},
        {"x": ["1e-200", "2e-200"] * 4, "side": ["a", "b"] * 4},
    )
    assert pair(audit(shards), "x", "side").value is None


def test_a_whole_period_is_no_change(tmp_path: Path) -> None:
    hours = {"kind": "cyclic", "role": "ignore", "period": 24}
    shards = sealed(
        tmp_path,
        {"hour": hours, "side": names()},
        {"hour": ["0", "24"] * 6, "side": ["a", "b"] * 6},
    )
    assert pair(audit(shards), "hour", "side").value is None


def test_several_columns_in_one_factor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    shards = sealed(
        tmp_path,
        {
            "stage": {"kind": "continuous", "role": "ignore", "columns": ["x", "y"]},
            "copy": {"kind": "continuous", "role": "ignore"},
            "side": names(),
        },
        {
            "x": [*map(str, x[:39]), ""],
            "y": ["", *map(str, y[1:])],
            "copy": list(map(str, y)),
            "side": ["left" if v < 0 else "right" for v in x],
        },
    )
    found = audit(shards)
    stage = factor(found, "stage")
    assert stage.missing == 2 / 40
    assert [r.column for r in stage.ranges] == ["x", "y"]
    assert stage.ranges[0].mean == pytest.approx(x[:39].mean())
    assert pair(found, "stage", "copy").value == pytest.approx(1)
    assert pair(found, "stage", "copy").rows == 38
    rows = slice(1, 39)
    parts = [np.var(v[rows]) for v in (x, y)]
    left = x[rows] < 0
    between = [
        sum(m.mean() * (v[rows][m].mean() - v[rows].mean()) ** 2 for m in (left, ~left))
        for v in (x, y)
    ]
    expected = np.mean([b / v for b, v in zip(between, parts, strict=True)])
    assert pair(found, "stage", "side").uncorrected == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_cramers_v_equals_its_formulas(seed: int) -> None:
    """Plain V is scipy's; the corrected one follows Bergsma's formula on the dense table."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 5, 200)
    b = np.where(rng.random(200) < 0.4, a, rng.integers(0, 7, 200)) + 3  # codes 0…2 never occur
    dense = stats.contingency.crosstab(a, b).count
    corrected, plain = cramers_v(Contingency.of(a, b))
    assert plain == pytest.approx(association(dense, method="cramer"))
    phi2 = stats.chi2_contingency(dense, correction=False).statistic / 200
    k, r = dense.shape
    k_, r_ = (c - (c - 1) ** 2 / 199 for c in (k, r))
    unbiased = max(0, phi2 - (k - 1) * (r - 1) / 199)
    assert corrected == pytest.approx(np.sqrt(unbiased / min(k_ - 1, r_ - 1)))
    assert 0 < corrected < plain


def test_corrections_take_chance_away() -> None:
    """Many groups of few independent rows: the textbook's measures are high, ours are not."""
    rng = np.random.default_rng(0)
    groups, labels, numbers = rng.integers(0, 100, 300), rng.integers(0, 4, 300), rng.random(300)
    corrected, plain = cramers_v(Contingency.of(groups, labels))
    assert plain > 0.5
    assert corrected < 0.2
    epsilon2, eta2 = correlation_ratio(groups, numbers[:, None])
    assert eta2 > 0.25
    assert epsilon2 < 0.1


def test_rank_correlation_is_spearman_and_mardia() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 9, 100).astype(float)
    b = rng.normal(size=100) - 0.2 * a
    ranked = [stats.rankdata(v)[:, None] for v in (a, b)]
    assert rank_correlation(*ranked) == pytest.approx(-stats.spearmanr(a, b).statistic)
    angle = rng.uniform(0, 2 * np.pi, 100)
    circle = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    x = np.cos(angle - 1) + 0.3 * rng.normal(size=100)
    cx, sx, cs = (
        np.corrcoef(u, v)[0, 1]
        for u, v in ((x, circle[:, 1]), (x, circle[:, 0]), (circle[:, 0], circle[:, 1]))
    )
    mardia = np.sqrt((cx**2 + sx**2 - 2 * cx * sx * cs) / (1 - cs**2))
    assert rank_correlation(circle, x[:, None]) == pytest.approx(mardia)
    assert rank_correlation(ranked[0][:2], ranked[1][:2]) is None
    assert rank_correlation(np.ones((100, 1)), ranked[0]) is None


def test_command_writes_what_it_says(
    designed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert main(["audit", str(designed.folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("96 samples: 72 adapt, 24 test; 8 factors\n- confounded: ")
    assert sorted(p.name for p in out.iterdir()) == ["audit.json", "audit.md", "audit.png"]
    content = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert (content["manifest"], content["schema"]) == (
        designed.manifest_hash,
        designed.schema_hash,
    )
    assert len(content["associations"]) == 8 * 7 // 2
    text = (out / "audit.md").read_text(encoding="utf-8")
    assert r"'cam\|0': 24" in text  # the table's own names, not codes
    assert "'é3': 24" in text
    for advice in content["advice"]:
        assert advice["text"] in text
        assert advice["text"] in printed
    assert Image.open(out / "audit.png").size[0] > 300


def test_wrong_input(
    designed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    assert main(["audit", str(designed.folder), "--out", str(taken)]) == 1
    assert "exists already" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["audit", str(taken), "--out", str(out)]) == 1
    assert "MANIFEST.json" in capsys.readouterr().err
    assert main(["audit", str(designed.folder)]) == 1
    assert "the command line: --out is missing" in capsys.readouterr().err
    assert not out.exists()


def test_damaged_metadata_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sealed(tmp_path / "lab", {"a": names()}, {"a": list("xyxy")})
    table = tmp_path / "lab" / "shards" / shards.manifest.table.name
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    assert main(["audit", str(shards.folder), "--out", str(tmp_path / "out")]) == 1
    assert table.name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
