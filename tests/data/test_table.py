"""Cells of a table: what is missing, what is a number, what is refused, with its row."""

import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from fino_fast.data import table as table_module
from fino_fast.data.declaration import Declaration
from fino_fast.data.table import Rows, TableParser, table_chunks
from fino_fast.errors import ConfigError, DataError, TooManyRejectsError


def declare(decimal: str = ".", split: str | None = None, **factors: dict[str, Any]) -> Declaration:
    for factor in factors.values():
        factor.setdefault("role", "suppress")
    content: dict[str, Any] = {"factors": factors, "table": {"decimal": decimal}}
    if split:
        content["split"] = {"column": split}
    return Declaration.model_validate(content)


def parse(declaration: Declaration, **columns: list[Any]) -> Rows:
    count = len(next(iter(columns.values())))
    columns = {"id": [f"i{k}" for k in range(count)], "path": ["p"] * count} | columns
    return parsed(pa.table(columns), declaration)[0]


def parsed(
    table: pa.Table, declaration: Declaration, piece: int = 1000
) -> tuple[Rows, dict[str, dict[str, int]]]:
    """Checked rows of a table that comes in pieces, and its unknown values."""
    parser = TableParser(declaration, "id", "path")
    starts = range(0, len(table), piece)
    parts = [parser.parse(table.slice(start, piece)) for start in starts]
    parser.check(lambda: (part.ids for part in parts))
    raw = {name: pa.concat_arrays([part.raw[name] for part in parts]) for name in parts[0].raw}
    ids, paths, splits = (
        pa.concat_arrays([getattr(part, name) for part in parts])
        for name in ("ids", "paths", "splits")
    )
    return Rows(ids, paths, splits, raw), parser.unknown


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """The named columns of a table, whole."""
    return pa.concat_tables(table_chunks(path, columns)).combine_chunks()


EXPOSURE = {"kind": "continuous"}
CAMERA = {"kind": "categorical"}


def test_every_missing_marker_becomes_null() -> None:
    cells = ["1.5", "", "NA", "nan", "NaN", "n/a", " NA ", "None", "null", "-2e-3"]
    raw = parse(declare(v=EXPOSURE), v=cells).raw["v"]
    assert raw.to_pylist() == [1.5, *[None] * 8, -0.002]
    raw = parse(declare(v=CAMERA), v=["a", "", "NA", "nan", "?"]).raw["v"]
    assert raw.to_pylist() == ["a", None, None, None, "?"]


def test_a_factor_may_add_its_own_marker() -> None:
    rows = parse(declare(v={**EXPOSURE, "missing": ["-999"]}), v=["-999", "3"])
    assert rows.raw["v"].to_pylist() == [None, 3.0]


@pytest.mark.parametrize(
    "cell", ["1,5", "inf", "-Infinity", "1e999", "12 mm", "0x10", "1_000", "٣"]
)
def test_what_is_no_finite_number_is_named_with_row_and_id(cell: str) -> None:
    with pytest.raises(TooManyRejectsError) as caught:
        parse(declare(v=EXPOSURE), v=["1", cell, "2"])
    assert "row 2 (id 'i1'), 'v'" in str(caught.value)
    assert repr(cell) in str(caught.value)
    assert ("table.decimal" in str(caught.value)) == (cell == "1,5")


def test_decimal_comma() -> None:
    declaration = declare(",", v=EXPOSURE)
    assert parse(declaration, v=["1,5", "2", "-0,25"]).raw["v"].to_pylist() == [1.5, 2.0, -0.25]
    with pytest.raises(TooManyRejectsError, match=r"'1\.5' is not a number"):
        parse(declaration, v=["1.5"])


def test_all_faults_are_collected_before_the_end() -> None:
    with pytest.raises(TooManyRejectsError) as caught:
        parse(declare(v=EXPOSURE), v=["x"] * 40 + ["1"])
    assert str(caught.value).startswith("40 cells")
    assert "and 30 more" in str(caught.value)


def test_infinite_and_nan_numbers_of_a_parquet_column() -> None:
    raw = parse(declare(v=EXPOSURE), v=[1.0, math.nan, None]).raw["v"]
    assert raw.to_pylist() == [1.0, None, None]
    with pytest.raises(TooManyRejectsError, match="is infinite"):
        parse(declare(v=EXPOSURE), v=[1.0, math.inf])


@pytest.mark.parametrize("column", [[1.0, -1e39], ["1", "-1e39"]])
def test_numbers_that_a_batch_could_not_hold(column: list[object]) -> None:
    with pytest.raises(TooManyRejectsError, match=r"-1e\+39 does not fit float32"):
        parse(declare(v=EXPOSURE), v=column)


