"""The loader: each sample once for any ranks, resume anywhere, one truth for both backends."""

import copy
import gc
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image

from fino_fast.data import Batch, Loader, ShardSet, Views
from fino_fast.data.dali_pipeline import DaliPipeline
from fino_fast.data.dali_views import DaliViews
from fino_fast.data.images import decode
from fino_fast.data.tiff import encode_tiff
from fino_fast.data.views import evaluation_draws, training_draws
from fino_fast.errors import ConfigError, DataError

from .labs import Lab, pixels, png

SMALL = Views(size=16)
RICH = Views(
    size=24,
    local_count=2,
    local_size=12,
    channels=3,
    mean=[0.4, 0.5, 0.6],
    std=[0.2, 0.3, 0.4],
    vflip=0.5,
    brightness=0.3,
    contrast=0.3,
)


def places(loader: Loader, epoch: int, **start: int) -> list[list[int]]:
    """Sample numbers of every step, without decoding anything."""
    return [batch.rows.tolist() for batch in loader.epoch(epoch, **start)]


class NoPixels:
    """Stands in for a pipeline where only order matters."""

    depth = 2

    def __init__(self) -> None:
        self.count = 0

    def submit(self, rows: Any, payloads: Any, draws: Any) -> None:
        self.count += 1

    def result(self) -> list[torch.Tensor]:
        return [torch.zeros(1), torch.zeros(1)]

    def reset(self) -> None:
        self.count = 0


def order_loader(shards: ShardSet, batch_size: int, **options: Any) -> Loader:
    loader = Loader(shards, SMALL, batch_size, backend="torch", **options)
    loader._pipelines = {True: NoPixels(), False: NoPixels()}
    return loader


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 16, 100])
def test_every_epoch_has_each_sample_once_and_equal_steps(
    sealed: ShardSet, ranks: int, batch_size: int
) -> None:
    expected = sealed.rows_of("adapt").tolist()
    for epoch in (0, 1, 5):
        steps = []
        for rank in range(ranks):
            loader = order_loader(sealed, batch_size, rank=rank, world_size=ranks)
            steps.append(places(loader, epoch))
            assert len(steps[-1]) == loader.steps_per_epoch
            assert all(1 <= len(rows) <= batch_size + 1 for rows in steps[-1])
        assert sorted(row for rank in steps for rows in rank for row in rows) == expected


def test_ranks_together_are_the_batches_of_one(sealed: ShardSet) -> None:
    alone = places(order_loader(sealed, 12), 3)
    shared = [places(order_loader(sealed, 4, rank=r, world_size=3), 3) for r in range(3)]
    together = [list(itertools.chain(*rows)) for rows in zip(*shared, strict=True)]
    assert together == alone


