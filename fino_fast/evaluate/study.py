"""One seed of the demo, from images on disk to measurements: lab → shards → arms → probes.

Every step leaves a folder that is either whole or absent, so a study that was interrupted goes on
where it stopped, and one that is complete is only read.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fino_fast.config import StrictModel
from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import LocalEngine
from fino_fast.data.files import TEMPORARY, read_json, write_json
from fino_fast.data.ingest import Request, ingest
from fino_fast.train import TrainConfig, train
from fino_fast.train.backbone import build_backbone, load_weights
from fino_fast.train.checkpoint import checkpoints, load_backbone
from fino_fast.train.config import (
    BackboneConfig,
    ContrastiveConfig,
    FactorOverride,
    OptimizerConfig,
    ProjectorConfig,
    RampConfig,
)

from . import embed as embedding
from .cells import ADAPT, TEST_IN, TEST_OUT, Cells, Plan, plan_shots, write_lab
from .evaluation import read_factor
from .pretrained import BACKBONE, MEAN, STD, write_weights

FROZEN, CONTROL, FINO = "frozen", "contrastive only", "FINO"
ARMS = (FROZEN, CONTROL, FINO)
GUIDES = ("camera", "exposure", "module_type")
RESULT = "result.json"


class Settings(StrictModel):
    """Everything that a seed's result depends on, but the seed. `docs/demo.md` says how they were
    chosen; both adapted arms share all of them, and the guides' own are FINO's alone."""

    image_size: int = 64
    """Side of the views in pixels."""
    batch_size: int = 64
    """Images a step."""
    epochs: int = 1
    """Times that each image of the adaptation split is seen."""
    lr: float = 3e-4
    """Full learning rate."""
    layer_decay: float = 0.75
    """Each layer of the backbone learns this many times as fast as the one above it."""
    crop: float = 0.5
    """Least share of the image's area that a view covers."""
    jitter: float = 0.3
    """Brightness and contrast of the views are changed by up to this share."""
    temperature: float = 0.1
    """τ of the contrastive term."""
    suppress_weight: float = 3.0
    """Weight of the reversed guides (camera, exposure)."""
    suppress_orthogonal: float = 100.0
    """Weight of the share of variance that camera and exposure explain."""
    preserve_weight: float = 0.1
    """Weight of the guide of the module type."""
    preserve_orthogonal: float = 0.01
    """Weight of the overlap of the module type's subspace with the rest."""

    @property
    def views(self) -> Views:
        return Views(
            size=self.image_size,
            scale=(self.crop, 1.0),
            hflip=0.5,
            vflip=0.5,
            brightness=self.jitter,
            contrast=self.jitter,
            mean=[MEAN],
            std=[STD],
        )


