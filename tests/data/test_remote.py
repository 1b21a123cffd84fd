"""Sets behind URLs: the same bytes as on a disk, and stores that fail as stores do."""

import itertools
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from s3fs import S3FileSystem

from fino_fast.cli import main
from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data import cache as caches
from fino_fast.data import lock as locks
from fino_fast.data.engines import LocalEngine
from fino_fast.data.files import location
from fino_fast.data.ingest import LOCK, ingest
from fino_fast.data.remote import Remote
from fino_fast.data.verify import verify
from fino_fast.errors import ConfigError, DataError, DiskFullError, MissingExtraError

from .labs import Lab, Serial
from .stores import BUCKET, FaultyFileSystem, objects, put_folder, s3_server

VIEWS = Views(size=16)
_places = itertools.count()


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Remote:
    """An empty folder of a store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Remote(f"s3://{BUCKET}/run-{next(_places)}")
    return Remote(f"memory://run-{next(_places)}")


@pytest.fixture
def faulty() -> Iterator[Remote]:
    """An empty folder of a store whose uploads a test can disturb."""
    yield Remote(f"faulty://run-{next(_places)}")
    FaultyFileSystem.fault = None


def tars(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.endswith(".tar")}


def batches(shards: ShardSet) -> list[Any]:
    return list(Loader(shards, VIEWS, 7, seed=3, backend="torch").epoch(1))


def assert_same_batches(one: ShardSet, other: ShardSet) -> None:
    for a, b in zip(batches(one), batches(other), strict=True):
        assert torch.equal(a.views, b.views)
        assert torch.equal(a.rows, b.rows)
        for name, values in a.metadata.items():
            torch.testing.assert_close(b.metadata[name], values, rtol=0, atol=0, equal_nan=True)


def test_a_set_in_a_store_is_that_on_a_disk(lab: Lab, store: Remote) -> None:
    """Every object and the manifest hash, a rerun, rows added later, verify, and the batches."""
    local = lab.ingest().manifest
    remote = ingest(lab.request(out=store / "set"), Serial()).manifest
    assert remote.hash == local.hash
    assert objects(store / "set") == objects(lab.out)
    assert ingest(lab.request(out=store / "set"), Serial()).shards_written == 0
    lab.rows.append(lab.rows[0] | {"id": "later"})
    grown = lab.ingest().manifest
    assert ingest(lab.request(out=store / "set"), Serial()).manifest.hash == grown.hash
    assert objects(store / "set") == objects(lab.out)
    assert verify(store / "set") == []
    assert_same_batches(ShardSet.open(str(store / "set")), lab.open())


def test_images_and_table_in_a_store(lab: Lab, store: Remote) -> None:
    """The same tars; the rejects of a disk, by the same codes."""
    (lab.images / "sub").mkdir()
    (lab.images / "0004.jpg").rename(lab.images / "sub" / "é ß.jpg")
    lab.rows[4]["file"] = "sub/é ß.jpg"
    for row, path in enumerate(["../table.csv", "/etc/hostname", "absent.png", "sub"], start=10):
        lab.rows[row]["file"] = path
    allowed: dict[str, Any] = {"max_reject": lab.request().max_reject.parse("4")}
    expected = lab.ingest(**allowed)
    put_folder(lab.images, store / "images")
    (store / "table.csv").write_bytes(lab.table.read_bytes())
    request = lab.request(
        images=store / "images", table=store / "table.csv", out=store / "set", **allowed
    )
    report = ingest(request, Serial())
    assert report.rejects == expected.rejects
    assert report.rejects == {"path_escape": 2, "missing_file": 1, "not_a_file": 1}
    assert tars(objects(store / "set")) == tars(objects(lab.out))


def test_an_object_changed_after_the_plan_is_rejected(lab: Lab, store: Remote) -> None:
    put_folder(lab.images, store / "images")

    class ChangesOne(Serial):
        def run(self, function: Any, tasks: Sequence[Any]) -> Iterator[Any]:
            if tasks:
                (store / "images" / "0003.png").write_bytes(b"another picture")
            return super().run(function, tasks)

    lab.save()
    request = lab.request(
        images=store / "images", out=store / "set", max_reject=lab.request().max_reject.parse("1")
    )
    assert ingest(request, ChangesOne()).rejects == {"source_changed": 1}


def test_workers_in_processes_of_their_own(lab: Lab, s3: ThreadedMotoServer) -> None:
    """The real command on S3 URLs throughout, against an ingest from disk to disk."""
    local = lab.ingest().manifest
    out = Remote(f"s3://{BUCKET}/run-{next(_places)}")
    ingest(lab.request(out=out), LocalEngine(2))
    assert objects(out) == objects(lab.out)
    assert local.hash == ShardSet.open(out).manifest_hash


def test_the_commands_take_urls(
    lab: Lab, s3: ThreadedMotoServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab.save()
    place = Remote(f"s3://{BUCKET}/run-{next(_places)}")
    put_folder(lab.images, place / "images")
    (place / "table.csv").write_bytes(lab.table.read_bytes())
    arguments = [
        *("--table", f"{place}/table.csv", "--images", f"{place}/images/", "--out", f"{place}/set"),
        *("--schema", str(lab.root / "schema.yaml"), "--id", "id", "--path", "file"),
    ]
    assert main(["ingest", *arguments, "--workers", "1"]) == 0
    assert main(["verify", f"{place}/set"]) == 0
    assert main(["inspect", f"{place}/set", "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert f"{place}/set: 24 samples in 1 shards are sound" in capsys.readouterr().out


# Faults


def test_an_upload_that_stores_half_is_noticed(lab: Lab, faulty: Remote) -> None:
    lab.ingest()
    FaultyFileSystem.fault = lambda name, data: (
        data[: len(data) // 2] if name.endswith("1.tar") else data
    )
    with pytest.raises(DataError, match=r"000001\.tar: cannot be uploaded: \d+ of \d+ bytes were"):
        ingest(lab.request(out=faulty), Serial())
    with pytest.raises(DataError, match="no sealed set"):
        ShardSet.open(faulty)
    FaultyFileSystem.fault = None
    ingest(lab.request(out=faulty), Serial())
    assert objects(faulty) == objects(lab.out)


class DriverKilled(BaseException):
    """Stands for SIGKILL: nothing after it runs but what the system itself does."""


@pytest.mark.parametrize("stored", [False, True])
def test_a_driver_that_dies_at_every_upload(
    lab: Lab, faulty: Remote, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each object is stored; no reader sees a partial set, a rerun converges."""
    lab.ingest()
    expected = objects(lab.out)
    # A dead driver leaves its lease behind; the tests of leases wait for it.
    monkeypatch.setattr(locks, "_Lease", NoLease)
    for step in itertools.count(1):
        out = faulty / f"{stored}-{step}"
        uploads = itertools.count(1)

        def die(name: str, data: bytes, uploads: Any = uploads, step: int = step) -> bytes:
            if next(uploads) == step:
                if stored:
                    FaultyFileSystem().pipe_file(name, data)
                raise DriverKilled
            return data

        FaultyFileSystem.fault = die
        try:
            ingest(lab.request(out=out), Serial())
        except DriverKilled:
            ended = False
        else:
            ended = True
        FaultyFileSystem.fault = None
        sealed = (out / "MANIFEST.json").is_file()
        assert sealed == (ended or (stored and objects(out) == expected))
        if not sealed:
            with pytest.raises(DataError, match="no sealed set"):
                ShardSet.open(out)
        ingest(lab.request(out=out), Serial())
        assert objects(out) == expected
        if ended:
            break
    assert step > 12


