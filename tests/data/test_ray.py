"""Ray writes the same bytes, survives killed workers, and reports errors as they were raised."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from ray.cluster_utils import Cluster

from fino_fast.data.engines import RayEngine
from fino_fast.data.ingest import ingest
from fino_fast.data.remote import Remote
from fino_fast.errors import DataError, DiskFullError

from .labs import Lab
from .stores import BUCKET, objects
from .test_faults import KillAlways, KillOnce, Replaced, command
from .test_ingest import content


@pytest.fixture(scope="module")
def cluster(s3: ThreadedMotoServer) -> Iterator[Cluster]:
    """Two nodes of one processor, whose workers find the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def engine(cluster: Cluster) -> Iterator[RayEngine]:
    """An engine on the cluster, joined once for all tests."""
    # Ray's workers do not find the tests' own modules: send them along.
    ray.cloudpickle.register_pickle_by_value(sys.modules[KillOnce.__module__])
    ray.init(address=cluster.address, log_to_driver=False)
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


@pytest.mark.parametrize("joins", [True, False])
def test_the_command_joins_a_cluster_or_starts_its_own(
    lab: Lab, cluster: Cluster, tmp_path: Path, joins: bool
) -> None:
    """Without an address it leaves the cluster alone that this machine is part of; both are
    silent in a pipe."""
    lab.ingest()
    address = ["--ray-address", cluster.address] if joins else []
    out = tmp_path / "out"
    done = subprocess.run(
        [*command(lab, "--out", str(out), "--engine", "ray"), *address],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert content(out) == content(lab.out)


def test_an_address_where_no_ray_is(lab: Lab) -> None:
    lab.save()
    nobody = [*command(lab, "--engine", "ray"), "--ray-address", "127.0.0.1:1"]
    done = subprocess.run(nobody, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "ray-address: 127.0.0.1:1 does not answer: " in done.stderr
    assert "Traceback" not in done.stderr
