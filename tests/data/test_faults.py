"""Killed workers and drivers, full disks, rivals: the fault is real, the end whole or resumable."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from fino_fast.cli import main
from fino_fast.data import ShardSet
from fino_fast.data.engines import Engine, LocalEngine
from fino_fast.data.files import TEMPORARY, committed
from fino_fast.data.ingest import LOCK, ingest
from fino_fast.data.verify import verify
from fino_fast.data.write import write_shard
from fino_fast.errors import DataError, DiskFullError

from .labs import Lab, Serial, make_lab, pixels, png
from .mounts import in_own_mounts
from .test_ingest import content


def command(lab: Lab, *extra: str) -> list[str]:
    program = [sys.executable, "-m", "fino_fast.cli", "ingest"]
    return [*program, *lab.arguments(), "--workers", "2", *extra]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, dict[str, bytes]]:
    """A lab of two shards and what an undisturbed ingest of it gives."""
    lab = make_lab(tmp_path_factory.mktemp("clean") / "lab", 24)
    lab.save()
    out = lab.root / "undisturbed"
    ingest(lab.request(out=out), Serial())
    return lab, content(out)


class KillOnce:
    """A task that kills its own worker the first time it is run."""

    def __init__(self, flag: Path, victim: str) -> None:
        self.flag, self.victim = flag, victim

    def __call__(self, task: Any) -> Any:
        if task.name == self.victim and not self.flag.exists():
            self.flag.touch()
            # In the middle of a shard: a temporary file is open and partly written.
            with committed(task.out / f"{task.name}.tar") as file:
                file.write(b"half a shard")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return write_shard(task)


class KillAlways:
    """A task that kills every worker."""

    def __call__(self, task: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Replaced:
    """An engine with another task function."""

    def __init__(self, function: Any, engine: Engine) -> None:
        self.function = function
        self.engine = engine

    def run(self, function: Any, tasks: Sequence[Any]) -> Iterator[Any]:
        return self.engine.run(self.function, tasks)


def test_a_killed_worker_costs_nothing(clean: tuple[Lab, dict[str, bytes]], tmp_path: Path) -> None:
    lab, expected = clean
    flag = tmp_path / "killed"
    ingest(
        lab.request(out=tmp_path / "out"),
        Replaced(KillOnce(flag, "shard-0000-000001"), LocalEngine(2)),
    )
    assert flag.exists()
    assert content(tmp_path / "out") == expected


def test_a_task_that_keeps_killing_workers_is_named(
    clean: tuple[Lab, dict[str, bytes]], tmp_path: Path
) -> None:
    lab, expected = clean
    request = lab.request(out=tmp_path / "out")
    with pytest.raises(DataError, match=r"workers died 3 times while writing shard-0000-0"):
        ingest(request, Replaced(KillAlways(), LocalEngine(2)))
    with pytest.raises(DataError, match="no sealed set"):
        ShardSet.open(tmp_path / "out")
    ingest(request, Serial())
    assert content(tmp_path / "out") == expected


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Path]:
    """A lab of 24 rows, and the folder of a set that was sealed when it had 16."""
    lab = make_lab(tmp_path_factory.mktemp("grown") / "lab", 24)
    later, lab.rows = lab.rows[16:], lab.rows[:16]
    lab.ingest()
    lab.rows += later
    lab.save()
    out = lab.root / "undisturbed"
    shutil.copytree(lab.out, out)
    ingest(lab.request(out=out), Serial())
    return lab, lab.out


# Each ingest is killed one commit step later than the one before, until one comes to its end; then
# its folder is looked at, and the ingest run again. All of it in forks, which spares the imports.
KILLED_RUNS = """
import itertools, os, pathlib, shutil, signal, sys, traceback
from fino_fast.data.ingest import ingest
from fino_fast.data.shardset import ShardSet
from fino_fast.data.verify import verify
from fino_fast.errors import DataError
from tests.data.labs import SCHEMA, Lab, Serial
from tests.data.test_ingest import content

lab, outs = Lab(pathlib.Path(sys.argv[1]), SCHEMA), pathlib.Path(sys.argv[2])
expected = pathlib.Path(sys.argv[3])
former = pathlib.Path(sys.argv[4]) if sys.argv[4] else None
replace = pathlib.Path.replace

def in_child(work, *arguments):
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def killed(out, step):
    counter = itertools.count(1)

    def killing(self, target):
        for action in (lambda: None, lambda: replace(self, target)):
            action()
            if next(counter) == step:
                os.kill(os.getpid(), signal.SIGKILL)

    pathlib.Path.replace = killing
    ingest(lab.request(out=out), Serial())

def look(out):
    for tar in out.glob("*.tar"):
        assert tar.read_bytes() == (expected / tar.name).read_bytes()
    if (out / "MANIFEST.json").exists():
        manifests = [each / "MANIFEST.json" for each in (expected, former) if each]
        assert (out / "MANIFEST.json").read_bytes() in [path.read_bytes() for path in manifests]
        assert verify(out) == []
        return
    assert former is None
    try:
        ShardSet.open(out)
    except DataError:
        return
    raise AssertionError("a set without a manifest was opened")