class NoLease:
    """A lease that nobody else wants."""

    def __init__(self, lock: Remote, what: str) -> None:
        pass

    def take(self, wait: bool) -> None:
        pass

    def release(self) -> None:
        pass


KILLED_UPLOAD = """
import os, pathlib, signal, sys
from fino_fast.data.ingest import ingest
from fino_fast.data.remote import Remote
from tests.data.labs import SCHEMA, Lab, Serial

upload = Remote.upload

def killing(self, source):
    upload(self, source)
    if self.name.endswith("000001.tar"):
        os.kill(os.getpid(), signal.SIGKILL)

Remote.upload = killing
ingest(Lab(pathlib.Path(sys.argv[1]), SCHEMA).request(out=Remote(sys.argv[2])), Serial())
"""


def test_a_driver_killed_between_upload_and_receipt(
    lab: Lab, s3: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to a real process on S3: the tar is there, its receipt is not, the lease is left."""
    lab.ingest()
    out = Remote(f"s3://{BUCKET}/run-{next(_places)}")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_UPLOAD, str(lab.root), str(out)],
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL
    names = {name for name in objects(out) if "000001" in name}
    assert names == {"shard-0000-000001.tar"}
    assert (out / LOCK).is_file()
    monkeypatch.setattr(locks, "RENEWAL", 0.2)
    monkeypatch.setattr(locks, "LEASE", 1.0)
    ingest(lab.request(out=out), Serial())
    assert objects(out) == objects(lab.out)


def test_a_store_that_goes_away_rejects_no_image(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stops in the middle of the job: the error names the object; a rerun completes."""
    lab.ingest()
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server() as server:
        port = server.get_host_and_port()[1]
        place = Remote(f"s3://{BUCKET}/gone")
        put_folder(lab.images, place / "images")

        class Stops(Serial):
            def run(self, function: Any, tasks: Sequence[Any]) -> Iterator[Any]:
                for task in tasks:
                    yield function(task)
                    server.stop()

        request = lab.request(images=place / "images", out=place / "set")
        with pytest.raises(DataError, match=rf"s3://{BUCKET}/gone/\S+: cannot be (read|fetched)"):
            ingest(request, Stops())
        again = ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
        again.start()
        try:
            (place / "set" / LOCK).unlink()
            report = ingest(request, Serial())
        finally:
            again.stop()
        assert report.rejects == {}
        assert report.shards_written == 1


def test_a_missing_bucket_is_named_and_not_made(lab: Lab, s3: ThreadedMotoServer) -> None:
    lab.save()
    with pytest.raises(DataError, match=r"s3://no-such-bucket/set.*not there"):
        ingest(lab.request(out=Remote("s3://no-such-bucket/set")), Serial())
    with pytest.raises(ConfigError, match="s3://no-such-bucket/images: is no folder of images"):
        ingest(lab.request(images=Remote("s3://no-such-bucket/images")), Serial())
    assert not Remote("s3://no-such-bucket").is_dir()


def test_missing_credentials_are_said(
    lab: Lab, s3: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.save()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(DataError, match=r"s3://plates/.*[Cc]redentials"):
            ingest(lab.request(out=Remote(f"s3://{BUCKET}/none")), Serial())
    finally:
        S3FileSystem.clear_instance_cache()


def test_an_object_shorter_than_its_receipt(lab: Lab, store: Remote) -> None:
    """Readers refuse and name the shard; a rerun writes it again, to the same bytes."""
    lab.ingest()
    ingest(lab.request(out=store), Serial())
    tar = store / "shard-0000-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=r"000001\.tar: has \d+ bytes, \d+ were sealed"):
        ShardSet.open(store)
    assert ingest(lab.request(out=store), Serial()).shards_written == 1
    assert objects(store) == objects(lab.out)


def test_a_full_spool_ends_with_code_3(
    lab: Lab, faulty: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))
    try:
        with pytest.raises(DiskFullError, match="no room left"):
            ingest(lab.request(out=faulty), Serial())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ingest(lab.request(out=faulty), Serial())
    assert verify(faulty) == []


# Leases


def test_a_second_driver_is_refused_while_the_first_one_lives(
    lab: Lab, store: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "RENEWAL", 0.2)
    monkeypatch.setattr(locks, "LEASE", 2.0)

    class Rival(Serial):
        def run(self, function: Any, tasks: Sequence[Any]) -> Iterator[Any]:
            with pytest.raises(DataError, match="another ingest is writing there"):
                ingest(lab.request(out=store), Serial())
            return super().run(function, tasks)

    lab.save()
    ingest(lab.request(out=store), Rival())
    assert not (store / LOCK).is_file()


def test_a_lease_is_waited_for_and_a_dead_one_taken_over(
    store: Remote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "RENEWAL", 0.1)
    monkeypatch.setattr(locks, "LEASE", 2.0)  # longer than a busy machine may forget a thread
    lock = store / LOCK
    order = []

    def hold() -> None:
        with locks.locked(lock, "another ingest"):
            holding.set()
            time.sleep(1.0)
            order.append("first")

    holding = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(10)
    with locks.locked(lock, "another ingest", wait=True):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]
    lock.create(b"left behind by a dead process")
    with locks.locked(lock, "another ingest"):
        assert "was left behind" in caplog.text
    assert not lock.is_file()


