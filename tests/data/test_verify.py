"""Damage after sealing: `verify` and the loader refuse, and name the shard."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.index import place_of
from fino_fast.data.shardset import DamagedSample
from fino_fast.data.tar import BLOCK
from fino_fast.data.verify import verify
from fino_fast.errors import DataError, FinoError

from .labs import Lab


@pytest.fixture
def shard(lab: Lab) -> Path:
    """The second tar of a sealed set."""
    lab.ingest()
    return sorted(lab.out.glob("*.tar"))[1]


def cut_inside_a_member(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2 // BLOCK * BLOCK + 100)


def cut_at_a_member(shard: Path) -> None:
    """Between two samples, with the end-of-archive blocks in place: a sound tar of fewer."""
    data = shard.read_bytes()
    starts = [i for i in range(0, len(data), BLOCK) if data[i + 257 : i + 262] == b"ustar"]
    shard.write_bytes(data[: starts[len(starts) // 2 // 2 * 2]] + bytes(2 * BLOCK))


def remove(shard: Path) -> None:
    shard.unlink()


@pytest.mark.parametrize("spoil", [cut_inside_a_member, cut_at_a_member, remove])
def test_a_cut_shard_is_refused_by_name(
    lab: Lab, shard: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(shard)
    for use in (lab.open, lambda: verify(lab.out)):
        with pytest.raises(DataError, match=re.escape(shard.name)):
            use()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def read_all(shards: ShardSet) -> None:
    for split in shards.schema.splits:
        for backend in ("torch", "dali"):
            loader = Loader(shards, Views(size=16), 8, split=split, backend=backend)
            for _ in loader.evaluation():
                pass


def test_a_flipped_bit_of_an_image_is_found_by_both(lab: Lab, shard: Path) -> None:
    shards = lab.open()
    number = [s.name for s in shards.manifest.shards].index(shard.stem)
    row = next(i for i in range(len(shards)) if shards.index["shard"][i] == number)
    _, offset, _ = place_of(shards.index[row])
    flip(shard, offset + 50)
    (fault,) = verify(lab.out)
    assert shard.stem in fault
    assert repr(shards.ids[row]) in fault
    with pytest.raises(DataError) as caught:
        read_all(lab.open())
    assert shard.name in str(caught.value)
    assert repr(shards.ids[row]) in str(caught.value)
    assert f"offset {offset}" in str(caught.value)


@pytest.mark.parametrize("place", [10, 300, -1])
def test_a_flipped_bit_outside_the_images_is_found(lab: Lab, shard: Path, place: int) -> None:
    flip(shard, place % shard.stat().st_size)
    (fault,) = verify(lab.out)
    assert shard.stem in fault


def test_swapped_shards_are_found_by_both(lab: Lab) -> None:
    # Files that differ but are of equal size make shards of equal size: only content can tell.
    data = (lab.images / "0001.png").read_bytes()
    for i, row in enumerate(lab.rows):
        row["file"] = f"same{i:02d}.png"
        (lab.images / row["file"]).write_bytes(with_comment(data, f"{i:02d}"))
    lab.ingest(shard_bytes=15_000)
    tars = sorted(lab.out.glob("*.tar"))
    one, two = next(
        (a, b) for a in tars for b in tars if a < b and a.stat().st_size == b.stat().st_size
    )
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    faults = verify(lab.out)
    assert [one.stem in faults[0], two.stem in faults[1]] == [True, True]
    with pytest.raises(DataError, match=rf"{one.stem}|{two.stem}"):
        read_all(lab.open())


def with_comment(png: bytes, text: str) -> bytes:
    """The PNG with a text chunk behind its header."""
    body = b"tEXtc\0" + text.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize(
    "pattern",
    [
        "shard-*-000001.parquet",
        "shard-*-000001.json",
        "index-*",
        "metadata-*",
        "samples-*",
        "schema-*",
    ],
)
def test_a_changed_small_file_is_found(lab: Lab, shard: Path, pattern: str) -> None:
    (path,) = lab.out.glob(pattern)
    if path.suffix == ".json" and "shard" in path.name:
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps(content | {"sha256": "0" * 64}), encoding="utf-8")
    else:
        flip(path, path.stat().st_size // 2)
    try:
        found = "\n".join(verify(lab.out))
    except DataError as error:
        found = str(error)
    assert path.name in found


@pytest.mark.parametrize("name", ["plan.json", "rows.parquet", "schema.json"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_changed_or_missing_plan_is_found_and_readers_do_without(
    lab: Lab, shard: Path, name: str, gone: bool
) -> None:
    path = lab.out / "plan-0000" / name
    whole = path.read_bytes()
    path.unlink()
    if not gone and name == "rows.parquet":
        path.write_bytes(whole[:-9] + b"x" + whole[-8:])
    elif not gone:
        path.write_bytes(whole.replace(b"0", b"1", 1))
    (fault,) = verify(lab.out)
    assert "plan-0000" in fault
    read_all(lab.open())


@pytest.mark.parametrize(
    "pattern", ["MANIFEST.json", "index-*", "metadata-*", "samples-*", "schema-*"]
)
def test_an_unsealed_or_incomplete_folder_is_refused(lab: Lab, shard: Path, pattern: str) -> None:
    (path,) = lab.out.glob(pattern)
    path.unlink()
    with pytest.raises(DataError, match=re.escape(str(lab.out))):
        lab.open()


def test_a_set_of_an_earlier_version_says_what_to_do(lab: Lab, shard: Path) -> None:
    path = lab.out / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 1}), encoding="utf-8")
    with pytest.raises(DataError, match="run the same `fino-fast ingest` again"):
        lab.open()
    lab.ingest()
    assert verify(lab.out) == []


def test_a_message_names_the_sample_without_reading_all_ids(lab: Lab, shard: Path) -> None:
    shards = lab.open()
    told = [shards.describe(row) for row in range(len(shards))]
    assert "ids" not in shards.__dict__
    assert all(repr(shards.ids[row]) in text for row, text in enumerate(told))


SMALL_FILES = [
    "MANIFEST.json",
    "schema-0000.json",
    "index-0000.npy",
    "metadata-0000.npy",
    "samples-0000.parquet",
]


def test_a_sample_that_takes_several_reads(
    lab: Lab, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux gives 2 GiB a call; here it is 100 bytes. What ends early is damaged all the same."""
    shards = lab.open()
    whole = [shards.read(row) for row in range(len(shards))]
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 100), at))
    assert [shards.read(row) for row in range(len(shards))] == whole
    os.truncate(shard, 600)
    with pytest.raises(DamagedSample, match="are not those that were sealed"):
        shards.read(int((shards.index["shard"] == 1).argmax()))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SMALL_FILES),
    data=st.data(),
)
def test_random_bytes_give_only_our_own_errors(
    sealed_copy: Path, name: str, data: st.DataObject
) -> None:
    """Also where the manifest's hash was made to fit, so that every parser is reached."""
    path = sealed_copy / name
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=40))
    changed = data.draw(
        st.sampled_from([whole[:place] + noise + whole[place + len(noise) :], whole[:place], noise])
    )
    manifest = (sealed_copy / "MANIFEST.json").read_bytes()
    try:
        replace(path, changed)
        if name != "MANIFEST.json":
            refit(sealed_copy, name)
        with contextlib.suppress(FinoError):
            shards = ShardSet.open(sealed_copy)
            read_all(shards)
            for factor in shards.schema.factors:
                shards.encoded(factor)
    finally:
        replace(path, whole)
        replace(sealed_copy / "MANIFEST.json", manifest)


def replace(path: Path, data: bytes) -> None:
    """By renaming: bytes that vanish under a memory map would end the process."""
    new = path.with_name("new")
    new.write_bytes(data)
    new.replace(path)


def refit(folder: Path, name: str) -> None:
    """Make the manifest's hash that of the spoilt file."""
    content = json.loads((folder / "MANIFEST.json").read_bytes())
    data = (folder / name).read_bytes()
    for entry in content.values():
        if isinstance(entry, dict) and entry.get("name") == name:
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    replace(folder / "MANIFEST.json", json.dumps(content).encode())


@pytest.fixture(scope="module")
def sealed_copy(sealed: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("copy") / "shards"
    shutil.copytree(sealed.folder, target)
    return target
