"""A small lab: a folder of real image files and a table about them."""

import copy
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import yaml
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from fino_fast.data import ShardSet
from fino_fast.data.declaration import Declaration
from fino_fast.data.ingest import Report, Request, ingest

SCHEMA: dict[str, Any] = {
    "split": {"column": "split", "adaptation": "adapt"},
    "factors": {
        "camera": {"kind": "categorical", "role": "suppress"},
        "exposure": {"kind": "continuous", "role": "suppress", "low": 0, "high": 2},
        "hour": {"kind": "cyclic", "role": "preserve", "period": 24},
        "defects": {"kind": "multi", "role": "preserve"},
        "label": {"kind": "categorical", "role": "ignore"},
    },
}


class Serial:
    """An engine without processes, for tests of anything but processes."""

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        for task in tasks:
            yield function(task)


@dataclass
class Lab:
    """Images, table and schema in a folder, ready for ingestion."""

    root: Path
    schema: dict[str, Any]
    rows: list[dict[str, str]] = field(default_factory=list)

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def table(self) -> Path:
        return self.root / "table.csv"

    @property
    def out(self) -> Path:
        return self.root / "shards"

    def save(self, delimiter: str = ",") -> None:
        """Write table and schema."""
        with self.table.open("w", newline="", encoding="utf-8") as file:
            names = list(dict.fromkeys(name for row in self.rows for name in row))
            writer = csv.DictWriter(file, names, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(self.rows)
        (self.root / "schema.yaml").write_text(
            yaml.safe_dump(self.schema, sort_keys=False), encoding="utf-8"
        )

    def request(self, **changes: Any) -> Request:
        options: dict[str, Any] = {
            "table": self.table,
            "images": self.images,
            "id_column": "id",
            "path_column": "file",
            "declaration": Declaration.model_validate(self.schema),
            "out": self.out,
            "shard_bytes": 40_000,
        }
        return Request(**(options | changes))

    def ingest(self, **changes: Any) -> Report:
        self.save()
        return ingest(self.request(**changes), Serial())

    def open(self) -> ShardSet:
        return ShardSet.open(self.out)

    def arguments(self) -> list[str]:
        """The command line of the ingest."""
        return [
            *("--table", str(self.table)),
            *("--images", str(self.images)),
            *("--schema", str(self.root / "schema.yaml")),
            *("--out", str(self.out)),
            *("--id", "id", "--path", "file", "--shard-bytes", "40000"),
        ]


def pixels(i: int, height: int = 40, width: int = 52, channels: int = 1) -> np.ndarray:
    """Smooth pixels that differ for every i, [height, width] or [height, width, channels]."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        127 + 100 * np.sin((x * (i % 7 + 1) + y * (i % 5 + 1) + 40 * c + 3 * i) / 40)
        for c in range(channels)
    ]
    image = np.stack(planes, axis=-1).astype(np.uint8)
    return image[:, :, 0] if channels == 1 else image


def png(image: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **options)
    return buffer.getvalue()


def dicom(image: np.ndarray, photometric: str = "MONOCHROME2", **attributes: Any) -> bytes:
    """A DICOM file of a patient called Jane Doe."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientName = "Doe^Jane"
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = image.shape[:2]
    dataset.SamplesPerPixel = image.shape[2] if image.ndim == 3 else 1
    if image.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = image.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(image.dtype.kind == "i")
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = image.tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    return buffer.getvalue()


def make_lab(root: Path, count: int, channels: int = 1) -> Lab:
    lab = Lab(root, copy.deepcopy(SCHEMA))
    lab.images.mkdir(parents=True)
    for i in range(count):
        name = f"{i:04d}.{'png' if i % 2 else 'jpg'}"
        form = "PNG" if i % 2 else "JPEG"
        image = pixels(i, 40 + i % 5, 52 + i % 3, channels)
        (lab.images / name).write_bytes(png(image, form))
        lab.rows.append(
            {
                "id": f"s{i:04d}",
                "file": name,
                "camera": "" if i % 11 == 3 else f"cam {i % 4}",
                "exposure": "NA" if i % 7 == 2 else f"{i / count:.4f}",
                "hour": f"{i % 24}.5",
                "defects": ["crack", "crack; spot", "", "spot"][i % 4],
                "label": str(i % 3),
                "split": "adapt" if i % 5 else "test",
            }
        )
    return lab