def test_epochs_and_seeds_differ(sealed: ShardSet) -> None:
    orders = [
        list(itertools.chain(*places(order_loader(sealed, 8, seed=seed), epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert orders[0] != sorted(orders[0])


def test_drop_last_gives_full_batches_only(sealed: ShardSet) -> None:
    loader = order_loader(sealed, 7, drop_last=True)
    steps = places(loader, 0)
    assert [len(rows) for rows in steps] == [7] * (len(loader) // 7)
    with pytest.raises(DataError, match="fewer than one batch"):
        order_loader(sealed, 49, drop_last=True)


@pytest.mark.parametrize("drop_last", [False, True])
def test_resume_at_every_step(sealed: ShardSet, drop_last: bool) -> None:
    loader = order_loader(sealed, 7, drop_last=drop_last)
    whole = places(loader, 2)
    for step in range(len(whole) + 1):
        state = json.loads(json.dumps(loader.state(2, step)))
        loader.check_state(state)
        assert places(loader, 2, start_step=step) == whole[step:]
        epoch, sample = loader.resume_point(state)
        assert places(loader, epoch, start_sample=sample) == whole[step:]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_resume_with_other_ranks_loses_and_repeats_nothing(sealed: ShardSet, ranks: int) -> None:
    before = [order_loader(sealed, 4, rank=r, world_size=3) for r in range(3)]
    for step in range(before[0].steps_per_epoch + 1):
        seen = [row for loader in before for rows in places(loader, 1)[:step] for row in rows]
        state = before[0].state(1, step)
        assert state["samples"] == len(seen)
        for rank in range(ranks):
            after = order_loader(sealed, 3, rank=rank, world_size=ranks)
            epoch, sample = after.resume_point(state)
            seen += [row for rows in places(after, epoch, start_sample=sample) for row in rows]
        assert sorted(seen) == sealed.rows_of("adapt").tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("manifest", "0" * 64),
        ("schema", "0" * 64),
        ("seed", 1),
        ("split", "test"),
        ("views", ""),
        ("epoch", -1),
        ("samples", 10**6),
        ("step", "3"),
        ("global_batch", None),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_its_field(
    sealed: ShardSet, field: str, value: Any
) -> None:
    loader = Loader(sealed, SMALL, 8, backend="torch")
    with pytest.raises(ConfigError, match=field):
        loader.check_state(loader.state(0, 2) | {field: value})
    content = loader.state(0, 2)
    del content[field]
    with pytest.raises(ConfigError, match=field):
        loader.check_state(content)


def flat(batch: Batch) -> list[torch.Tensor]:
    tensors = [batch.views, batch.rows, batch.boxes, *batch.metadata.values()]
    return tensors + [t for t in (batch.local_views, batch.local_boxes) if t is not None]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_resumed_epoch_is_bit_for_bit_the_uninterrupted_one(
    sealed: ShardSet, backend: Any
) -> None:
    whole = list(Loader(sealed, RICH, 7, seed=3, backend=backend).epoch(4))
    for start in (0, 1, 4):
        resumed = Loader(sealed, RICH, 7, seed=3, backend=backend, threads=1).epoch(4, start)
        for a, b in zip(whole[start:], resumed, strict=True):
            for x, y in zip(flat(a), flat(b), strict=True):
                assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


def test_an_abandoned_epoch_leaves_nothing_behind(sealed: ShardSet) -> None:
    for backend in ("dali", "torch"):
        loader = Loader(sealed, SMALL, 7, backend=backend)
        whole = [batch.views for batch in loader.epoch(1)]
        for stop in (1, 3):
            for _ in itertools.islice(loader.epoch(0), stop):
                pass
            for expected, batch in zip(whole, loader.epoch(1), strict=True):
                assert torch.equal(batch.views, expected)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_an_epoch_is_over_when_another_one_begins(sealed: ShardSet, backend: Any) -> None:
    """Left in its middle, a variable or a notebook's traceback still holds it."""
    loader = Loader(sealed, SMALL, 7, backend=backend)
    whole = [batch.views for batch in loader.epoch(1)]
    left, closed = loader.epoch(0), loader.epoch(0)
    next(left)
    next(closed)
    later = loader.epoch(1)
    found = [next(later).views]
    with pytest.raises(ConfigError, match="make a second Loader"):
        next(left)
    closed.close()
    found += [batch.views for batch in later]
    assert len(found) == len(whole)
    assert all(map(torch.equal, found, whole))


def interrupt() -> None:
    """Ctrl-C, in the main thread, also while it waits."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def break_off(batches: Iterator[Batch], early: bool) -> None:
    """Read an epoch, or one batch of it, until somebody interrupts."""
    next(batches)
    if early:
        batches.close()  # type: ignore[attr-defined]
    for _ in batches:
        pass
    time.sleep(10)  # a signal of another thread may arrive behind the last batch


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which a job in the background starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("place", ["finishing", "scheduled", "resetting"])
def test_the_epoch_after_ctrl_c_is_right(
    sealed: ShardSet, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    loader = Loader(sealed, SMALL, 7, backend="dali")
    whole = [batch.views for batch in loader.epoch(1)]
    pipeline = loader._pipelines[True]
    assert isinstance(pipeline, DaliPipeline)
    finish, submit, reset = pipeline._finish, pipeline._finisher.submit, pipeline.reset
    calls = itertools.count()

    def interrupted_finish(*args: Any) -> list[torch.Tensor]:
        if next(calls) == 2:
            interrupt()
        return finish(*args)

    def interrupted_submit(*args: Any) -> Any:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return submit(*args)

    def interrupted_reset() -> None:
        if next(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        reset()

    with monkeypatch.context() as patch:
        if place == "finishing":
            patch.setattr(pipeline, "_finish", interrupted_finish)
        elif place == "scheduled":
            patch.setattr(pipeline._finisher, "submit", interrupted_submit)
        else:
            patch.setattr(pipeline, "reset", interrupted_reset)
        with pytest.raises(KeyboardInterrupt):
            break_off(loader.epoch(0), early=place == "resetting")
    for expected, batch in zip(whole, loader.epoch(1), strict=True):
        assert torch.equal(batch.views, expected)


def test_a_process_may_end_in_the_middle_of_an_epoch(sealed: ShardSet) -> None:
    """Without a word: a traceback at the end of every script that breaks off hides real ones."""
    code = (
        "from pathlib import Path; from fino_fast.data import Loader, ShardSet, Views\n"
        f"shards = ShardSet.open(Path({str(sealed.folder)!r}))\n"
        "batches = Loader(shards, Views(size=8), 4, backend='dali').epoch(0)\n"
        "next(batches)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def graph_loader(shards: ShardSet, views: Views, batch_size: int) -> Loader:
    """A loader whose views are made as on a GPU, by DALI's operators, but on the CPU."""
    loader = Loader(shards, views, batch_size, backend="dali")
    counts = [(views.count, views.size), (views.local_count, views.local_size)]
    common = (shards, views, loader._form, batch_size + 1, 2, torch.device("cpu"))
    loader._pipelines = {
        True: DaliViews(*common, [(count, size) for count, size in counts if count]),
        False: DaliViews(*common, [(1, views.size)]),
    }
    return loader


# The first differ by nothing but rounding. DALI's operators weight pixels at a box's border
# differently.
@pytest.mark.parametrize(("dali_graph", "mean", "most"), [(False, 1e-5, 1e-3), (True, 0.02, 0.6)])
@pytest.mark.parametrize("views", [SMALL, RICH, Views(size=20, normalize=False)])
def test_dali_and_torch_give_the_same_samples_boxes_and_nearly_pixels(
    sealed: ShardSet, views: Views, dali_graph: bool, mean: float, most: float
) -> None:
    loaders = [
        graph_loader(sealed, views, 9) if dali_graph else Loader(sealed, views, 9, backend="dali"),
        Loader(sealed, views, 9, backend="torch"),
    ]
    for run in (lambda each: each.epoch(2), lambda each: each.evaluation()):
        for dali, plain in zip(*[run(each) for each in loaders], strict=True):
            assert torch.equal(dali.rows, plain.rows)
            assert torch.equal(dali.boxes, plain.boxes)
            pairs = [(dali.views, plain.views)]
            if dali.local_views is not None and plain.local_views is not None:
                pairs.append((dali.local_views, plain.local_views))
            for a, b in pairs:
                assert a.shape == b.shape
                assert a.is_contiguous()
                error = (a - b).abs()
                assert error.mean() < mean
                assert error.max() < most


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_an_image_of_another_shape_than_the_index_says_is_damaged(
    lab: Lab, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.ingest()
    shards = lab.open()
    row = int(shards.rows_of("adapt")[3])
    index = np.array(shards.index)
    index["height"][row] += 1
    monkeypatch.setattr(shards, "index", index)
    with pytest.raises(DataError, match=f"sample {shards.ids[row]!r} .* the index says"):
        list(Loader(shards, SMALL, 4, backend=backend).epoch(0))
    batches = list(Loader(shards, SMALL, 4, backend=backend, on_error="skip").epoch(0))
    assert [skip.row for batch in batches for skip in batch.skipped] == [row]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_views_are_what_was_drawn(sealed: ShardSet, backend: Any) -> None:
    """Boxes, flips, brightness and contrast against PIL and the formula of `affine`."""
    views = Views(
        size=20, mean=[0.25], std=[0.5], brightness=0.5, contrast=0.5, hflip=0.5, vflip=0.5
    )
    batch = next(Loader(sealed, views, 12, backend=backend).epoch(0))
    records = sealed.index[batch.rows.numpy()]
    heights, widths = records["height"].astype(np.int64), records["width"].astype(np.int64)
    draws, _ = training_draws(views, heights, widths, np.arange(12), seed=0, epoch=0)
    np.testing.assert_array_equal(draws.boxes, batch.boxes.numpy())
    assert draws.hflip.any()
    assert draws.vflip.any()
    for v, i in itertools.product(range(2), range(12)):
        row = int(batch.rows[i])
        image = decode(sealed.read(row), sealed.extension(row))[:, :, 0]
        left, top, right, bottom = draws.boxes[v, i]
        crop = Image.fromarray(image[top:bottom, left:right].astype(np.float32) / 255)
        x = np.asarray(crop.resize((20, 20), Image.Resampling.BILINEAR))
        x = x[:, ::-1] if draws.hflip[v, i] else x
        x = x[::-1] if draws.vflip[v, i] else x
        b, c = draws.brightness[v, i], draws.contrast[v, i]
        expected = (b * (0.25 + c * (x - 0.25)) - 0.25) / 0.5
        error = np.abs(batch.views[v, i, 0].numpy() - expected)
        assert error.max() < 0.02


def test_metadata_is_what_the_loss_takes(sealed: ShardSet) -> None:
    batch = next(Loader(sealed, SMALL, 10, backend="torch").epoch(0))
    rows = batch.rows.numpy()
    assert set(batch.metadata) == {"camera", "exposure", "hour", "defects"}
    assert batch.metadata["camera"].dtype == torch.int64
    np.testing.assert_array_equal(batch.metadata["camera"], sealed.encoded("camera")[rows])
    assert batch.metadata["exposure"].shape == (10,)
    np.testing.assert_array_equal(batch.metadata["exposure"], sealed.encoded("exposure")[rows, 0])
    assert batch.metadata["hour"].shape == (10, 2)
    assert batch.metadata["defects"].shape == (10, 2)
    chosen = next(Loader(sealed, SMALL, 4, backend="torch", factors=["label"]).epoch(0))
    assert list(chosen.metadata) == ["label"]
    with pytest.raises(DataError, match="no factor 'nonsense'"):
        Loader(sealed, SMALL, 4, factors=["nonsense"])


def test_evaluation_gives_every_sample_once_in_order(sealed: ShardSet) -> None:
    for ranks in (1, 3):
        rows = []
        for rank in range(ranks):
            loader = order_loader(sealed, 7, split="test", rank=rank, world_size=ranks)
            rows += [row for batch in loader.evaluation() for row in batch.rows.tolist()]
        assert rows == sealed.rows_of("test").tolist()
    batch = next(Loader(sealed, SMALL, 5, split="test").evaluation())
    assert batch.views.shape == (1, 5, 1, 16, 16)


def test_evaluation_crop_is_the_centred_square() -> None:
    heights, widths = np.array([10, 7]), np.array([7, 12])
    whole = evaluation_draws(SMALL, heights, widths).boxes[0]
    assert whole.tolist() == [[0, 1, 7, 8], [2, 0, 9, 7]]
    part = evaluation_draws(Views(size=4, evaluation_crop=0.5), heights, widths).boxes[0]
    assert part.tolist() == [[1, 3, 5, 7], [4, 1, 8, 5]]


def test_boxes_stay_inside_and_cover_the_asked_share() -> None:
    views = Views(size=8, count=3, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    heights = np.array([1, 2, 300, 300, 5000, 9])
    widths = np.array([1, 300, 300, 31, 2, 4000])
    for epoch in range(50):
        draws, _ = training_draws(views, heights, widths, np.arange(6), 0, epoch)
        left, top, right, bottom = np.moveaxis(draws.boxes, -1, 0)
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left < right).all()
        assert (top < bottom).all()
        assert (right <= widths).all()
        assert (bottom <= heights).all()
        share = ((right - left) * (bottom - top) / (heights * widths))[:, 2]
        assert ((share > 0.19) & (share < 0.61)).all()


@pytest.mark.parametrize(
    ("form", "declared", "white"),
    [
        ("png16", {"bits_used": 12}, 4095.0),
        ("tiff16x5", {}, 65535.0),
        ("float32x2", {"scale": 200.0}, 200.0),
        ("float32x1", {}, 1.0),
    ],
)
def test_deep_and_many_channelled_images(
    lab: Lab, form: str, declared: dict[str, Any], white: float
) -> None:
    channels = 1 if form == "png16" else int(form[-1])
    dtype = np.float32 if form.startswith("float") else np.uint16

    def image(i: int) -> np.ndarray:
        planes = [pixels(i + c, 20, 20).astype(np.float64) / 255 * white for c in range(channels)]
        return np.stack(planes, axis=-1).astype(dtype)

    def encode(i: int) -> bytes:
        if form == "png16":
            return bytes(imagecodecs.png_encode(image(i)[:, :, 0]))
        return encode_tiff(image(i))

    for i, row in enumerate(lab.rows):
        row["file"] = f"deep{i}.img"
        (lab.images / row["file"]).write_bytes(encode(i))
    lab.schema["images"] = declared
    lab.ingest()
    shards = lab.open()
    views = Views(size=20, mean=[0.0], std=[1.0])
    for backend in ("dali", "torch"):
        for batch in Loader(shards, views, 6, backend=backend).evaluation():
            for row, view in zip(batch.rows.tolist(), batch.views[0], strict=True):
                source = image(int(shards.ids[row][1:])).astype(np.float64) / white
                np.testing.assert_allclose(view.numpy(), source.transpose(2, 0, 1), atol=1e-5)


def test_images_without_a_common_form_are_refused_by_name(lab: Lab) -> None:
    (lab.images / "0003.png").write_bytes(png(pixels(3, channels=3)))
    lab.rows[3]["split"] = "adapt"
    lab.ingest()
    with pytest.raises(DataError, match=r"images of \[1, 3\] channels in one split"):
        Loader(lab.open(), SMALL, 4)
    for backend in ("dali", "torch"):
        batches = list(Loader(lab.open(), Views(size=8, channels=3), 4, backend=backend).epoch(0))
        assert all(batch.views.shape[2] == 3 for batch in batches)
    with pytest.raises(DataError, match="only grey images are expanded"):
        Loader(lab.open(), Views(size=8, channels=1), 4)


def test_mixed_number_types_are_refused(lab: Lab) -> None:
    lab.rows[1]["split"] = "adapt"
    (lab.images / "0001.png").write_bytes(
        bytes(imagecodecs.png_encode(pixels(1).astype(np.uint16)))
    )
    lab.ingest()
    with pytest.raises(DataError, match=r"\['uint16', 'uint8'\]"):
        Loader(lab.open(), SMALL, 4)


def test_senseless_arguments(sealed: ShardSet) -> None:
    with pytest.raises(ConfigError, match="rank"):
        Loader(sealed, SMALL, 4, rank=2, world_size=2)
    with pytest.raises(DataError, match="no split 'val'"):
        Loader(sealed, SMALL, 4, split="val")
    with pytest.raises(ConfigError, match=r"views\.mean has 3 values for 1 channels"):
        Loader(sealed, Views(mean=[0.1, 0.2, 0.3]), 4)
    with pytest.raises(DataError, match="12 samples for 20 ranks"):
        Loader(sealed, SMALL, 4, split="test", world_size=20)
    with pytest.raises(ConfigError, match="start_step"):
        next(Loader(sealed, SMALL, 4).epoch(0, start_step=99))
    with pytest.raises(ConfigError, match="start_sample 8: give one"):
        next(Loader(sealed, SMALL, 4).epoch(0, start_step=1, start_sample=8))
    with pytest.raises(ConfigError, match="backend"):
        Loader(sealed, SMALL, 4, backend="torch", device="cuda")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"backend": "dalli"}, "backend 'dalli': expected one of auto, dali, torch"),
        ({"on_error": "rise"}, "on_error 'rise': expected one of raise, skip"),
        ({"threads": 0}, "threads 0: expected 1 or more"),
    ]
    for arguments, told in wrong:
        with pytest.raises(ConfigError, match=told):
            Loader(sealed, SMALL, 4, **arguments)


def test_a_set_that_is_gone_leaves_no_file_open(lab: Lab) -> None:
    """Nor does a copy of it, as another process gets one."""
    lab.ingest()

    def open_files() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum(link.resolve().parent == lab.out.resolve() for link in links)

    def read_all() -> int:
        shards = lab.open()
        for each in (shards, copy.copy(shards)):
            for row in range(len(each)):
                each.read(row)
        return open_files()

    assert read_all() == 2 * 2 + 1  # two shards for each, and the index that they share
    gc.collect()
    assert open_files() == 0


def test_opening_reads_no_more_than_the_index(sealed: ShardSet, tmp_path: Path) -> None:
    """28 bytes a sample, and only what is asked for of the rest."""
    assert sealed.index.dtype.itemsize == 28
    assert isinstance(sealed.index, np.memmap)
    assert "ids" not in ShardSet.open(sealed.folder).__dict__
