"""Lengths per pixel: what a view shows is what its pixels are said to be."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fino_fast import Continuous
from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.declaration import ContinuousDeclaration, Declaration
from fino_fast.data.ingest import Request, ingest
from fino_fast.errors import DataError
from fino_fast.train import train
from fino_fast.train.factors import build_factors
from fino_fast.train.learner import Learner
from fino_fast.train.scale import metadata_in_views, statistics_in_views, view_scales

from .runs import run_config

COUNT = 24
SIDES = [(40, 40), (80, 60), (50, 90)]


class InProcess:
    """An engine without processes."""

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        yield from map(function, tasks)


def make_set(
    folder: Path, images: Sequence[np.ndarray], lengths: Sequence[str], role: str = "preserve"
) -> ShardSet:
    """A sealed set of `images` with one length per pixel each, "" where unknown."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "file", "um"])
        for i, (image, length) in enumerate(zip(images, lengths, strict=True)):
            Image.fromarray(image).save(folder / f"{i}.png")
            writer.writerow([i, f"{i}.png", length])
    factor = {"kind": "continuous", "role": role, "per_pixel_scale": True}
    request = Request(
        table=folder / "table.csv",
        images=folder,
        id_column="id",
        path_column="file",
        declaration=Declaration.checked({"factors": {"um": factor}}, "test schema"),
        out=folder / "shards",
    )
    ingest(request, InProcess())
    return ShardSet.open(folder / "shards")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def microscope(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Images of three sizes, all at 0.65 µm a pixel, some not known: one instrument."""
    images = [noise(*SIDES[i % 3], seed=i) for i in range(COUNT)]
    lengths = ["" if i % 8 == 5 else "0.65" for i in range(COUNT)]
    return make_set(tmp_path_factory.mktemp("microscope"), images, lengths)


def test_a_crop_of_known_scale() -> None:
    boxes = torch.tensor([[[0, 0, 112, 112], [10, 20, 458, 468]], [[5, 0, 55, 200], [0, 0, 1, 1]]])
    expected = torch.tensor([[0.5, 2.0], [100 / 224, 1 / 224]])
    torch.testing.assert_close(view_scales(boxes.float(), 224), expected)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_one_scene_taken_at_two_resolutions(tmp_path: Path, backend: Any) -> None:
    """The same 64 µm: as 64 pixels of 1 µm, and as 128 of 0.5 µm. Whole images on 32 pixels look
    the same, and are both said to have 2 µm a pixel; crops of half the sides have 1 µm."""
    scene = np.kron(noise(8, 8), np.ones((8, 8, 1), np.uint8))
    twice = np.kron(scene, np.ones((2, 2, 1), np.uint8))
    shards = make_set(tmp_path, [scene, twice] * 2, ["1.0", "0.5"] * 2)
    for share, expected in ((1.0, 2.0), (0.25, 1.0)):
        views = Views(
            size=32, scale=(share, share), ratio=(1, 1), hflip=0, mean=[0.0], std=[1.0],
            local_count=1, local_size=16, local_scale=(share, share),
        )  # fmt: skip
        batch = next(Loader(shards, views, 4, backend=backend).epoch(0))
        if share == 1:
            assert (batch.views - batch.views[:, :1]).abs().max() < 0.02
        found = metadata_in_views(batch, views, ["um"])["um"]
        assert found.shape == (3, 4)
        torch.testing.assert_close(found[:2], torch.full((2, 4), expected))
        torch.testing.assert_close(found[2], torch.full((4,), 2 * expected))


def test_a_run_feeds_the_values_of_its_views(
    microscope: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = Views(size=32, local_count=2, local_size=24, scale=(0.2, 0.9), vflip=0.5)
    config = run_config(
        Path(str(microscope.folder)), tmp_path / "run", views=views.model_dump(), factors={},
        balance=False, epochs=1,
    )  # fmt: skip
    given = []
    original = Learner.step

    def recording(self: Learner, index: int, images: Any, metadata: Any) -> Any:
        given.append(metadata["um"])
        return original(self, index, images, metadata)

    monkeypatch.setattr(Learner, "step", recording)
    train(config)
    loader = Loader(microscope, views, config.batch_size, drop_last=True, backend="torch")
    known = microscope.encoded("um")[:, 0]
    for batch, found in zip(loader.epoch(0), given, strict=True):
        assert found.shape == (4, config.batch_size)
        for v, b in np.ndindex(4, config.batch_size):
            boxes = batch.boxes if v < 2 else batch.local_boxes
            left, top, right, bottom = boxes[v % 2, b].tolist()
            size = 32 if v < 2 else 24
            expected = known[batch.rows[b]] * ((right - left) * (bottom - top)) ** 0.5 / size
            assert float(found[v, b]) == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("role", ["preserve", "suppress"])
def test_targets_are_scaled_by_the_statistics_of_the_views(microscope: ShardSet, role: str) -> None:
    """The image's own statistics would not do: this factor is constant over the images."""
    views = Views(size=32, scale=(0.2, 0.9))
    statistics = statistics_in_views(microscope, "adapt", views, seed=3)
    loader = Loader(microscope, views, COUNT, seed=3, backend="torch")
    seen = metadata_in_views(next(loader.epoch(0)), views, ["um"])["um"].double()
    seen = seen[~seen.isnan()]
    assert statistics["um"].mean == [pytest.approx(float(seen.mean()), rel=1e-6)]
    assert statistics["um"].std == [pytest.approx(float(seen.std(correction=0)), rel=1e-5)]
    override = {"um": {"role": role}}
    config = run_config(Path(str(microscope.folder)), Path("unused"), factors=override)
    (factor,) = build_factors(microscope.schema, config.factors, statistics)
    assert isinstance(factor, Continuous)
    offset, scale = (np.array(part) for part in factor.affine)
    targets = (seen.numpy() - offset) * scale
    if role == "preserve":
        assert abs(targets.mean()) < 1e-6
        assert targets.std() == pytest.approx(1)
    else:
        assert targets.min() > -1e-6  # fp32 rounds
        assert targets.max() < 1 + 1e-6
        assert targets.max() - targets.min() > 0.5


def test_what_is_no_length_per_pixel(tmp_path: Path) -> None:
    images = [noise(20, 20)] * 3
    with pytest.raises(DataError, match=r"'um' is a length per pixel, so above 0; .* is 0\.0"):
        make_set(tmp_path, images, ["1", "0", "2"])
    with pytest.raises(ValueError, match="per_pixel_scale is for one number"):
        ContinuousDeclaration(
            kind="continuous", role="ignore", columns=["a", "b"], per_pixel_scale=True
        )


def test_declarations_without_it_keep_their_hash() -> None:
    plain = ContinuousDeclaration(kind="continuous", role="preserve")
    assert "per_pixel_scale" not in plain.model_dump(mode="json")
    marked = plain.model_copy(update={"per_pixel_scale": True})
    assert marked.model_dump(mode="json")["per_pixel_scale"] is True
