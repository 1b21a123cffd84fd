"""The write phase: what its groups of images must not change."""

import pytest

from fino_fast.data import write
from fino_fast.data.ingest import Allowance
from fino_fast.data.verify import verify

from .labs import Lab
from .test_ingest import content


@pytest.mark.parametrize("together", [1, 3000])
def test_how_many_images_are_written_in_one_go_changes_no_byte(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Rejected rows in between, and first and last ones, keep their places."""
    for i in (0, 5, 6, 23):
        (lab.images / lab.rows[i]["file"]).write_bytes(b"<html>")
    outputs = []
    for size in (write._TOGETHER, together):
        monkeypatch.setattr(write, "_TOGETHER", size)
        out = lab.root / f"out{size}"
        report = lab.ingest(out=out, max_reject=Allowance(count=4))
        assert report.rejects == {"unknown_format": 4}
        assert verify(out) == []
        outputs.append(content(out))
    assert outputs[0] == outputs[1]
