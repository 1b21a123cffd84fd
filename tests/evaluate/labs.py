"""A small sealed set whose images carry their metadata in plain sight."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import LocalEngine
from fino_fast.data.ingest import Request, ingest

SPLITS = {"adapt": 60, "test-in": 30, "test-out": 10}
SCHEMA = {
    "split": {"column": "split"},
    "images": {"channels": 1},
    "factors": {
        "camera": {"kind": "categorical", "role": "suppress"},
        "exposure": {"kind": "continuous", "role": "suppress", "low": 0.0, "high": 2.0},
        "tags": {"kind": "multi", "role": "ignore"},
        "defect": {"kind": "categorical", "role": "ignore"},
    },
}


def make_shards(folder: Path) -> Path:
    """100 grey images of 24×24: the level tells the exposure, the stripes the camera; a bright
    square is the defect. Held-out split: cameras of its own. Every ninth camera is missing."""
    rng = np.random.default_rng(0)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "file", "split", *SCHEMA["factors"]])
        row = 0
        for split, count in SPLITS.items():
            for _ in range(count):
                camera = row % 3 + (3 if split == "test-out" else 0)
                exposure, defect = rng.uniform(0.2, 1.8), rng.random() < 0.4
                pixels = 60 * exposure + rng.normal(0, 4, (24, 24))
                pixels[:: camera + 2] += 60
                if defect:
                    pixels[8:16, 8:16] += 90
                name = f"{row}.png"
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
                tags = "a;b" if row % 2 else ""
                known = "" if row % 9 == 4 else f"cam-{camera}"
                label = "yes" if defect else "no"
                writer.writerow([f"ø {row}", name, split, known, f"{exposure:.3f}", tags, label])
                row += 1
    ingest(
        Request(
            table=folder / "table.csv",
            images=folder,
            id_column="id",
            path_column="file",
            declaration=Declaration.model_validate(SCHEMA),
            out=folder / "shards",
            shard_bytes=20_000,
        ),
        LocalEngine(1),
    )
    return folder / "shards"
