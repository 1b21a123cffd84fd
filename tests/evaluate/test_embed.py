"""Embeddings of a sealed set: right rows, whole files, and faults that are named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fino_fast.cli import main
from fino_fast.data import Loader, ShardSet, Views
from fino_fast.errors import ConfigError, DataError
from fino_fast.evaluate import embed as embedding
from fino_fast.evaluate.embed import Embeddings, embed, load, save

VIEWS = Views(size=24, mean=[0.5], std=[0.5])


class Pixels(nn.Module):
    """The image itself as its embedding, and a dropout that must be off."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(images.flatten(1))


def loaders(shards: ShardSet, *splits: str) -> list[Loader]:
    return [Loader(shards, VIEWS, 7, split=split) for split in splits]


def whole(folder: Path) -> tuple[ShardSet, Embeddings]:
    shards = ShardSet.open(folder)
    return shards, embed(Pixels(), loaders(shards, *shards.schema.splits))


def test_every_sample_once_and_under_its_own_id(shards: Path, tmp_path: Path) -> None:
    """Against the PNG files on disk, found by the id in the table."""
    sealed, found = whole(shards)
    assert sorted(found.rows.tolist()) == list(range(100))
    save(tmp_path / "out", found, sealed, source={"test": "pixels"})
    back = load(tmp_path / "out")
    assert back.features.dtype == np.float32
    for i, name in enumerate(back.samples["id"].to_pylist()):
        with Image.open(shards.parent / f"{name.split()[1]}.png") as image:
            pixels = np.asarray(image, dtype=np.float32).ravel() / 255
        np.testing.assert_allclose(back.features[i] * 0.5 + 0.5, pixels, atol=2e-3)


def test_the_model_is_left_as_it_was(shards: Path) -> None:
    model = Pixels().train()
    embed(model, loaders(ShardSet.open(shards), "test-out"))
    assert model.training


@pytest.mark.parametrize("file_format", ["safetensors", "npy"])
def test_metadata_stand_beside_the_features(
    shards: Path, tmp_path: Path, file_format: embedding.FileFormat
) -> None:
    sealed, found = whole(shards)
    save(tmp_path / "out", found, sealed, source={}, file_format=file_format)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "embeddings.json",
        f"features.{file_format}",
        "samples.parquet",
    ]
    back = load(tmp_path / "out")
    np.testing.assert_array_equal(back.features, found.features)
    assert back.splits == ["adapt", "test-in", "test-out"]
    assert back.factors == ["camera", "defect", "exposure", "tags"]
    assert len(back.of_split("test-in")) == 30
    cameras, expected = back.values("camera"), sealed.raw("camera")
    assert cameras == [expected[row] for row in found.rows]
    assert None in cameras
    np.testing.assert_array_equal(back.values("exposure"), sealed.raw("exposure")[found.rows])
    assert back.about["manifest_hash"] == sealed.manifest_hash
    assert pq.read_table(tmp_path / "out" / "samples.parquet")["row"].to_pylist() == list(
        found.rows
    )
    with pytest.raises(DataError, match="factor 'tags'"):
        back.values("tags")
    with pytest.raises(DataError, match="no factor 'plate'"):
        back.values("plate")
    with pytest.raises(DataError, match="split 'none' has no row"):
        back.of_split("none")


def test_nothing_is_overwritten(shards: Path, tmp_path: Path) -> None:
    sealed, found = whole(shards)
    save(tmp_path / "out", found, sealed, source={})
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        save(tmp_path / "out", found, sealed, source={})
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_writer_that_fails_leaves_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed, found = whole(shards)

    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(embedding, "samples_table", fails)
    with pytest.raises(DataError, match=r"samples\.parquet: cannot be written: the disk is gone"):
        save(tmp_path / "out", found, sealed, source={})
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_that_is_not_finite_names_the_sample(shards: Path) -> None:
    class Diverged(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            output = images.flatten(1).clone()
            output[2] = torch.nan
            return output

    sealed = ShardSet.open(shards)
    third = sealed.ids[int(sealed.rows_of("test-out")[2])]
    with pytest.raises(DataError, match=rf"sample '{third}'.*NaN or infinite, as are 1 of 7"):
        embed(Diverged(), loaders(sealed, "test-out"))


def test_a_model_without_pooling_is_refused(shards: Path) -> None:
    with pytest.raises(DataError, match=r"\(7, 1, 24, 24\) for 7 images"):
        embed(nn.Identity(), loaders(ShardSet.open(shards), "test-out"))
    with pytest.raises(ConfigError, match="no split"):
        embed(nn.Identity(), [])


@pytest.mark.parametrize("fault", ["cut", "other", "json", "missing", "format"])
def test_damaged_embeddings_are_refused(shards: Path, tmp_path: Path, fault: str) -> None:
    sealed, found = whole(shards)
    folder = tmp_path / "out"
    save(folder, found, sealed, source={})
    features = folder / "features.safetensors"
    if fault == "cut":
        features.write_bytes(features.read_bytes()[:-100])
    elif fault == "other":
        save_file({"features": torch.zeros(3, 4)}, features)
    elif fault == "json":
        (folder / "embeddings.json").write_text("{")
    elif fault == "missing":
        (folder / "samples.parquet").unlink()
    else:
        about = json.loads((folder / "embeddings.json").read_text())
        (folder / "embeddings.json").write_text(json.dumps(about | {"version": 2}))
    with pytest.raises(DataError, match=r"out"):
        load(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def test_the_command_embeds_by_a_backbone_from_a_file(
    shards: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "views.yaml").write_text("size: 32\nmean: [0.5]\nstd: [0.5]\n")
    arguments = ["embed", str(shards), "--out", str(tmp_path / "out"), "--weights", str(weights)]
    arguments += ["--backbone", "test_resnet", "--views", str(tmp_path / "views.yaml")]
    assert main([*arguments, "--format", "npy", "--splits", "test-in"]) == 0
    assert "30 embeddings of width" in capsys.readouterr().out
    assert load(tmp_path / "out").splits == ["test-in"]
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--run, or --backbone together with --weights"),
        (["--backbone", "test_resnet"], "--run, or --backbone together with --weights"),
        (["--run", "somewhere", "--backbone", "test_resnet"], "give no other"),
        (["--run", "nowhere"], "nowhere"),
        (["--format", "pickle"], "format"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    shards: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["embed", str(shards), "--out", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unsealed_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / "MANIFEST.json").unlink()
    options = ["--backbone", "test_resnet", "--weights", "none.pth"]
    assert main(["embed", str(tmp_path / "shards"), "--out", str(tmp_path / "o"), *options]) == 1