# The cache


def fetched(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("[!.]*.tar"))


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_shards_are_fetched_once_and_shared(
    lab: Lab, store: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.ingest()
    ingest(lab.request(out=store), Serial())
    shards = ShardSet.open(store)
    batches(shards)
    wait_until(lambda: len(fetched(own_cache)) == len(shards.manifest.shards))
    assert not list(own_cache.rglob(".tmp-*"))

    def refuse(*_: Any) -> bytes:
        raise AssertionError("the store was asked for what is in the cache")

    monkeypatch.setattr(Remote, "read_at", refuse)
    again = ShardSet.open(store)
    assert_same_batches(again, lab.open())
    monkeypatch.setattr(caches.RemoteShards, "_fetch", refuse)
    assert_same_batches(ShardSet.open(store), lab.open())


def test_a_cache_without_room_reads_parts(
    lab: Lab, store: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.ingest()
    ingest(lab.request(out=store), Serial())
    first = ShardSet.open(store).manifest.shards[0]
    monkeypatch.setenv(caches.LIMIT, str((first.bytes + 1000) / 1e9))
    shards = ShardSet.open(store)
    assert_same_batches(shards, lab.open())
    wait_until(lambda: shards._remote._full.is_set())
    assert_same_batches(shards, lab.open())
    wait_until(lambda: fetched(own_cache))
    assert len(fetched(own_cache)) == 1
    held = sum(file.stat().st_size for file in (own_cache / "shards").iterdir())
    assert held <= first.bytes + 1000
    monkeypatch.setenv(caches.FOLDER, "/dev/null/cache")
    with pytest.raises(ConfigError, match=r"/dev/null/cache/.*: cannot be made: .*; set FINO"):
        ShardSet.open(store)
    monkeypatch.setenv(caches.FOLDER, str(own_cache))
    monkeypatch.setenv(caches.LIMIT, "plenty")
    with pytest.raises(ConfigError, match="FINO_CACHE_GB: 'plenty'"):
        ShardSet.open(store)


def test_a_fetch_that_died_leaves_no_reserved_room(
    lab: Lab, store: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.ingest()
    ingest(lab.request(out=store), Serial())
    shards = ShardSet.open(store)
    for shard in shards.manifest.shards:
        (own_cache / "shards" / f".tmp-{shard.sha256}.tar").write_bytes(b"half of a shard")
    batches(shards)
    wait_until(lambda: len(fetched(own_cache)) == len(shards.manifest.shards))
    assert not list(own_cache.rglob(".tmp-*"))


def test_a_flipped_byte_in_the_store_is_refused(lab: Lab, store: Remote, own_cache: Path) -> None:
    """Between the images: no checksum of a sample sees it, the shard's does."""
    lab.ingest()
    ingest(lab.request(out=store), Serial())
    tar = store / "shard-0000-000000.tar"
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1
    tar.write_bytes(bytes(data))
    shards = ShardSet.open(store)
    shards.read(0)
    wait_until(lambda: shards._remote._faults)
    with pytest.raises(DataError, match=r"000000\.tar: is not the file that was sealed"):
        shards.read(1)
    assert not [path for path in fetched(own_cache) if path.read_bytes() == bytes(data)]
    assert len(verify(store)) == 1
    (store / "index-0000.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"index-0000\.npy: is not the file that was sealed"):
        verify(store)


# Drivers


@pytest.mark.parametrize("package", ["s3fs", "fsspec"])
def test_a_missing_driver_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = [name for name in sys.modules if name.partition(".")[0] == package]
    for name in [package, *hidden]:
        monkeypatch.setitem(sys.modules, name, None)
    if package == "s3fs":
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingExtraError, match=rf"{package} is not.*'fino-fast\[remote\]'"):
        location("s3://bucket/shards")


def test_what_is_a_url() -> None:
    assert location("shards/a") == Path("shards/a")
    assert location("file:///data/a") == Path("/data/a")
    assert location("memory://a/b/") == Remote("memory://a/b")
    with pytest.raises(ConfigError, match=r"nonsense://a: Protocol not known"):
        location("nonsense://a")
    with pytest.raises(ConfigError, match="chained URLs"):
        location("simplecache::s3://bucket/a")
