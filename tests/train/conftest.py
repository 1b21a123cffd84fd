"""Real shards, ingested from real files."""

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import LocalEngine
from fino_fast.data.ingest import Request, ingest

from .runs import IMAGES

SCHEMA = {
    "split": {"column": "split"},
    "factors": {
        "camera": {"kind": "categorical", "role": "suppress"},
        "module": {"kind": "categorical", "role": "preserve"},
        "exposure": {"kind": "continuous", "role": "suppress", "low": 0.0, "high": 2.0},
        "hour": {"kind": "cyclic", "role": "preserve", "period": 24},
        "defect": {"kind": "categorical", "role": "ignore"},
    },
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 RGB images of 40×40 to adapt on and 4 held out, some metadata missing."""
    return make_shards(tmp_path_factory.mktemp("lab"), channels=3)


@pytest.fixture(scope="session")
def five_channel_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with five channels."""
    return make_shards(tmp_path_factory.mktemp("five"), channels=5)


def make_shards(folder: Path, channels: int) -> Path:
    generator = np.random.default_rng(0)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "file", "split", *SCHEMA["factors"]])
        for row in range(IMAGES + 4):
            pixels = generator.integers(0, 256, (40, 40, channels), dtype=np.uint8)
            name = f"{row}.png" if channels == 3 else f"{row}.tiff"
            if channels == 3:
                Image.fromarray(pixels).save(folder / name)
            else:
                tifffile.imwrite(
                    folder / name, pixels, photometric="minisblack", planarconfig="contig"
                )
            split = "adapt" if row < IMAGES else "test"
            camera = "" if row % 7 == 3 else f"cam-{row % 4}"
            exposure = "" if row % 5 == 2 else f"{generator.uniform(0.1, 1.9):.3f}"
            hour = f"{generator.uniform(0, 24):.2f}"
            defect = "yes" if row % 3 else "no"
            module = "mono" if row % 2 else "poly"
            writer.writerow([row, name, split, camera, module, exposure, hour, defect])
    request = Request(
        table=folder / "table.csv",
        images=folder,
        id_column="id",
        path_column="file",
        declaration=Declaration.checked(SCHEMA, "test schema"),
        out=folder / "shards",
    )
    ingest(request, LocalEngine(1))
    return folder / "shards"
