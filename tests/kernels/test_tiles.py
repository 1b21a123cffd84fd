"""Which tiles are taken, and into how many parts the rows of a bank's gradient are split."""

from dataclasses import replace

import pytest
import torch
from fino_fast.kernels.backward import WANTED_BANK_TILES, split_rows
from fino_fast.kernels.forward import MAX_SPLITS
from fino_fast.kernels.tiles import TILES, WANTED_PROGRAMS, choose, pieces, tiles_of

ROWS = TILES[9, torch.bfloat16].rows
LARGE, SMALL, LARGE_ANY, SMALL_ANY = ROWS
MANY = WANTED_PROGRAMS * LARGE.outer


@pytest.mark.parametrize(
    ("depth", "vectors", "expected"),
    [
        (LARGE.holds, MANY, LARGE),
        # Not enough tiles for a GPU, or too wide for the large ones.
        (LARGE.holds, MANY - LARGE.outer, SMALL),
        (LARGE.holds + 16, MANY, SMALL),
        # Too wide to be held.
        (SMALL.holds + 16, MANY, LARGE_ANY),
        (SMALL.holds + 16, 1, SMALL_ANY),
        # No vectors at all.
        (0, 0, SMALL),
    ],
)
def test_the_largest_tiles_that_fill_a_gpu(depth: int, vectors: int, expected: object) -> None:
    assert choose(ROWS, depth, vectors) is expected


@pytest.mark.parametrize("key", TILES, ids=str)
def test_every_width_has_tiles(key: tuple[int, torch.dtype]) -> None:
    for sizes in (TILES[key].sweeps, TILES[key].rows, TILES[key].banks):
        assert sizes == tuple(
            sorted(sizes, key=lambda s: (not s.holds, s.holds, -s.outer)),
        )
        for depth in (16, 768, 100_000):
            for vectors in (1, 10**6):
                chosen = choose(sizes, depth, vectors)
                assert chosen.holds >= depth or chosen.holds == 0
                assert pieces(chosen, [depth]) == (
                    (-(-depth // chosen.depth),) if chosen.holds else (0,)
                )


@pytest.mark.parametrize(
    ("capability", "kib", "held_by"),
    [((8, 0), 163, 8), ((9, 0), 227, 9), ((10, 3), 227, 10), ((11, 0), 227, 10),
     ((8, 6), 99, None), ((8, 9), 99, None), ((12, 0), 99, None)],
)  # fmt: skip
def test_tiles_of_chips(capability: tuple[int, int], kib: int, held_by: int | None) -> None:
    """Those of workstations have no room for tiles that are held."""
    found = tiles_of(capability[0], kib * 1024, torch.bfloat16)
    if held_by is None:
        assert not any(s.holds for s in (*found.sweeps, *found.rows, *found.banks))
    else:
        assert found is TILES[held_by, torch.bfloat16]


@pytest.mark.parametrize(("inner", "step", "chunk"), [(16, 32, 64), (32, 32, 48)])
def test_steps_do_not_read_what_no_tile_has_written(inner: int, step: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="a chunk holds whole tiles, and a tile whole steps"):
        replace(LARGE, inner=inner, step=step, chunk=chunk)


@pytest.mark.parametrize("bank_tiles", [1, 8, 79, 300, 400, 7813])
@pytest.mark.parametrize("rows", [1, 63, 8192, 131_072])
def test_rows_are_split_where_banks_have_few_tiles(bank_tiles: int, rows: int) -> None:
    share, parts = split_rows(bank_tiles, rows, LARGE)
    wanted = max(1, min(MAX_SPLITS, WANTED_BANK_TILES // bank_tiles))
    assert share % LARGE.inner == 0
    assert (parts - 1) * share < rows <= parts * share  # no part without a row
    assert parts == wanted if rows == 131_072 else parts <= wanted
