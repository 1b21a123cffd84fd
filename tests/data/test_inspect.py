"""`fino-fast inspect`: the sheet shows the images as training sees them, the text every factor."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fino_fast.cli import main
from fino_fast.data import ShardSet
from fino_fast.data.inspect import (
    _CAPTION,
    _GAP,
    _TILE,
    contact_sheet,
    factor_lines,
    shorten_name,
    summary_lines,
)
from fino_fast.errors import DataError

from .labs import Lab


def test_command_writes_a_sheet_and_prints_every_factor(
    sealed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", str(sealed.folder), "--sheet", str(sheet), "--count", "9"]) == 0
    text = capsys.readouterr().out
    assert "60 samples: 48 adapt, 12 test" in text
    for name, factor in sealed.schema.factors.items():
        assert f"{name} ({factor.kind}, {factor.role})" in text
    picture = Image.open(io.BytesIO(sheet.read_bytes()))
    assert picture.size == (3 * (_TILE + _GAP), 3 * (_TILE + _CAPTION + _GAP))


def test_bars_count_every_sample_once(sealed: ShardSet) -> None:
    lines = factor_lines(sealed, "camera", sealed.schema.factors["camera"])
    cameras = sealed.raw("camera")
    assert lines[0].startswith("camera (categorical, suppress): 10 % missing")
    counted = {
        line.split("  ")[1].split(" █")[0].strip(): int(line.split()[-1]) for line in lines[1:]
    }
    assert counted == {f"cam {i}": list(cameras).count(f"cam {i}") for i in range(4)}
    lines = factor_lines(sealed, "exposure", sealed.schema.factors["exposure"])
    exposures = np.asarray(sealed.raw("exposure"), dtype=float)
    assert sum(int(line.split()[-1]) for line in lines[1:]) == np.isfinite(exposures).sum()


def test_a_wrong_white_is_seen(lab: Lab) -> None:
    """12-bit values in 16-bit files are near black until `bits_used` says what white is."""
    from fino_fast.data.tiff import encode_tiff

    for i, row in enumerate(lab.rows):
        row["file"] = f"deep{i}.tiff"
        image = np.full((20, 20, 2), 4000, np.uint16)
        (lab.images / row["file"]).write_bytes(encode_tiff(image))
    brightest = []
    for declared, out in (({}, "plain"), ({"bits_used": 12}, "declared")):
        lab.schema["images"] = declared
        lab.ingest(out=lab.root / out)
        sheet = contact_sheet(ShardSet.open(lab.root / out), "adapt", 1)
        brightest.append(int(np.asarray(sheet)[5, 5].max()))
    assert brightest == [round(4000 / 65535 * 255), round(4000 / 4095 * 255)]


def test_a_factor_without_values_and_a_wrong_split(lab: Lab) -> None:
    for row in lab.rows:
        row["exposure"] = ""
    lab.schema["factors"]["exposure"] = {"kind": "continuous", "role": "ignore"}
    lab.ingest()
    shards = lab.open()
    assert factor_lines(shards, "exposure", shards.schema.factors["exposure"]) == [
        "exposure (continuous, ignore): 100 % missing"
    ]
    with pytest.raises(DataError, match="no split 'nowhere'"):
        contact_sheet(shards, "nowhere", 4)


def test_every_channel_can_be_looked_at(lab: Lab) -> None:
    """Five channels of 16 bits, each of one brightness; a wide image stands above its caption."""
    from fino_fast.data.tiff import encode_tiff

    values = [60000, 40000, 20000, 10000, 0]
    for i, row in enumerate(lab.rows):
        row["file"] = f"five{i}.tiff"
        image = np.broadcast_to(np.array(values, np.uint16), (20, 40, 5)).copy()
        (lab.images / row["file"]).write_bytes(encode_tiff(image))
    lab.ingest()
    shards = lab.open()
    for channel, value in enumerate(values):
        sheet = np.asarray(contact_sheet(shards, "adapt", 1, channel=channel))
        assert sheet[_TILE - 1, 5].tolist() == [round(value / 65535 * 255)] * 3
        assert sheet[5, 5].tolist() == [255] * 3
    with pytest.raises(DataError, match=r"sample 's\d+' in .*: has channels 0 … 4, not 5"):
        contact_sheet(shards, "adapt", 1, channel=5)
    assert "24 uint16 of 5 channels" in summary_lines(shards)[1]


def test_names_that_would_break_the_layout() -> None:
    assert shorten_name("é µ", 5) == "é µ"
    assert shorten_name("line\nbreak\x1b", 40) == r"line\nbreak\x1b"
    assert shorten_name("plate 7, well B03, field 12", 12) == "plat…ield 12"
    assert len(shorten_name("x" * 300, 12)) == 12
