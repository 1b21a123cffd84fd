"""The demo's design: nothing that is tested may have been learned from, under any camera."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fino_fast.evaluate.cells import (
    ADAPT,
    CAMERAS,
    HELD_OUT,
    TEST_IN,
    TEST_OUT,
    Cells,
    Shot,
    plan_shots,
    split_cells,
    write_lab,
)


@pytest.fixture(scope="module")
def shots(cells: Cells) -> list[Shot]:
    return plan_shots(cells, seed=3, plan="report")


def of(shots: list[Shot], split: str) -> list[Shot]:
    return [shot for shot in shots if shot.split == split]


def test_the_installed_images_are_the_whole_data_set(cells: Cells) -> None:
    assert cells.scenes.shape == (2624, 160, 160)
    assert 0 <= cells.scenes.min() < cells.scenes.max() <= 1
    assert Counter(cells.module_type.tolist()) == {"mono": 1074, "poly": 1550}
    assert cells.defective.sum() == 715 + 106  # probability 1 and 2/3


def test_parts_keep_neighbours_together_and_shares_equal(cells: Cells) -> None:
    part = split_cells(cells)
    assert all(len(set(part[start : start + 30])) == 1 for start in range(0, len(part), 30))
    for number in range(4):
        rows = part == number
        assert 600 < rows.sum() < 700
        assert cells.defective[rows].mean() == pytest.approx(cells.defective.mean(), abs=0.02)
        assert (cells.module_type[rows] == "mono").mean() == pytest.approx(0.409, abs=0.02)


def test_no_cell_is_both_learned_from_and_tested(cells: Cells, shots: list[Shot]) -> None:
    learned = [shot.cell for shot in of(shots, ADAPT)]
    inside = [shot.cell for shot in of(shots, TEST_IN)]
    outside = [shot.cell for shot in of(shots, TEST_OUT)]
    assert len(set(learned)) == len(learned)
    assert sorted(inside) == sorted(outside) == sorted(set(inside))
    assert sorted(learned + inside) == list(range(len(cells.ids)))
    assert len({shot.id for shot in shots}) == len(shots)


def test_held_out_cameras_take_only_the_second_test(shots: list[Shot]) -> None:
    seen = {shot.true_camera.name for shot in of(shots, ADAPT)}
    assert seen == {shot.true_camera.name for shot in of(shots, TEST_IN)}
    held_out = {shot.true_camera.name for shot in of(shots, TEST_OUT)}
    assert not seen & held_out
    assert (len(seen), len(held_out)) == (CAMERAS - HELD_OUT, HELD_OUT)
    taken = Counter(shot.true_camera.name for shot in of(shots, ADAPT))
    assert max(taken.values()) - min(taken.values()) <= 1


def test_selection_sees_neither_test_cells_nor_held_out_cameras(
    cells: Cells, shots: list[Shot]
) -> None:
    selection = plan_shots(cells, seed=3, plan="select")
    assert not {s.cell for s in selection} & {s.cell for s in of(shots, TEST_IN)}
    held_out = {shot.true_camera for shot in of(shots, TEST_OUT)}
    assert not {shot.true_camera for shot in selection} & held_out
    assert {shot.split for shot in selection} == {ADAPT, TEST_IN, TEST_OUT}


def test_gaps_and_exposures_are_as_declared(shots: list[Shot]) -> None:
    gaps = np.mean([shot.camera is None for shot in shots])
    assert gaps == pytest.approx(0.03, abs=0.01)
    assert np.mean([shot.exposure is None for shot in shots]) == pytest.approx(0.10, abs=0.02)
    exposures = np.array([shot.true_exposure for shot in shots])
    assert exposures.min() >= 0.6
    assert exposures.max() <= 1.4
    cameras = np.array([int(shot.true_camera.name[-1]) for shot in shots])
    assert abs(np.corrcoef(cameras, exposures)[0, 1]) < 0.08  # drawn independently


def test_seeds_differ_and_repeat(cells: Cells, shots: list[Shot]) -> None:
    assert plan_shots(cells, seed=3, plan="report") == shots
    other = plan_shots(cells, seed=4, plan="report")
    assert [s.cell for s in other] == [s.cell for s in shots]  # the cells' split stays
    assert {s.true_camera for s in other}.isdisjoint({s.true_camera for s in shots})


def test_the_lab_on_disk_is_what_was_planned(
    cells: Cells, shots: list[Shot], tmp_path: Path
) -> None:
    few = [*of(shots, ADAPT)[:40], *of(shots, TEST_OUT)[:3]]
    write_lab(cells, few, 3, tmp_path / "a")
    write_lab(cells, few, 3, tmp_path / "b")
    with (tmp_path / "a" / "cells.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [shot.id for shot in few]
    assert [row["camera"] for row in rows] == [shot.camera or "" for shot in few]
    assert [row["defect"] for row in rows] == [
        "yes" if cells.defective[shot.cell] else "no" for shot in few
    ]
    for row in rows:
        with Image.open(tmp_path / "a" / "images" / row["file"]) as image:
            assert (image.mode, image.size) == ("L", (160, 160))
        one, two = (tmp_path / lab / "images" / row["file"] for lab in "ab")
        assert one.read_bytes() == two.read_bytes()
    schema = yaml.safe_load((tmp_path / "a" / "schema.yaml").read_text(encoding="utf-8"))
    roles = {name: factor["role"] for name, factor in schema["factors"].items()}
    assert roles == {
        "camera": "suppress",
        "exposure": "suppress",
        "module_type": "preserve",
        "defect": "ignore",
    }


def test_writing_over_a_lab_is_refused(cells: Cells, shots: list[Shot], tmp_path: Path) -> None:
    write_lab(cells, shots[:1], 3, tmp_path)
    with pytest.raises(FileExistsError):
        write_lab(cells, shots[:1], 3, tmp_path)