class Study:
    """One seed of the demo in one folder.

    Args:
        folder: of this seed; made where it is missing.
        seed: of cameras, assignment, gaps and training.
        settings: what the result depends on.
        plan: `report`, or `select` without test cells and held-out cameras (see `cells`).
        say: gets a line as each step begins.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        settings: Settings,
        *,
        plan: Plan = "report",
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.settings = settings
        self.plan = plan
        self.say = say
        self.seconds: dict[str, float] = {}

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()

    def run(self, cells: Callable[[], Cells], arms: tuple[str, ...] = ARMS) -> dict[str, Any]:
        """Measure the arms, or read what was measured before.

        Args:
            cells: gives the scenes; called only where pictures are still to be taken.

        Returns:
            The content of `result.json`: measurements of each arm, cameras, seconds.

        Raises:
            DataError, ConfigError: a step's own.
            TrainingInterrupted: Ctrl-C during training; a later run goes on there.
        """
        if self.finished:
            return read_json(self.folder / RESULT)
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = self._shards(cells)
        weights = self._weights()
        measured = {}
        for arm in arms:
            backbone = self._backbone(arm, weights, shards)
            measured[arm] = self._measure(arm, backbone, shards)
        result = {
            "seed": self.seed,
            "plan": self.plan,
            "arms": measured,
            "samples": {split: len(shards.split(split)) for split in shards.schema.splits},
            "manifest_hash": shards.manifest_hash,
            "seconds": self.seconds,
        }
        write_json(self.folder / RESULT, result)
        return result

    def _shards(self, cells: Callable[[], Cells]) -> ShardSet:
        lab, shards = self.folder / "lab", self.folder / "shards"
        if not lab.exists():
            with self._step("imaging", "the cameras take their pictures"):
                draft = self.folder / f"{TEMPORARY}lab"
                shutil.rmtree(draft, ignore_errors=True)
                scenes = cells()
                write_lab(scenes, plan_shots(scenes, self.seed, self.plan), self.seed, draft)
                draft.rename(lab)
        with self._step("ingest", "table and images become sealed shards"):
            request = Request(
                table=lab / "cells.csv",
                images=lab / "images",
                id_column="id",
                path_column="file",
                declaration=Declaration.from_yaml(lab / "schema.yaml"),
                out=shards,
                seed=self.seed,
            )
            ingest(request, LocalEngine(os.cpu_count() or 1))
        return ShardSet.open(shards)

    def _weights(self) -> Path:
        path = self.folder / "backbone.safetensors"
        return path if path.exists() else write_weights(path)

    def _backbone(self, arm: str, weights: Path, shards: ShardSet) -> nn.Module:
        """The arm's backbone, trained here unless it is the frozen one."""
        if arm == FROZEN:
            backbone = build_backbone(BACKBONE, channels=self._loader(shards, ADAPT).channels)
            load_weights(backbone, weights, name=BACKBONE)
            return backbone
        run = self.folder / slug(arm)
        resume = bool(checkpoints(run))
        if run.exists() and not resume:
            shutil.rmtree(run)  # stopped before its first checkpoint: nothing to go on from
        with self._step(f"train {slug(arm)}", f"adaptation, {arm}"):
            train(self.training(arm, run, weights), resume=resume)
        return load_backbone(run)[0]

    def training(self, arm: str, run: Path, weights: Path) -> TrainConfig:
        """The configuration of an adapted arm; the control's guides are switched off, no more."""
        own = self.settings
        if arm == CONTROL:
            factors = {name: FactorOverride(role="ignore") for name in GUIDES}
        else:
            suppress = FactorOverride(
                weight=own.suppress_weight, orthogonal=own.suppress_orthogonal
            )
            preserve = FactorOverride(
                weight=own.preserve_weight, orthogonal=own.preserve_orthogonal
            )
            factors = {"camera": suppress, "exposure": suppress, "module_type": preserve}
        return TrainConfig(
            data=self.folder / "shards",
            output=run,
            backbone=BackboneConfig(name=BACKBONE, weights=weights, batch_statistics="kept"),
            views=own.views,
            projector=ProjectorConfig(hidden=(512,), width=128),
            contrastive=ContrastiveConfig(temperature=own.temperature),
            factors=factors,
            ramp=RampConfig(),
            optimizer=OptimizerConfig(lr=own.lr, layer_decay=own.layer_decay),
            teacher=None,
            epochs=own.epochs,
            batch_size=own.batch_size,
            seed=self.seed,
        )

    def _measure(self, arm: str, backbone: nn.Module, shards: ShardSet) -> dict[str, float]:
        folder = self.folder / "embeddings" / slug(arm)
        if not folder.exists():
            with self._step(f"embed {slug(arm)}", f"embeddings, {arm}"):
                splits = (ADAPT, TEST_IN, TEST_OUT)
                found = embedding.embed(backbone, [self._loader(shards, s) for s in splits])
                embedding.save(folder, found, shards, source={"arm": arm, "seed": self.seed})
        embeddings = embedding.load(folder)
        with self._step(f"probe {slug(arm)}", f"probes, {arm}"):
            read = {
                factor: read_factor(embeddings, factor, ADAPT, (TEST_IN, TEST_OUT), seed=self.seed)
                for factor in ("defect", *GUIDES)
            }
        return {
            "in domain": read["defect"][TEST_IN].score,
            "out of domain": read["defect"][TEST_OUT].score,
            "camera": read["camera"][TEST_IN].score,
            "camera chance": read["camera"][TEST_IN].chance,
            "exposure R²": read["exposure"][TEST_IN].score,
            "module type": read["module_type"][TEST_OUT].score,
        }

    def _loader(self, shards: ShardSet, split: str) -> Loader:
        return Loader(shards, self.settings.views, self.settings.batch_size, split=split)

    @contextmanager
    def _step(self, name: str, line: str) -> Iterator[None]:
        self.say(f"  {line} …")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def slug(arm: str) -> str:
    """An arm's name as a folder's."""
    return arm.lower().replace(" ", "-")
