"""Damaged samples while training: named, or replaced so that nothing else changes."""

import errno
import itertools
import shutil
import struct
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.dali_pipeline import DaliPipeline
from fino_fast.data.index import place_of
from fino_fast.data.remote import Remote
from fino_fast.errors import ConfigError, DataError

from .labs import Lab
from .stores import put_folder
from .test_loader import SMALL, order_loader

BAD_IDS = ["s0006", "s0021", "s0043"]


def damage(folder: Path, ids: list[str]) -> ShardSet:
    """Flip a byte in the middle of the images with these ids."""
    shards = ShardSet.open(folder)
    for row in (list(shards.ids).index(each) for each in ids):
        shard, offset, size = place_of(shards.index[row])
        name = shards.manifest.shards[shard].name
        with (folder / f"{name}.tar").open("r+b") as tar:
            place = offset + size // 2
            tar.seek(place)
            byte = tar.read(1)[0]
            tar.seek(place)
            tar.write(bytes([byte ^ 0xFF]))
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def damaged(sealed: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """48 samples to adapt on, three of them damaged after sealing."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(sealed.folder, folder)
    return damage(folder, BAD_IDS)


def shown(loader: Loader, epoch: int, **start: int) -> list[tuple[list[int], list[str]]]:
    """Rows and skipped ids of every step."""
    return [
        (batch.rows.tolist(), [skip.id for skip in batch.skipped])
        for batch in loader.epoch(epoch, **start)
    ]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_raise_names_id_shard_and_offset(damaged: ShardSet, backend: Any) -> None:
    with pytest.raises(DataError, match=r"sample 's00\d\d' in .*shard-0000-\d+\.tar at offset \d+"):
        list(Loader(damaged, SMALL, 7, backend=backend).epoch(0))


def test_the_others_stay_where_they_were(damaged: ShardSet, sealed: ShardSet) -> None:
    """Every sound sample in its own place once; a damaged one's place is taken by a sound one."""
    bad = {list(sealed.ids).index(each) for each in BAD_IDS}
    for epoch in range(3):
        whole = [rows for rows, _ in shown(order_loader(sealed, 7), epoch)]
        found = shown(order_loader(damaged, 7, on_error="skip"), epoch)
        skipped = list(itertools.chain(*(ids for _, ids in found)))
        # One of them may be drawn for the place of another, and is listed then, too.
        assert set(skipped) == set(BAD_IDS)
        for expected, (rows, _) in zip(whole, found, strict=True):
            for was, now in zip(expected, rows, strict=True):
                assert (now == was) == (was not in bad)
                assert now not in bad
        counts = Counter(itertools.chain(*(rows for rows, _ in found)))
        assert counts.keys() == set(sealed.rows_of("adapt").tolist()) - bad
        assert sum(counts.values()) == 48
    assert damaged.describe(next(iter(bad))) in "".join(
        skip.reason
        for batch in order_loader(damaged, 7, on_error="skip").epoch(0)
        for skip in batch.skipped
    )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_together_show_what_one_shows(damaged: ShardSet, ranks: int, drop_last: bool) -> None:
    options: dict[str, Any] = {"on_error": "skip", "drop_last": drop_last}
    alone = shown(order_loader(damaged, 12, **options), 1)
    parts = [
        shown(order_loader(damaged, 12 // ranks, rank=r, world_size=ranks, **options), 1)
        for r in range(ranks)
    ]
    for (rows, ids), *shares in zip(alone, *parts, strict=True):
        assert rows == list(itertools.chain(*(part for part, _ in shares)))
        assert ids == list(itertools.chain(*(part for _, part in shares)))
        if drop_last:
            assert {len(part) for part, _ in shares} == {12 // ranks}


def test_resumed_at_every_step(damaged: ShardSet) -> None:
    loader = order_loader(damaged, 5, on_error="skip")
    whole = shown(loader, 2)
    for step in range(len(whole) + 1):
        assert shown(loader, 2, start_step=step) == whole[step:]
        _, sample = loader.resume_point(loader.state(2, step))
        assert shown(loader, 2, start_sample=sample) == whole[step:]


def spoil_pixels(path: Path) -> None:
    """Make a PNG's compressed pixels senseless; all checksums of its chunks stay right."""
    data = path.read_bytes()
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    chunk = b"IDAT" + bytes(length)
    rest = data[start + 4 + length + 4 :]
    path.write_bytes(data[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + rest)


@pytest.mark.parametrize("late", [False, True])
def test_both_pipelines_replace_what_does_not_decode(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Images that were damaged before an unchecked ingest: their checksums are right. DALI loses
    the batches in work with its graph, and sound ones before it, too, where they are taken late."""
    if late:
        finish = DaliPipeline._finish

        def wait_and_finish(*args: Any) -> list[torch.Tensor]:
            time.sleep(0.2)
            return finish(*args)

        monkeypatch.setattr(DaliPipeline, "_finish", wait_and_finish)
    for name in ("0001.png", "0009.png", "0013.png"):
        spoil_pixels(lab.images / name)
    lab.ingest(check=False)
    found = {}
    for backend in ("dali", "torch"):
        with pytest.raises(DataError, match=r"sample 's00\d\d' in .*at offset"):
            list(Loader(lab.open(), SMALL, 4, backend=backend).epoch(0))
        loader = Loader(lab.open(), SMALL, 4, backend=backend, on_error="skip")
        found[backend] = list(loader.epoch(0)) + list(loader.epoch(1))
    for dali, plain in zip(found["dali"], found["torch"], strict=True):
        assert torch.equal(dali.rows, plain.rows)
        assert torch.equal(dali.boxes, plain.boxes)
        assert [skip.id for skip in dali.skipped] == [skip.id for skip in plain.skipped]
        assert (dali.views - plain.views).abs().mean() < 0.02
        torch.testing.assert_close(dali.metadata, plain.metadata, equal_nan=True)
    ids = [skip.id for batch in found["dali"] for skip in batch.skipped]
    assert {"s0001", "s0009", "s0013"} == set(ids)


def test_views_are_those_of_the_sample_that_is_shown(damaged: ShardSet, sealed: ShardSet) -> None:
    """The crop fits the other image's size, and its metadata come along."""
    skipping = Loader(damaged, SMALL, 7, backend="torch", on_error="skip")
    for batch in skipping.epoch(0):
        records = sealed.index[batch.rows.numpy()]
        assert (batch.boxes[:, :, 2] <= torch.from_numpy(records["width"].astype("f4"))).all()
        assert (batch.boxes[:, :, 3] <= torch.from_numpy(records["height"].astype("f4"))).all()
        cameras = torch.from_numpy(sealed.encoded("camera"))[batch.rows]
        assert torch.equal(batch.metadata["camera"], cameras)


def test_a_set_of_damaged_samples_ends(lab: Lab) -> None:
    lab.ingest()
    shards = damage(lab.out, [row["id"] for row in lab.rows])
    with pytest.raises(DataError, match="50 samples that should have taken the place"):
        list(Loader(shards, SMALL, 4, backend="torch", on_error="skip").epoch(0))


def test_an_evaluation_never_skips(damaged: ShardSet) -> None:
    loader = Loader(damaged, SMALL, 7, backend="torch", on_error="skip")
    with pytest.raises(DataError, match="at offset"):
        list(loader.evaluation())


def test_what_cannot_be_read_is_not_skipped(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is gone, a store that is down: another rank, or the next try, may be luckier."""
    lab.ingest()
    put_folder(lab.out, Remote("memory://unreadable"))
    loader = Loader(lab.open(), SMALL, 4, backend="torch", on_error="skip")
    (lab.out / "shard-0000-000001.tar").unlink()
    with pytest.raises(DataError, match=r"000001\.tar at offset \d+: cannot be read: No such file"):
        list(loader.epoch(0))

    monkeypatch.setenv("FINO_CACHE_GB", "0")
    shards = ShardSet.open("memory://unreadable")
    loader = Loader(shards, SMALL, 4, backend="torch", on_error="skip")

    def refuse(*_: Any) -> bytes:
        raise OSError(errno.EIO, "the store is down")

    monkeypatch.setattr(Remote, "read_at", refuse)
    with pytest.raises(DataError, match=r"at offset \d+: cannot be read: the store is down"):
        list(loader.epoch(0))


def test_a_run_may_turn_to_skipping(damaged: ShardSet) -> None:
    state = order_loader(damaged, 7).state(0, 2)
    order_loader(damaged, 7, on_error="skip").check_state(state)
    with pytest.raises(ConfigError, match="views"):
        Loader(damaged, Views(size=8), 7, backend="torch", on_error="skip").check_state(state)
