"""The commands as a person meets them: on a terminal, and with options left out."""

import errno
import os
import re
import signal
import subprocess
import sys
import termios

import pytest

from fino_fast.cli import main
from fino_fast.data import ShardSet
from fino_fast.data.commands import Verify
from fino_fast.data.declaration import Declaration

from .labs import Lab


def test_a_schema_is_inferred_without_an_output(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.save()
    (lab.root / "schema.yaml").unlink()
    arguments = lab.arguments()
    place = arguments.index("--out")
    del arguments[place : place + 2]
    assert main(["ingest", *arguments, "--infer"]) == 0
    assert "camera" in Declaration.from_yaml(lab.root / "schema.yaml").factors
    assert main(["ingest", *arguments]) == 1
    assert "--out is missing" in capsys.readouterr().err


def test_the_bar_of_a_terminal(lab: Lab) -> None:
    """Rows and MB a second, what was rejected, the time left; the last line is the summary's."""
    lab.rows.append(lab.rows[0] | {"id": "html", "file": "page.png"})
    (lab.images / "page.png").write_bytes(b"<html>")
    lab.save()
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (40, 150))
    program = [sys.executable, "-m", "fino_fast.cli", "ingest", *lab.arguments()]
    run = subprocess.Popen(
        [*program, "--workers", "1", "--max-reject", "1"],
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
    )
    os.close(end)
    seen = b""
    try:
        while data := os.read(terminal, 4096):
            seen += data
    except OSError:
        assert run.wait(60) == 0  # how Linux says that nobody has the terminal open any more
    out, _ = run.communicate(timeout=60)
    os.close(terminal)
    assert run.returncode == 0
    lines = seen.decode().replace("\n", "").split("\r")
    assert lines[1].startswith("planning:")
    writing = [line for line in lines if line.startswith("writing:")]
    bar = r"%\|.*\| [\d.]+/25.0 \[\d+:\d+<(\d+:\d+|\?), .*row/s(, [\d.]+ MB/s, \d rejected)?\]"
    assert writing
    assert all(re.search(bar, line) for line in writing)
    assert re.search(r"sealing: 100%.* 25.0/25.0 .*MB/s, 1 rejected\]", lines[-2])
    assert "24 samples in 2 shards" in out
    assert "rejected: 'unknown_format' (1×)" in out


@pytest.mark.parametrize("unknown", ["missing", "error"])
def test_a_name_outside_the_vocabulary_that_comes_later(
    lab: Lab, capsys: pytest.CaptureFixture[str], unknown: str
) -> None:
    """Missing and counted in the summary, or an error; as declared. No index moves."""
    names = [f"cam {i}" for i in range(4)]
    lab.schema["factors"]["camera"] |= {"vocabulary": names, "unknown": unknown}
    lab.ingest()
    lab.rows.append(lab.rows[0] | {"id": "new", "camera": "cam 9"})
    lab.save()
    code = main(["ingest", *lab.arguments(), "--workers", "1"])
    told = capsys.readouterr()
    shards = lab.open()
    assert shards.schema.factors["camera"].vocabulary == names
    if unknown == "error":
        assert code == 2
        assert "row 25 (id 'new'), 'camera': 'cam 9' is outside the declared" in told.err
        assert len(shards) == 24
        return
    assert code == 0
    assert "'camera': taken as missing, outside the vocabulary: 'cam 9' (1×)" in told.out
    assert shards.encoded("camera")[list(shards.ids).index("new")] == -1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["verify"], ["--help"]])
def test_a_reader_that_went_away_ends_a_command_without_a_word(
    sealed: ShardSet, unbuffered: str, arguments: list[str]
) -> None:
    """`fino-fast verify shards | head`: the pipe is closed before anything is written."""
    if arguments == ["verify"]:
        arguments = ["verify", str(sealed.folder)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fino_fast.cli", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_broken_pipe_is_not_taken_for_the_reader(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: Verify) -> int:
        raise BrokenPipeError(errno.EPIPE, "a server hung up")

    monkeypatch.setattr(Verify, "run", lost)
    with pytest.raises(BrokenPipeError, match="a server hung up"):
        main(["verify", "shards"])


def test_an_output_that_has_no_sign_for_a_name_shows_its_number(lab: Lab) -> None:
    for row in lab.rows:
        row["camera"] = "Gerät µ"
    lab.ingest()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fino_fast.cli", "inspect", str(lab.out)),
            *("--sheet", str(lab.root / "sheet.png")),
        ],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"Ger\xe4t \xb5" in done.stdout


def test_an_address_without_its_engine_is_refused(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.save()
    assert main(["ingest", *lab.arguments(), "--ray-address", "auto"]) == 1
    assert "--ray-address is for --engine ray" in capsys.readouterr().err