def test_bounds() -> None:
    declaration = declare(v={**EXPOSURE, "low": 0, "high": 2})
    assert parse(declaration, v=["0", "2", ""]).raw["v"].to_pylist() == [0.0, 2.0, None]
    with pytest.raises(TooManyRejectsError, match=r"2\.5 is outside the declared bounds \[0"):
        parse(declaration, v=["0", "2.5"])


def test_several_columns_of_one_factor_keep_their_own_missing_entries() -> None:
    declaration = declare(xy={"kind": "continuous", "columns": ["x", "y"]})
    raw = parse(declaration, x=["1", "", "3"], y=["4", "5", "NA"]).raw["xy"]
    assert raw.to_pylist() == [[1.0, 4.0], [None, 5.0], [3.0, None]]


def test_multi_valued_cells() -> None:
    raw = parse(declare(tags={"kind": "multi"}), tags=["a; b;a", "", ";", "b"]).raw["tags"]
    assert raw.to_pylist() == [["a", "b"], None, [], ["b"]]


def test_value_outside_a_declared_vocabulary() -> None:
    strict = declare(c={**CAMERA, "vocabulary": ["a", "b"]})
    with pytest.raises(TooManyRejectsError, match=r"row 2 .*'c': 'z' is outside the declared"):
        parse(strict, c=["a", "z", ""])
    lenient = declare(c={**CAMERA, "vocabulary": ["a", "b"], "unknown": "missing"})
    table = pa.table({"id": list("1234"), "path": ["p"] * 4, "c": ["a", "z", "", "z"]})
    for piece in (1, 4):
        rows, unknown = parsed(table, lenient, piece)
        assert rows.raw["c"].to_pylist() == ["a", None, None, None]
        assert unknown == {"c": {"z": 2}}


def test_unknown_value_beside_a_known_one_leaves_the_known() -> None:
    lenient = declare(t={"kind": "multi", "vocabulary": ["a", "b"], "unknown": "missing"})
    table = pa.table({"id": list("123"), "path": ["p"] * 3, "t": ["a;z", "z", "b"]})
    rows, unknown = parsed(table, lenient)
    assert rows.raw["t"].to_pylist() == [["a"], None, ["b"]]
    assert unknown == {"t": {"z": 2}}


