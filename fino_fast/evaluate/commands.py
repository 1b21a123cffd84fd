"""`fino-fast embed` and `fino-fast evaluate`."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import nn

from fino_fast.config import CommandModel
from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.files import LocationField
from fino_fast.data.loader import Backend
from fino_fast.errors import ConfigError
from fino_fast.train.backbone import build_backbone, load_weights
from fino_fast.train.checkpoint import load_backbone

from . import embed as embedding
from .embed import FileFormat
from .evaluation import evaluate, save_evaluation


class Embed(CommandModel):
    """Write the embeddings of sealed shards by a trained run, or by a backbone from a file.

    The output folder holds the features (safetensors or npy) and, row for row, ids, splits and raw
    metadata (Parquet). It appears when it is complete; an existing folder is never overwritten.
    """

    shards: CliPositionalArg[LocationField]
    """Folder of sealed shards: a path or an fsspec URL."""
    out: Path
    """Folder of the embeddings; it must not exist yet."""
    run_path: Path | None = Field(default=None, alias="run")
    """Folder of a training run: its adapted backbone and its image size and normalisation."""
    teacher: bool = False
    """With --run: the moving average instead of the backbone itself."""
    backbone: str | None = None
    """Instead of --run: a timm model name, with --weights."""
    weights: Path | None = None
    """Local checkpoint file of --backbone."""
    views: Path | None = None
    """YAML file with the keys of fino_fast.data.Views (size, mean, std, …) for --backbone."""
    splits: list[str] = Field(default_factory=list)
    """Splits to embed; all when left out."""
    batch_size: int = Field(default=64, ge=1)
    """Images a step."""
    device: str = "cpu"
    """Where the backbone runs: cpu, cuda, cuda:1, …"""
    loader: Backend = "auto"
    """What decodes the images: auto, dali or torch."""
    file_format: FileFormat = Field(default="safetensors", alias="format")
    """Format of the features."""

    def run(self) -> int:
        if self.out.exists():  # before an hour of work, not after it
            raise ConfigError(f"{self.out}: exists already; remove it or choose another folder")
        shards = ShardSet.open(self.shards)
        model, views, source = self._model(shards)
        loaders = [
            Loader(shards, views, self.batch_size, split=split, backend=self.loader)
            for split in self.splits or shards.schema.splits
        ]
        found = embedding.embed(model, loaders, device=self.device)
        embedding.save(self.out, found, shards, source=source, file_format=self.file_format)
        count, width = found.features.shape
        print(f"{self.out}: {count} embeddings of width {width}")
        return 0

    def _model(self, shards: ShardSet) -> tuple[nn.Module, Views, dict[str, str]]:
        if self.run_path is not None:
            if self.backbone or self.weights or self.views:
                raise ConfigError("--run brings backbone, weights and views; give no other")
            model, views = load_backbone(self.run_path, teacher=self.teacher)
            return model, views, {"run": self.run_path.name}
        if self.backbone is None or self.weights is None:
            raise ConfigError("give --run, or --backbone together with --weights")
        if self.teacher:
            raise ConfigError("--teacher belongs to --run")
        views = Views.from_yaml(self.views) if self.views else Views()
        channels = Loader(shards, views, 1, backend=self.loader).channels
        model = build_backbone(self.backbone, channels=channels, image_size=views.size)
        print(load_weights(model, self.weights, name=self.backbone))
        return model, views, {"backbone": self.backbone, "weights": self.weights.name}


class Evaluate(CommandModel):
    """Probe embeddings: how well is a label read, and how well still a nuisance?

    A linear probe with standardised features is fitted on one split and scored on the others:
    balanced accuracy for names, R² for numbers, chance beside it. Writes evaluation.json,
    evaluation.md and evaluation.png.
    """

    embeddings: CliPositionalArg[Path]
    """Folder of `fino-fast embed`."""
    out: Path
    """Folder of the results; it must not exist yet."""
    target: list[str] = Field(default_factory=list)
    """Factors that should be read well: labels, and what was to be preserved."""
    nuisance: list[str] = Field(default_factory=list)
    """Factors that should not be readable; those of role suppress when left out."""
    train: str | None = None
    """Split that the probes learn from; the adaptation split when left out."""
    test: list[str] = Field(default_factory=list)
    """Splits they are scored on; all others when left out."""
    seed: int = Field(default=0, ge=0)
    """Of the probes' cross-validation."""

    def run(self) -> int:
        if self.out.exists():
            raise ConfigError(f"{self.out}: exists already; remove it or choose another folder")
        result = evaluate(
            embedding.load(self.embeddings),
            targets=self.target,
            nuisances=self.nuisance or None,
            train=self.train,
            tests=self.test or None,
            seed=self.seed,
        )
        save_evaluation(result, self.out)
        print((self.out / "evaluation.md").read_text(encoding="utf-8"))
        return 0
