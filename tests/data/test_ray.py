"""Ray writes the same bytes, survives killed workers, and reports errors as they were raised."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from fino_fast.data.engines import RayEngine
from fino_fast.data.ingest import ingest
from fino_fast.data.remote import Remote
from fino_fast.errors import DataError, DiskFullError

from .labs import Lab
from .stores import BUCKET, objects
from .test_faults import KillAlways, KillOnce, Replaced
from .test_ingest import content


@pytest.fixture(scope="module")
def engine(s3: ThreadedMotoServer) -> Iterator[RayEngine]:
    """An engine on a Ray that is started once for all tests; its workers find the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers do not find the tests' own modules: send them along.
        ray.cloudpickle.register_pickle_by_value(sys.modules[KillOnce.__module__])
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield RayEngine()
        ray.shutdown()


def test_same_bytes_also_with_a_killed_worker(lab: Lab, engine: RayEngine, tmp_path: Path) -> None:
    lab.ingest()
    ingest(lab.request(out=tmp_path / "calm"), engine)
    assert content(tmp_path / "calm") == content(lab.out)
    flag = tmp_path / "killed"
    kill = KillOnce(flag, "shard-0000-000001")
    ingest(lab.request(out=tmp_path / "killed-once"), Replaced(kill, engine))
    assert flag.exists()
    assert content(tmp_path / "killed-once") == content(lab.out)


def test_same_bytes_in_an_object_store(lab: Lab, engine: RayEngine) -> None:
    lab.ingest()
    out = Remote(f"s3://{BUCKET}/ray")
    ingest(lab.request(out=out), engine)
    assert objects(out) == objects(lab.out)


def test_a_task_that_keeps_killing_workers_is_named(lab: Lab, engine: RayEngine) -> None:
    lab.save()
    with pytest.raises(DataError, match=r"gave up writing shard-0000-\d+ after 3 attempts"):
        ingest(lab.request(), Replaced(KillAlways(), engine))


def test_our_own_errors_arrive_as_they_were_raised(lab: Lab, engine: RayEngine) -> None:
    def full(task: Any) -> Any:
        raise DiskFullError(f"{task.name}: no room left")

    lab.save()
    with pytest.raises(DiskFullError, match=r"shard-0000-\d+: no room left"):
        ingest(lab.request(), Replaced(full, engine))