E_ACUTE = ("é", unicodedata.normalize("NFD", "é"))


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (["a", "b", "a"], "rows 1, 3: 'a'"),
        (["Cell", "b", "cell"], "rows 1, 3: 'Cell' and 'cell'"),
        ([E_ACUTE[0], "b", E_ACUTE[1]], "rows 1, 3: 'é' (NFC) and 'é' (NFD)"),
    ],
)
def test_ids_that_a_file_system_may_confuse(ids: list[str], told: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(declare(c=CAMERA), id=ids, c=["x"] * 3)
    found = unicodedata.normalize("NFC", str(caught.value))
    assert unicodedata.normalize("NFC", told) in found


@pytest.mark.parametrize("piece", [1, 3, 7])
def test_a_table_in_pieces_has_the_faults_of_the_whole(piece: int) -> None:
    cells = ["1", "x", "2", "3", "y", "4", "inf", "", "z", "5"]
    ids = [f"i{k}" for k in range(10)]
    table = pa.table({"id": ids, "path": ["p"] * 10, "v": cells})
    with pytest.raises(TooManyRejectsError) as whole:
        parsed(table, declare(v=EXPOSURE))
    with pytest.raises(TooManyRejectsError, match="4 cells") as parts:
        parsed(table, declare(v=EXPOSURE), piece)
    assert str(parts.value) == str(whole.value)
    assert "row 7 (id 'i6')" in str(parts.value)


@pytest.mark.parametrize("piece", [1, 2, 5])
def test_ids_that_repeat_in_another_piece_are_found(piece: int) -> None:
    ids = ["Cell", "b", "é", "c", "cell", unicodedata.normalize("NFD", "é"), "d"]
    table = pa.table({"id": ids, "path": ["p"] * 7, "c": ["x"] * 7})
    with pytest.raises(DataError) as caught:
        parsed(table, declare(c=CAMERA), piece)
    assert "2 ids occur more than once" in str(caught.value)
    assert "rows 1, 5: 'Cell' and 'cell'" in str(caught.value)
    assert "rows 3, 6" in str(caught.value)


def test_equal_hashes_of_different_ids_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes only point to candidates; what is refused has to be equal."""
    monkeypatch.setattr(table_module, "hashes", lambda values: np.zeros(len(values), np.int64))
    table = pa.table({"id": ["a", "b", "c"], "path": ["p"] * 3, "c": ["x"] * 3})
    assert len(parsed(table, declare(c=CAMERA))[0]) == 3
    with pytest.raises(DataError, match=r"1 ids occur more than once.*\n  rows 1, 4: 'a' and 'A'"):
        parsed(pa.concat_tables([table, pa.table({"id": ["A"], "path": ["p"], "c": ["x"]})]),
               declare(c=CAMERA))  # fmt: skip


def test_a_file_in_pieces_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"i{k}", f'a, "b"\n{k}', f"{k / 7}") for k in range(500)]
    whole = pa.table([list(column) for column in zip(*rows, strict=True)], ["id", "c", "v"])
    pyarrow.csv.write_csv(whole, tmp_path / "t.csv")
    pq.write_table(whole, tmp_path / "t.parquet", row_group_size=70)
    monkeypatch.setattr(table_module, "_CHUNK_ROWS", 64)
    monkeypatch.setattr(table_module, "_CHUNK_BYTES", 1 << 10)
    for name in ("t.csv", "t.parquet"):
        assert len(list(table_module.table_chunks(tmp_path / name, ["id", "v"]))) > 5
        assert read_table(tmp_path / name, ["id", "c", "v"]).equals(whole)


def test_empty_id_path_or_split_is_named() -> None:
    for column in ("id", "path", "s"):
        columns = {"id": ["a", "b"], "path": ["p", "q"], "s": ["adapt", "test"], "c": ["x", "y"]}
        columns[column] = ["k", ""]
        with pytest.raises(TooManyRejectsError, match=rf"row 2 .*'{column}': is empty"):
            parse(declare(split="s", c=CAMERA), **columns)


def test_parquet_types_become_the_strings_a_person_wrote(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table(
        {
            "id": [1, 2],
            "path": ["a", "b"],
            "plate": pa.array([7, None], pa.int32()),
            "well": pa.array(["A1", "B2"]).dictionary_encode(),
            "v": pa.array([1, 2], pa.int8()),
        }
    )
    pq.write_table(table, path)
    columns = ["id", "path", "plate", "well", "v"]
    declaration = declare(plate=CAMERA, well=CAMERA, v=EXPOSURE)
    rows, _ = parsed(read_table(path, columns), declaration)
    assert rows.ids.to_pylist() == ["1", "2"]
    assert rows.raw["plate"].to_pylist() == ["7", None]
    assert rows.raw["well"].to_pylist() == ["A1", "B2"]
    assert rows.raw["v"].to_pylist() == [1.0, 2.0]


def test_csv_cells_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,c\n007,"x, ""y""\nz"\n1e3,true\n', encoding="utf-8-sig")
    table = read_table(path, ["id", "c"])
    assert table.to_pydict() == {"id": ["007", "1e3"], "c": ['x, "y"\nz', "true"]}


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (b"id,c\n1,2\n", ConfigError, "no column 'missing'; it has 'id', 'c'"),
        (b"id;missing\n1;2\n", ConfigError, "set table.delimiter"),
        (b"missing,missing\n1,2\n", ConfigError, "more than once"),
        (b"missing,c\n1,2,3\n", DataError, "cannot be read as a table"),
        (b"missing\n\xff\xfe\n", DataError, "is not UTF-8"),
        ("id,missing\n1,2\n".encode("utf-16"), DataError, "is not UTF-8 .*UTF-16"),
        (b"", DataError, "has no rows"),
        (b"id,missing", DataError, "has no rows"),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, content: bytes, error: type[Exception], told: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(error, match=told):
        read_table(path, ["missing"])


def test_a_csv_that_calls_itself_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"id,c\n1,2\n")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_table(path, ["id"])
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "absent.csv", ["id"])


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([["a"], ["b", "c"]], "list<"),
        ([{"x": 1}, {"x": 2}], "struct<"),
        ([b"\xff", b"c"], "binary"),
    ],
)
def test_a_parquet_column_without_cells_is_named(
    tmp_path: Path, column: list[object], kind: str
) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["1", "2"], "odd": column}), path)
    with pytest.raises(ConfigError, match=rf"t\.parquet: column 'odd' holds {kind}.*expected text"):
        read_table(path, ["id", "odd"])
    assert read_table(path, ["id"]).num_rows == 2


def test_wide_ints_keep_their_value() -> None:
    rows = parse(declare(c=CAMERA), c=np.array([2**53 + 1, 5]).tolist())
    assert rows.raw["c"].to_pylist() == ["9007199254740993", "5"]


@pytest.mark.parametrize("text", ["id,µm\n1,2\n", "id,c\n1,µm\n"])
def test_a_table_of_another_encoding_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "from-excel.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"from-excel\.csv: is not UTF-8"):
        read_table(path, text.splitlines()[0].split(","))
