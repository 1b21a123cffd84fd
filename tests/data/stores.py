"""Object stores for tests: one in memory that can be made to fail, and a local S3 server."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from s3fs import S3FileSystem

from fino_fast.data.files import Location
from fino_fast.data.remote import Remote

from .test_ingest import content

BUCKET = "plates"


class FaultyFileSystem(MemoryFileSystem):
    """Memory whose uploads go through `fault`, which may store something else, or die."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
    pseudo_dirs = [""]  # noqa: RUF012
    fault: Callable[[str, bytes], bytes] | None = None

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        data = Path(lpath).read_bytes()
        if type(self).fault is not None:
            data = type(self).fault(rpath, data)
        self.pipe_file(rpath, data)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@contextlib.contextmanager
def s3_server() -> Iterator[ThreadedMotoServer]:
    """A server on the loopback with an empty bucket; the environment leads to it."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            S3FileSystem.clear_instance_cache()
            yield server
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()


def put_folder(folder: Path, target: Remote) -> Remote:
    """Copy a folder into a store."""
    for name, data in content(folder).items():
        (target / name).write_bytes(data)
    return target


def objects(place: Location) -> dict[str, bytes]:
    """Everything below a folder, in a store or on a disk, without lock files."""
    if isinstance(place, Path):
        found = content(place)
    else:
        store, path = fsspec.url_to_fs(str(place), use_listings_cache=False)
        base = path.rstrip("/") + "/"
        found = {name.removeprefix(base): store.cat_file(name) for name in store.find(path)}
    return {name: data for name, data in found.items() if not name.endswith(".lock")}
