import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fino_fast.errors import ConfigError
from fino_fast.evaluate.leakage import Readout
from fino_fast.evaluate.plots import arms_figure, camera_sheet, readout_bars
from fino_fast.evaluate.report import Spread, markdown_table, write_report


def test_spread_shows_its_range_only_where_there_is_one() -> None:
    assert str(Spread.of([0.5])) == "0.500"
    spread = Spread.of([0.7, 0.8, 0.6])
    assert spread == Spread(pytest.approx(0.7), 0.6, 0.8, 3)
    assert str(spread) == "0.700 (0.600 … 0.800)"
    for wrong in ([], [0.5, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite measurements"):
            Spread.of(wrong)


def test_tables_line_up_and_escape() -> None:
    lines = markdown_table(["arm", "x"], [["a|b", "1"], ["long name", "22"]]).splitlines()
    assert lines[0] == "| arm       | x  |"
    assert lines[1] == "|-----------|----|"
    assert lines[2] == r"| a\|b      | 1  |"
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["a", "b"], [["1"]])


def test_a_report_is_whole_and_is_not_overwritten(tmp_path: Path) -> None:
    parts = {"content": {"score": 0.5}, "markdown": "# λ\n", "figures": {"plot": Figure((2, 2))}}
    write_report(tmp_path / "out", "result", **parts)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == {"score": 0.5}
    assert (tmp_path / "out" / "result.md").read_text(encoding="utf-8") == "# λ\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "plot.png",
        "result.json",
        "result.md",
    ]
    with pytest.raises(ConfigError, match="exists already"):
        write_report(tmp_path / "out", "result", **parts)


def test_a_report_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(
            tmp_path / "out", "r", content={"score": float("nan")}, markdown="", figures={}
        )
    assert list(tmp_path.iterdir()) == []


def drawn(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return Image.open(buffer)


def texts(figure: Figure) -> str:
    found = [text.get_text() for axis in figure.axes for text in axis.texts]
    found += [axis.get_title() for axis in figure.axes]
    found += [axis.get_ylabel() for axis in figure.axes]
    return "\n".join(found)


def test_the_arms_are_drawn_with_every_seed() -> None:
    arms = ("frozen", "FINO")
    accuracy = {arm: {"in domain": [0.7, 0.8], "out of domain": [0.6, 0.7]} for arm in arms}
    figure = arms_figure(arms, accuracy, {arm: [0.9, 0.5] for arm in arms}, 1 / 6, "two seeds")
    drawn(figure)
    left, right = figure.axes
    assert [round(bar.get_height(), 2) for bar in left.patches] == [0.75, 0.75, 0.65, 0.65]
    assert [bar.get_height() for bar in right.patches] == [0.7, 0.7]
    dots = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "o"]
    assert len(dots) == 6
    assert {line.get_ydata()[0] for line in right.lines if line.get_linestyle() == "--"} == {1 / 6}
    assert "balanced accuracy" in texts(figure)
    assert "lower is better" in texts(figure)


def test_readouts_are_drawn_with_chance_also_below_zero() -> None:
    readout = Readout("dose", "test", "R²", -0.4, 0.0, 10, 10)
    name = Readout("plate", "test", "balanced accuracy", 0.9, 0.25, 10, 10)
    figure = readout_bars({}, {"dose": {"test": readout}, "plate": {"test": name}})
    drawn(figure)
    (axis,) = figure.axes
    assert axis.get_ylim()[0] < -0.4
    assert [bar.get_height() for bar in axis.patches] == [-0.4, 0.9]
    assert "-0.400" in texts(figure)


def test_pictures_stand_under_their_camera() -> None:
    pictures = np.zeros((3, 8, 8), dtype=np.uint8)
    figure = camera_sheet([("mono", pictures), ("poly", pictures + 200)], ["a", "b", "c"])
    drawn(figure)
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes[:3]] == ["a", "b", "c"]
    assert figure.axes[5].images[0].get_array().min() == 200