def rerun(out):
    ingest(lab.request(out=out), Serial())
    assert content(out) == content(expected)

for step in itertools.count(1):
    out = outs / str(step)
    if former:
        shutil.copytree(former, out)
    ended = in_child(killed, out, step)
    assert in_child(look, out) == 0
    assert in_child(rerun, out) == 0
    if ended == 0:
        print(step)
        break
    assert ended == -signal.SIGKILL, ended
"""


@pytest.mark.parametrize("appending", [False, True])
def test_a_driver_killed_at_every_commit_step(
    clean: tuple[Lab, dict[str, bytes]], grown: tuple[Lab, Path], tmp_path: Path, appending: bool
) -> None:
    """Before and after each rename: no reader ever sees a partial set, but none, the former or the
    new one; and a rerun converges to the bytes of an undisturbed run, without leftovers."""
    lab, former = grown if appending else (clean[0], "")
    arguments = [str(lab.root), str(tmp_path), str(lab.root / "undisturbed"), str(former)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (20 if appending else 24)


def test_a_killed_driver_takes_its_workers_along(lab: Lab, tmp_path: Path) -> None:
    """SIGKILL to the real command while its workers write, and a second one has been refused; no
    orphan goes on, no lock is left, a rerun ends well."""
    lab.save()
    slow = subprocess.Popen(command(lab), env=os.environ | {"PYTHONPATH": slowed(tmp_path, 3.0)})
    process = psutil.Process(slow.pid)
    wait_for(lambda: list(lab.out.glob(f"{TEMPORARY}*.tar.*")))
    workers = process.children(recursive=True)
    assert workers
    rival = subprocess.run(command(lab), capture_output=True, text=True, check=False)
    assert rival.returncode == 1
    assert "another ingest is writing there; wait until it ends" in rival.stderr
    slow.kill()
    slow.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert subprocess.run(command(lab), capture_output=True, check=False).returncode == 0
    assert verify(lab.out) == []
    assert not list(lab.out.glob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("moment", ["workers start", "workers write"])
def test_ctrl_c_leaves_a_state_that_resumes(lab: Lab, tmp_path: Path, moment: str) -> None:
    """To the whole process group, as a terminal sends it; one line says so, and no worker."""
    lab.save()
    starting = moment == "workers start"
    slow = subprocess.Popen(
        command(lab),
        env=os.environ | {"PYTHONPATH": slow_to_start(tmp_path) if starting else slowed(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: list((tmp_path if starting else lab.out).glob(f"{TEMPORARY}*")))
    os.killpg(slow.pid, signal.SIGINT)
    _, message = slow.communicate(timeout=60)
    assert (slow.returncode, message) == (130, "\nfino-fast ingest: interrupted\n")
    assert subprocess.run(command(lab), capture_output=True, check=False).returncode == 0
    assert verify(lab.out) == []


def slow_to_start(folder: Path) -> str:
    """A folder for PYTHONPATH in which every worker takes a second before it can do anything, and
    says by a file that it has begun.
    """
    (folder / "sitecustomize.py").write_text(
        "import os, pathlib, sys, time\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        f"    pathlib.Path({str(folder)!r}, f'{TEMPORARY}{{os.getpid()}}').touch()\n"
        "    time.sleep(1)\n",
        encoding="utf-8",
    )
    return str(folder)


def slowed(folder: Path, seconds: float = 0.3) -> str:
    """A folder for PYTHONPATH in which every process takes so long to read a source file."""
    (folder / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fino_fast.data.write':\n"
        "            import fino_fast.data.sources as sources\n"
        "            read = sources.Root.read\n"
        "            def slow(*args):\n"
        f"                time.sleep({seconds})\n"
        "                return read(*args)\n"
        "            sources.Root.read = slow\n"
        "sys.meta_path.insert(0, Finder())\n",
        encoding="utf-8",
    )
    return str(folder)


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_disk_ends_with_code_3_and_a_rerun_completes(
    clean: tuple[Lab, dict[str, bytes]], tmp_path: Path
) -> None:
    """A file-size limit stops the writing of a shard in the middle, as a full disk does."""
    lab, expected = clean
    out = tmp_path / "out"
    arguments = command(lab, "--out", str(out))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000))

    full = subprocess.run(
        arguments, capture_output=True, text=True, check=False, preexec_fn=limited
    )
    assert full.returncode == 3
    assert "no room left" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (out / "MANIFEST.json").exists()
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == 0
    assert content(out) == expected


# In mounts of its own: a tmpfs of $1 bytes at $2, then the command twice, the second
# time with room; what was committed in between keeps its bytes.
FULL_TMPFS = """
mount -t tmpfs -o size=$1 none "$2" || exit 77
shift 1; place=$1; shift 1
"$@"; [ $? = 3 ] || exit 1
[ -z "$(find "$place" -name '.tmp-*')" ] || exit 2
cd "$place/out" && ls shard-*.json && sha256sum shard-* > "$place.sums" || exit 4
mount -o remount,size=16m "$place" && "$@" && sha256sum -c --quiet "$place.sums" || exit 5
cat MANIFEST.json >&2
"""


def test_a_full_tmpfs(clean: tuple[Lab, dict[str, bytes]], tmp_path: Path) -> None:
    """ENOSPC itself, after some shards: they stay as they are, and a rerun adds the others."""
    lab, _ = clean
    small = ["--shard-bytes", "15000"]
    assert main(["ingest", *lab.arguments(), *small, "--out", str(tmp_path / "whole")]) == 0
    whole = content(tmp_path / "whole")
    place = tmp_path / "small"
    place.mkdir()
    size = sum(map(len, whole.values())) * 3 // 4
    arguments = command(lab, *small, "--out", str(place / "out"))
    done = in_own_mounts(FULL_TMPFS, str(size), str(place), *arguments)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert "No space left on device" in done.stderr
    assert done.stderr.endswith(whole["MANIFEST.json"].decode())


def test_a_full_disk_while_sealing(lab: Lab) -> None:
    lab.ingest()
    (lab.out / "MANIFEST.json").unlink()
    request = lab.request()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(DiskFullError, match="no room left"):
            ingest(request, Serial())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lab.ingest()
    assert verify(lab.out) == []


def test_a_second_driver_is_refused_and_a_dead_one_leaves_no_lock(lab: Lab) -> None:
    class Rival(Serial):
        """Tries to ingest into the same set while the first driver writes."""

        def run(self, function: Any, tasks: Sequence[Any]) -> Iterator[Any]:
            with pytest.raises(DataError, match="another ingest is writing"):
                ingest(lab.request(), Serial())
            return super().run(function, tasks)

    lab.save()
    ingest(lab.request(), Rival())
    assert (lab.out / LOCK).exists()
    assert ingest(lab.request(), Serial()).shards_written == 0


def test_exit_codes_and_silence_in_a_pipe(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.save()
    done = subprocess.run(command(lab), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "24 samples in 2 shards" in done.stdout
    assert main(["verify", str(lab.out)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "are sound" in told.out
    os.truncate(next(iter(lab.out.glob("*.tar"))), 1000)
    assert main(["verify", str(lab.out)]) == 1
    assert "shard-0000-00000" in capsys.readouterr().err
    assert main(["ingest", *lab.arguments(), "--out", str(lab.table)]) == 1
    assert "table.csv: cannot be made a folder: File exists" in capsys.readouterr().err
    lab.rows[0]["file"] = "absent.png"
    lab.save()
    assert main(["ingest", *lab.arguments(), "--out", str(lab.root / "other")]) == 2
    assert "id 's0000', 'absent.png': missing_file" in capsys.readouterr().err
    assert not (lab.root / "other" / "MANIFEST.json").exists()


def test_parts_at_the_same_time_one_of_which_dies(
    clean: tuple[Lab, dict[str, bytes]], tmp_path: Path
) -> None:
    """Three processes of an array, no lock between them while they write: SIGKILL to one in the
    middle of its shards leaves the set unsealed, and running that one again completes it."""
    lab, _ = clean
    small = ["--shard-bytes", "15000"]
    assert main(["ingest", *lab.arguments(), *small, "--out", str(tmp_path / "whole")]) == 0
    expected = content(tmp_path / "whole")
    out = tmp_path / "out"

    def start(part: int, **options: Any) -> subprocess.Popen[str]:
        arguments = command(lab, *small, "--out", str(out), "--shard-of", f"{part}/3")
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, **options)

    victim = start(1, env=os.environ | {"PYTHONPATH": slowed(tmp_path)})
    others = [start(0), start(2)]
    # Its shards are every third from the second on.
    wait_for(lambda: list(out.glob(f"{TEMPORARY}shard-0000-00000[147].tar.*")))
    victim.kill()
    victim.communicate()
    for other in others:
        told, _ = other.communicate(timeout=60)
        assert other.returncode == 0
        assert "are left to other processes; the set is not sealed yet" in told
    with pytest.raises(DataError, match="no sealed set"):
        ShardSet.open(out)
    again = start(1)
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert content(out) == expected


def test_a_package_missing_in_the_workers_is_named(lab: Lab, tmp_path: Path) -> None:
    """The error crosses the process boundary whole: one line, and which extra to install."""
    (lab.images / "0000.jpg").write_bytes(png(pixels(0) > 127))  # 1 bit: has to be converted
    lab.save()
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tifffile'] = None\n")
    done = subprocess.run(
        command(lab),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "tifffile is not installed" in done.stderr
    assert "fino-fast[tiff]" in done.stderr
    assert "Traceback" not in done.stderr
