"""Batches of views and metadata: order, sharing among ranks, resume, evaluation."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fino_fast.errors import ConfigError, DataError, MissingExtraError

from .dali_pipeline import DaliDecoding, import_dali
from .dali_views import DaliViews
from .engines import processors
from .files import canonical_json
from .pipeline import Pipeline, pixel_form
from .prefetch import Prefetch, Replace, Skipped, Work
from .sampling import Grouped, Groups, Sampler, Shuffled
from .shardset import DamagedSample, ShardSet
from .torch_pipeline import TorchPipeline
from .views import Draws, Views, evaluation_draws, training_draws

Backend = Literal["auto", "dali", "torch"]
OnError = Literal["raise", "skip"]

# Samples in a row that may be damaged before a place is given up: chance does not get there.
_ATTEMPTS = 50


@dataclass
class Batch:
    """One step's samples of one rank: V views of each of B images."""

    views: torch.Tensor
    """float32 [V, B, C, H, W], normalised."""
    metadata: dict[str, torch.Tensor]
    """By factor, for those asked for: int64 [B] with −1 for missing, or float32 [B]
    or [B, d] with NaN for missing."""
    rows: torch.Tensor
    """int64 [B], sample numbers in the set."""
    boxes: torch.Tensor
    """float32 [V, B, 4]: left, top, right, bottom of the crop in pixels of the stored image."""
    local_views: torch.Tensor | None = None
    """float32 [V', B, C, h, w]."""
    local_boxes: torch.Tensor | None = None
    """float32 [V', B, 4]."""
    skipped: Sequence[Skipped] = ()
    """Damaged samples of this rank whose places others have taken."""


