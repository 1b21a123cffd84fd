"""The demo's data: real photographs of solar cells, taken by simulated cameras.

The images are the electroluminescence images of the package `elpv-dataset` (Buerhop-Lutz et al.,
CC-BY-NC-SA-4.0; used from where it is installed, never redistributed): 2,624 cells with a defect
probability and a module type. What is simulated is the camera and the exposure alone.

Design, the same for every seed:

* The cells are split first, into `FOLDS` parts with equal shares of module types and defects.
  Neighbours in the list were cut from the same module, so blocks of `BLOCK` consecutive cells stay
  together. Part 0 is the test.
* A cell outside the test is imaged once, by one of the seen cameras, and belongs to the split
  `adapt`: adaptation and probes learn from it.
* A cell of the test is imaged twice: by a seen camera (split `test-in`) and by a held-out one
  (`test-out`). So both tests hold the same cells, none of which was learned from under any camera,
  and only the camera differs between them.
* Cameras, who images what, exposures and gaps are drawn from the seed.

Settings are chosen on a *selection* plan, which leaves out the test cells and the held-out cameras
altogether: part 1 of the cells takes the place of the test and two seen cameras that of the
held-out ones.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from fino_fast.errors import MissingExtraError

from .cameras import EXPOSURE, Camera, draw_cameras

try:
    from sklearn.model_selection import StratifiedGroupKFold
except ImportError as error:
    raise MissingExtraError("scikit-learn", "evaluate") from error

SENSOR = 160  # pixels along a side of a simulated image
CAMERAS = 8
HELD_OUT = 2
FOLDS = 4
BLOCK = 30
SPLIT_SEED = 0  # the cells' split is the same for every seed of the demo
MISSING_CAMERA = 0.03
MISSING_EXPOSURE = 0.10
DEFECT_ABOVE = 0.5  # defect probability from which a cell counts as defective

ADAPT, TEST_IN, TEST_OUT = "adapt", "test-in", "test-out"
Plan = Literal["report", "select"]


@dataclass(frozen=True)
class Cells:
    """The scenes and what is known of them.

    Attributes:
        ids: name of each cell.
        scenes: [n, SENSOR, SENSOR] float32 in [0, 1].
        defective: [n] bool.
        module_type: [n] `mono` or `poly`.
    """

    ids: list[str]
    scenes: NDArray[np.float32]
    defective: NDArray[np.bool_]
    module_type: NDArray[np.str_]


@dataclass(frozen=True)
class Shot:
    """One image to take, as it will stand in the table; None = missing there."""

    id: str
    file: str
    cell: int
    split: str
    camera: str | None
    exposure: float | None
    module_type: str
    defect: str
    true_camera: Camera
    true_exposure: float


def load_cells() -> Cells:
    """The cells of the installed `elpv-dataset`, scaled to the sensor's size by area.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise MissingExtraError("elpv-dataset", "demo") from error
    images, probability, module_type = load_dataset()
    size = (SENSOR, SENSOR)
    scenes = [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BOX)) for i in images]
    return Cells(
        ids=[f"cell{number:04d}" for number in range(1, len(images) + 1)],
        scenes=np.stack(scenes).astype(np.float32) / np.float32(255),
        defective=probability > DEFECT_ABOVE,
        module_type=module_type,
    )


def split_cells(cells: Cells) -> NDArray[np.int64]:
    """The part, 0 … FOLDS − 1, of every cell."""
    count = len(cells.ids)
    strata = np.char.add(cells.module_type, cells.defective.astype(str))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SPLIT_SEED)
    part = np.empty(count, dtype=np.int64)
    blocks = np.arange(count) // BLOCK
    for number, (_, rows) in enumerate(folds.split(np.zeros(count), strata, blocks)):
        part[rows] = number
    return part


def plan_shots(cells: Cells, seed: int, plan: Plan) -> list[Shot]:
    """Which image is taken of which cell by which camera, in the order of the table.

    Args:
        seed: of cameras, assignment, exposures and gaps.
        plan: `report`, or `select` for choosing settings without test cells and held-out cameras.
    """
    rng = np.random.default_rng([seed, 0])
    cameras = draw_cameras(CAMERAS, rng)
    part = split_cells(cells)
    test_part = 0
    if plan == "select":
        cameras = cameras[:-HELD_OUT]
        test_part = 1
        part[part == 0] = -1
    seen, held_out = cameras[:-HELD_OUT], cameras[-HELD_OUT:]
    learned = np.flatnonzero((part >= 0) & (part != test_part))
    tested = np.flatnonzero(part == test_part)
    return [
        *_shots(cells, learned, ADAPT, seen, rng),
        *_shots(cells, tested, TEST_IN, seen, rng),
        *_shots(cells, tested, TEST_OUT, held_out, rng),
    ]


def _shots(
    cells: Cells,
    rows: NDArray[np.int64],
    split: str,
    cameras: list[Camera],
    rng: np.random.Generator,
) -> Iterator[Shot]:
    """One shot of each cell in `rows`; every camera gets the same number, give or take 1."""
    turns = rng.permutation(np.arange(len(rows)) % len(cameras))
    for row, turn in zip(rows.tolist(), turns.tolist(), strict=True):
        camera, exposure = cameras[turn], round(float(rng.uniform(*EXPOSURE)), 4)
        name = f"{cells.ids[row]}-{split}"
        yield Shot(
            id=name,
            file=f"{name}.png",
            cell=row,
            split=split,
            camera=None if rng.random() < MISSING_CAMERA else camera.name,
            exposure=None if rng.random() < MISSING_EXPOSURE else exposure,
            module_type=str(cells.module_type[row]),
            defect="yes" if cells.defective[row] else "no",
            true_camera=camera,
            true_exposure=exposure,
        )


def write_lab(cells: Cells, shots: list[Shot], seed: int, folder: Path) -> None:
    """Take the pictures: `images/*.png`, `cells.csv` and `schema.yaml`, as a lab would have them.

    The noise of a picture depends on the seed and on its place in the table only.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    for number, shot in enumerate(shots):
        rng = np.random.default_rng([seed, 1, number])
        picture = shot.true_camera.image(cells.scenes[shot.cell], shot.true_exposure, rng)
        Image.fromarray(picture).save(images / shot.file, compress_level=1)
    columns = [
        f.name for f in fields(Shot) if f.name not in ("cell", "true_camera", "true_exposure")
    ]
    with (folder / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for shot in shots:
            values = [getattr(shot, name) for name in columns]
            table.writerow(["" if value is None else value for value in values])
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False), encoding="utf-8")


SCHEMA = {
    "version": 1,
    "split": {"column": "split", "adaptation": ADAPT},
    "images": {"channels": 1},
    "factors": {
        "camera": {"kind": "categorical", "role": "suppress"},
        "exposure": {
            "kind": "continuous",
            "role": "suppress",
            "low": EXPOSURE[0],
            "high": EXPOSURE[1],
        },
        "module_type": {"kind": "categorical", "role": "preserve"},
        "defect": {"kind": "categorical", "role": "ignore"},  # the probes' label
    },
}
