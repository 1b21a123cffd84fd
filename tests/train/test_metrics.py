"""metrics.jsonl across interruptions, and the clock."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fino_fast.errors import DataError
from fino_fast.train.metrics import Clock, keep_until


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.5}}\n' for step in (2, 4, 6)))
    return path


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (3, 1), (4, 2), (9, 3)])
def test_rows_of_steps_that_will_be_done_again_are_dropped(
    rows: Path, step: int, kept: int
) -> None:
    before = rows.read_text().splitlines()
    keep_until(rows, step)
    assert rows.read_text().splitlines() == before[:kept]


def test_a_row_torn_by_a_crash_is_dropped(rows: Path) -> None:
    rows.write_text(rows.read_text() + '{"step": 8, "lo')
    keep_until(rows, 100)
    assert rows.read_text().endswith('{"step": 6, "loss": 1.5}\n')


def test_a_damaged_row_is_an_error_with_its_line(rows: Path) -> None:
    rows.write_text(rows.read_text().replace('{"step": 4', "garbage"))
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2"):
        keep_until(rows, 100)


def test_clock_tells_waiting_from_working() -> None:
    def slow() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.06)
            yield item

    clock = Clock()
    for _ in clock.waiting(slow()):
        time.sleep(0.02)
        clock.count(4)
    rates = clock.read()
    assert 0.5 < rates["data_wait"] < 0.95
    assert 12 / 1.0 < rates["images_per_second"] < 12 / 0.24
    clock.count(4)
    time.sleep(0.02)
    assert clock.read()["data_wait"] == 0