class Loader:
    """Reads one split of a sealed set.

    Every epoch shows each sample exactly once, over all ranks together. All ranks take the same
    number of steps: the samples that do not fill a last batch are shared out evenly, and joined to
    the step before where there are fewer than ranks (so a batch holds at most `batch_size` + 1).
    Sample order, crops and all other draws are functions of (seed, epoch, place in the epoch)
    alone: not of ranks, threads, backend, or where a run was resumed.

    Args:
        shards: the set.
        views: the augmentation recipe.
        batch_size: images a rank and step.
        seed: of order and augmentation.
        split: name of the split; the adaptation split when left out.
        rank, world_size: of this process among those that share the epoch.
        backend: `dali`, `torch`, or the first that is installed.
        device: where views are made; a CUDA device needs DALI.
        drop_last: leave out what does not fill a batch, so that all batches have the same shape.
        threads: decoding threads, at least 1; the processors of this machine when left out.
        factors: names of the factors that batches carry; when left out, those whose role is not
            `ignore`.
        on_error: what a damaged sample does to `epoch`. `raise`: ends it. `skip`: another sample
            takes its place, of the same group where there are groups, drawn by (seed, epoch,
            place), so batches keep their shape, ranks their steps, and a resumed run its course.
            The other one is then shown twice in that epoch. `Batch.skipped` lists what is left out.
        groups: batches of k samples of each value of a factor, see `sampling.grouped_order`. Every
            sample is still shown once an epoch; those of a value that make no full k come at the
            end of it.

    Raises:
        ConfigError: senseless arguments.
        DataError: there is no such split or factor, the split has fewer samples than ranks, or
            its images have no common form.
        MissingExtraError: the backend asked for is not installed.
    """

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        batch_size: int,
        seed: int = 0,
        split: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        backend: Backend = "auto",
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        threads: int | None = None,
        factors: Iterable[str] | None = None,
        on_error: OnError = "raise",
        groups: Groups | None = None,
    ) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"batch_size {batch_size}, rank {rank}, world_size {world_size}: expected "
                "batch_size ≥ 1 and 0 ≤ rank < world_size"
            )
        if threads is not None and threads < 1:
            raise ConfigError(f"threads {threads}: expected 1 or more")
        for name, value, known in (
            ("backend", backend, get_args(Backend)),
            ("on_error", on_error, get_args(OnError)),
        ):
            # A misspelt "raise" would otherwise skip.
            if value not in known:
                raise ConfigError(f"{name} {value!r}: expected one of {', '.join(known)}")
        self.shards = shards
        self.views = views
        self.batch_size = batch_size
        self.seed = seed
        self.split = split or shards.schema.declaration.adaptation_split
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.on_error = on_error
        self.device = torch.device(device)
        self.backend = _choose_backend(backend, self.device)
        self._threads = threads or processors()
        self._samples = shards.split(self.split)
        self._form = pixel_form(shards, self.split, views)
        self.channels = self._form.channels
        """Channels of the views."""
        self.steps_per_epoch = self._steps(len(self._samples))
        if factors is None:
            declared = shards.schema.factors.items()
            factors = [name for name, factor in declared if factor.role != "ignore"]
        self._factors = list(factors)
        for name in self._factors:
            shards.check_factor(name)
        self.groups = groups
        self._sampler = self._build_sampler()
        self._prefetch = Prefetch(shards.read, self._threads)
        self._pipelines: dict[bool, Pipeline] = {}

    def __len__(self) -> int:
        """Samples of the split."""
        return len(self._samples)

    def epoch(
        self, epoch: int, start_step: int = 0, start_sample: int | None = None
    ) -> Iterator[Batch]:
        """The batches of an epoch, from a step or from a place on.

        Args:
            epoch: number of the epoch, from 0.
            start_step: first step to give.
            start_sample: samples of the epoch that all ranks together have already had; for
                resuming with another global batch (`resume_point`), instead of `start_step`.

        Raises:
            ConfigError: there is no such step; or another epoch of this loader began before this
                one was read to its end: a loader reads one at a time.
            DamagedSample: a sample is damaged, and `on_error` is `raise`; the message names id,
                shard and offset.
            DataError: a shard cannot be read, whatever `on_error` is: ranks could not agree on
                what to skip where a disk or store answers one of them and not the other.
        """
        done = start_sample if start_sample is not None else 0
        if start_sample is not None and start_step:
            raise ConfigError(
                f"start_step {start_step}, start_sample {done}: give one of them, where to begin"
            )
        if not 0 <= start_step <= self.steps_per_epoch or not 0 <= done <= len(self):
            raise ConfigError(
                f"start_step {start_step}, start_sample {done}: the epoch has "
                f"{self.steps_per_epoch} steps and {len(self)} samples"
            )
        remaining = len(self) - done

        def draw(places: NDArray[np.int64], rows: NDArray[np.int64]) -> list[Draws]:
            draws = training_draws(self.views, *self._shapes(rows), places, self.seed, epoch)
            return [d for d in draws if d is not None]

        def batches() -> Iterator[Work]:
            for step in range(start_step, self._steps(remaining)):
                places = done + np.array(self._share(*self._span(step, remaining)))
                rows = self._samples.rows(self._sampler.order(places, epoch))
                yield Work(places, rows, draw(places, rows))

        def replace(work: Work, i: int, error: DamagedSample) -> None:
            if self.on_error == "raise":
                raise error
            place, row = int(work.places[i]), int(work.rows[i])
            attempt = sum(skip.place == place for skip in work.skipped)
            if attempt == _ATTEMPTS:
                raise DataError(
                    f"{self.shards.folder}: {attempt} samples that should have taken the place of "
                    f"a damaged one are damaged, too; run `fino-fast verify`. The last: {error}"
                )
            work.skipped.append(Skipped(row, self.shards.id_of(row), place, str(error)))
            other = np.array([self._sampler.substitute(place, epoch, attempt)])
            work.rows[i] = self._samples.rows(other)[0]
            work.draws = draw(work.places, work.rows)

        yield from self._made(self._pipeline(True), batches(), replace)

    def evaluation(self) -> Iterator[Batch]:
        """Every sample of the split once, in order, as one centre crop (V = 1).

        Each rank gets a contiguous part; the last batch may be shorter.

        Raises:
            DataError: a sample cannot be read; the message names id, shard and offset. An
                evaluation never skips one: its figures would be of other samples than they say.
        """
        own = self._share(0, len(self))

        def batches() -> Iterator[Work]:
            for start in range(0, len(own), self.batch_size):
                places = np.array(own[start : start + self.batch_size])
                rows = self._samples.rows(places)
                yield Work(places, rows, [evaluation_draws(self.views, *self._shapes(rows))])

        def refuse(_work: Work, _i: int, error: DamagedSample) -> None:
            raise error

        yield from self._made(self._pipeline(False), batches(), refuse)

    def state(self, epoch: int, step: int) -> dict[str, Any]:
        """What a checkpoint keeps to go on after `step` steps of `epoch`; plain JSON."""
        samples = self._span(step - 1, len(self))[1] if step else 0
        return self._identity() | {
            "epoch": epoch,
            "step": step,
            "samples": samples,
            "global_batch": self.batch_size * self.world_size,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that belongs to other data, another order or other augmentations.

        Raises:
            ConfigError: a field differs; the message names it.
        """
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise ConfigError(
                    f"cannot resume: {name} was {state.get(name)!r} and is now {expected!r}"
                )
        for name in ("epoch", "step", "samples", "global_batch"):
            if not isinstance(state.get(name), int) or state[name] < 0:
                raise ConfigError(f"cannot resume: {name} is {state.get(name)!r}, not a count")
        if state["samples"] > len(self):
            raise ConfigError(
                f"cannot resume: samples is {state['samples']}, the epoch has {len(self)}"
            )

    def resume_point(self, state: dict[str, Any]) -> tuple[int, int]:
        """Epoch and `start_sample` to go on from, also with other ranks or another batch size.

        Raises:
            ConfigError: the state does not belong to this loader.
        """
        self.check_state(state)
        return state["epoch"], state["samples"]

    def _identity(self) -> dict[str, Any]:
        recipe = canonical_json(self.views.model_dump(mode="json"))
        return {
            "manifest": self.shards.manifest_hash,
            "schema": self.shards.schema_hash,
            "seed": self.seed,
            "split": self.split,
            "drop_last": self.drop_last,
            "views": hashlib.sha256(recipe).hexdigest(),
            "groups": self.groups.model_dump() if self.groups else None,
        }

    def _build_sampler(self) -> Sampler:
        if self.groups is None:
            return Shuffled(len(self), self.seed)
        name, size = self.groups.factor, self.groups.size
        self.shards.check_factor(name)
        kind = self.shards.schema.factors[name].kind
        if kind != "categorical":
            raise ConfigError(f"groups.factor: {name!r} is {kind}; expected a categorical factor")
        if self.batch_size % size:
            raise ConfigError(
                f"groups.size: {size} does not divide the {self.batch_size} images of a rank and "
                "step"
            )
        values = self.shards.encoded(name)[self.shards.rows_of(self.split)]
        return Grouped(values.astype(np.int64), size, self.seed)

    def _steps(self, samples: int) -> int:
        """Steps that `samples` samples of an epoch make."""
        full, rest = divmod(samples, self.batch_size * self.world_size)
        if self.drop_last:
            if full == 0 and samples == len(self):
                raise DataError(
                    f"{self.shards.folder}: split {self.split!r} has {samples} samples, fewer "
                    f"than one batch of {self.world_size} × {self.batch_size}"
                )
            return full
        if samples == len(self) and samples < self.world_size:
            raise DataError(
                f"{self.shards.folder}: split {self.split!r} has {samples} samples for "
                f"{self.world_size} ranks"
            )
        return full + (rest >= self.world_size or (full == 0 and rest > 0))

    def _span(self, step: int, samples: int) -> tuple[int, int]:
        """First and last (excluded) place of a step among `samples` samples."""
        size = self.batch_size * self.world_size
        last = step == self._steps(samples) - 1 and not self.drop_last
        return step * size, samples if last else (step + 1) * size

    def _share(self, start: int, end: int) -> range:
        """This rank's part of the places [start, end): the ranks' parts in order are the whole."""
        count = end - start
        low = start + count * self.rank // self.world_size
        high = start + count * (self.rank + 1) // self.world_size
        return range(low, high)

    def _shapes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        records = self.shards.index[rows]
        return records["height"].astype(np.int64), records["width"].astype(np.int64)

    def _made(
        self, pipeline: Pipeline, batches: Iterator[Work], replace: Replace
    ) -> Iterator[Batch]:
        # Closed here and not by the garbage collector, which would swallow a Ctrl-C.
        with contextlib.closing(self._prefetch.run(pipeline, batches, replace)) as made:
            for work, tensors in made:
                yield self._batch(work, tensors)

    def _batch(self, work: Work, tensors: list[torch.Tensor]) -> Batch:
        boxes = [torch.from_numpy(d.boxes.astype(np.float32)) for d in work.draws]
        metadata = {}
        for name, values in self.shards.metadata.of(work.rows, self._factors).items():
            part = torch.from_numpy(values)
            metadata[name] = part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part
        return Batch(
            views=tensors[0],
            metadata=metadata,
            rows=torch.from_numpy(work.rows),
            boxes=boxes[0],
            local_views=tensors[1] if len(tensors) > 1 else None,
            local_boxes=boxes[1] if len(boxes) > 1 else None,
            skipped=tuple(work.skipped),
        )

    def _pipeline(self, training: bool) -> Pipeline:
        if training not in self._pipelines:
            self._pipelines[training] = self._build_pipeline(training)
        return self._pipelines[training]

    def _build_pipeline(self, training: bool) -> Pipeline:
        size = self.batch_size + 1
        common = (self.shards, self.views, self._form, size, self._threads)
        if self.backend == "torch":
            return TorchPipeline(*common)
        if self.device.type == "cpu":
            return DaliDecoding(*common, self.device)
        counts = [(self.views.count if training else 1, self.views.size)]
        if training and self.views.local_count:
            counts.append((self.views.local_count, self.views.local_size))
        return DaliViews(*common, self.device, counts)


def _choose_backend(backend: Backend, device: torch.device) -> Literal["dali", "torch"]:
    if backend == "torch" and device.type != "cpu":
        raise ConfigError("the torch backend makes views on the CPU; use dali for a CUDA device")
    if backend == "auto":
        try:
            import_dali()
        except MissingExtraError:
            if device.type != "cpu":
                raise
            return "torch"
        return "dali"
    if backend == "dali":
        import_dali()
    return backend
