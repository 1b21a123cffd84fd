"""Features of a sealed set by a frozen backbone, and the folder they are kept in.

    features.safetensors   one tensor `features` [n, D] float32    (or features.npy)
    samples.parquet        row for row: `row`, `id`, `split`, and each factor's raw values
    embeddings.json        count, width, and the hashes of set and schema they belong to

The folder appears under its name when it is complete, and is never written into afterwards.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fino_fast.data import Loader, ShardSet
from fino_fast.data.files import committed, committed_folder, read_json, write_json
from fino_fast.errors import ConfigError, DataError, MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import safetensors.numpy
    from tqdm import tqdm
except ImportError as error:
    raise MissingExtraError(error.name or "safetensors", "evaluate") from error

FORMAT = "fino-fast embeddings"
FEATURES, SAMPLES, ABOUT = "features", "samples.parquet", "embeddings.json"
OWN_COLUMNS = ("row", "id", "split")
FileFormat = Literal["safetensors", "npy"]
Values = list[str | None] | NDArray[np.float64]


@dataclass(frozen=True)
class Embeddings:
    """What a backbone says of the samples of a set.

    Attributes:
        rows: int64 [n], sample numbers in the set.
        features: float32 [n, D].
    """

    rows: NDArray[np.int64]
    features: NDArray[np.float32]


def embed(
    backbone: nn.Module, loaders: Iterable[Loader], *, device: torch.device | str = "cpu"
) -> Embeddings:
    """Embed every sample of the loaders' splits once, as its centre crop, without augmentation.

    Args:
        backbone: maps images [B, C, H, W] to embeddings [B, D]; run in evaluation mode and left in
            the mode it was in.
        loaders: one for each split.
        device: where the backbone runs.

    Raises:
        DataError: a sample cannot be read, or its embedding is not one finite vector; the message
            names the sample.
    """
    training = backbone.training
    backbone.to(device).eval()
    rows, features = [], []
    try:
        for loader in loaders:
            with tqdm(total=len(loader), unit="image", desc=loader.split, disable=None) as bar:
                for batch in loader.evaluation():
                    # Channels last: the layout that convolutions are fastest in.
                    images = batch.views[0].to(device, memory_format=torch.channels_last)
                    with torch.inference_mode():
                        output = backbone(images).float().cpu()
                    check_output(output, batch.rows, loader.shards)
                    rows.append(batch.rows.numpy())
                    features.append(output.numpy())
                    bar.update(len(batch.rows))
    finally:
        backbone.train(training)
    if not rows:
        raise ConfigError("nothing to embed: no split was given")
    return Embeddings(np.concatenate(rows), np.concatenate(features))


def check_output(output: torch.Tensor, rows: torch.Tensor, shards: ShardSet) -> None:
    if output.ndim != 2:
        raise DataError(
            f"the backbone gives {tuple(output.shape)} for {len(rows)} images; expected [B, D]: "
            "pool its tokens or its feature map"
        )
    wrong = ~output.isfinite().all(dim=1)
    if wrong.any():
        raise DataError(
            f"{shards.describe(int(rows[wrong][0]))}: its embedding is NaN or infinite, as are "
            f"{int(wrong.sum())} of {len(rows)} in this batch; the backbone has diverged"
        )


def save(
    folder: Path,
    embeddings: Embeddings,
    shards: ShardSet,
    *,
    source: dict[str, Any],
    file_format: FileFormat = "safetensors",
) -> None:
    """Write embeddings with the ids and raw metadata of their samples.

    Args:
        folder: made here; it must not exist.
        embeddings: of samples of `shards`.
        source: what made them, for `embeddings.json`.

    Raises:
        ConfigError: `folder` exists.
        DiskFullError: no room left; nothing is left of the folder.
    """
    with committed_folder(folder) as draft:
        features = np.ascontiguousarray(embeddings.features)
        with committed(draft / f"{FEATURES}.{file_format}") as file:
            if file_format == "npy":
                np.save(file, features, allow_pickle=False)
            else:
                file.write(safetensors.numpy.save({FEATURES: features}))
        with committed(draft / SAMPLES) as file:
            pq.write_table(samples_table(embeddings.rows, shards), file)
        write_json(
            draft / ABOUT,
            {
                "format": FORMAT,
                "version": 1,
                "count": len(features),
                "width": features.shape[1],
                "file": f"{FEATURES}.{file_format}",
                "roles": {name: factor.role for name, factor in shards.schema.factors.items()},
                "manifest_hash": shards.manifest_hash,
                "schema_hash": shards.schema_hash,
                "adaptation_split": shards.schema.declaration.adaptation_split,
                "source": source,
            },
        )


def samples_table(rows: NDArray[np.int64], shards: ShardSet) -> pa.Table:
    clash = sorted(set(shards.schema.factors) & set(OWN_COLUMNS))
    if clash:
        raise ConfigError(f"factor {clash[0]!r}: the name is taken by a column of {SAMPLES}")
    ids = list(shards.ids)
    columns: dict[str, Any] = {
        "row": rows,
        "id": [ids[row] for row in rows],
        "split": pa.array(shards.splits[rows].tolist()).dictionary_encode(),
    }
    for name in shards.schema.factors:
        raw = shards.raw(name)
        if isinstance(raw, np.ndarray):
            chosen = raw[rows]
            columns[name] = pa.array(chosen.tolist() if chosen.ndim > 1 else chosen)
        else:
            several = shards.schema.factors[name].kind == "multi"
            kind = pa.list_(pa.string()) if several else pa.string()
            columns[name] = pa.array([raw[row] for row in rows], type=kind)
    return pa.table(columns)


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings read back from their folder.

    Attributes:
        features: float32 [n, D].
        samples: one row for each row of `features`.
        about: the content of `embeddings.json`.
    """

    features: NDArray[np.float32]
    samples: pa.Table
    about: dict[str, Any]

    @property
    def factors(self) -> list[str]:
        return [name for name in self.samples.column_names if name not in OWN_COLUMNS]

    @property
    def splits(self) -> list[str]:
        """Names of the splits, the adaptation split first."""
        names = sorted(set(self.samples["split"].to_pylist()))
        first = self.about["adaptation_split"]
        return sorted(names, key=lambda name: (name != first, name))

    def of_split(self, split: str) -> NDArray[np.int64]:
        """Positions of the rows of a split.

        Raises:
            DataError: there is none.
        """
        names = np.array(self.samples["split"].to_pylist(), dtype=object)
        rows = np.flatnonzero(names == split)
        if not len(rows):
            raise DataError(f"split {split!r} has no row; the embeddings hold {self.splits}")
        return rows

    def values(self, factor: str) -> Values:
        """A factor's raw values: names with None for missing, or float64 [n] with NaN.

        Raises:
            DataError: there is no such factor, or it has several values a row.
        """
        if factor not in self.factors:
            raise DataError(f"no factor {factor!r}; the embeddings hold {self.factors}")
        column = self.samples[factor]
        if pa.types.is_string(column.type):
            names: list[str | None] = column.to_pylist()
            return names
        if pa.types.is_floating(column.type):
            return np.array(column.to_pylist(), dtype=np.float64)
        raise DataError(f"factor {factor!r}: a probe reads one value a row, found {column.type}")


def load(folder: Path) -> EmbeddingSet:
    """Read a folder that `save` wrote.

    Raises:
        DataError: it is none, or its parts do not belong together.
    """
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT or about.get("version") != 1:
        raise DataError(f"{folder / ABOUT}: is not of the format {FORMAT!r}, version 1")
    path = folder / str(about.get("file"))
    try:
        if path.suffix == ".npy":
            features = np.load(path, allow_pickle=False)
        else:
            features = safetensors.numpy.load_file(path)[FEATURES]
        samples = pq.read_table(folder / SAMPLES)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError, pa.ArrowException) as error:
        raise DataError(f"{folder}: cannot be read: {error}") from error
    expected = (about.get("count"), about.get("width"))
    if features.shape != expected or len(samples) != expected[0]:
        raise DataError(
            f"{folder}: {features.shape} features and {len(samples)} samples; {ABOUT} says "
            f"{json.dumps(expected)}"
        )
    return EmbeddingSet(features, samples, about)
