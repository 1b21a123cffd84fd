"""The inferred schema: loads, says what the table holds, and is never written over another."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fino_fast.cli import main
from fino_fast.data.declaration import Declaration
from fino_fast.data.infer import infer_schema
from fino_fast.errors import ConfigError, DataError

from .labs import Lab


def test_an_inferred_schema_ingests_the_table_it_was_inferred_from(lab: Lab) -> None:
    lab.save()
    (lab.root / "schema.yaml").unlink()
    assert main(["ingest", *lab.arguments(), "--infer"]) == 0
    declaration = Declaration.from_yaml(lab.root / "schema.yaml")
    kinds = {name: factor.kind for name, factor in declaration.factors.items()}
    assert kinds == {
        "camera": "categorical",
        "exposure": "continuous",
        "hour": "cyclic",
        "defects": "multi",
        "label": "categorical",
    }
    assert declaration.adaptation_split == "adapt"
    assert {factor.role for factor in declaration.factors.values()} == {"ignore"}
    text = (lab.root / "schema.yaml").read_text(encoding="utf-8")
    assert "8.33 % missing, 4 values: 'cam 0' (6×)" in text
    assert not lab.out.exists()
    assert main(["ingest", *lab.arguments(), "--workers", "1"]) == 0
    assert len(lab.open()) == 24


def test_signs_of_yaml_and_decimal_commas_survive(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        'id;path;"a: #b";yes;"dose, mg";remark;empty\n'
        + "".join(f'{i};p{i};"x\n{i % 2} # y";no;{i},5;note {i};\n' for i in range(30)),
        encoding="utf-8-sig",
    )
    infer_schema(table, "id", "path", tmp_path / "schema.yaml")
    declaration = Declaration.from_yaml(tmp_path / "schema.yaml")
    assert (declaration.table.delimiter, declaration.table.decimal) == (";", ",")
    kinds = {name: factor.kind for name, factor in declaration.factors.items()}
    assert kinds == {"a: #b": "categorical", "yes": "categorical", "dose, mg": "continuous"}
    text = (tmp_path / "schema.yaml").read_text(encoding="utf-8")
    assert "0.5 to 29.5" in text
    assert '"remark": left out' in text
    assert '"empty": left out, as it has no value' in text


def test_parquet(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    columns = {"id": ["a", "b"], "path": ["p", "q"], "v": [0.25, None], "n": [1, 2]}
    pq.write_table(pa.table(columns), table)
    infer_schema(table, "id", "path", tmp_path / "schema.yaml")
    factors = Declaration.from_yaml(tmp_path / "schema.yaml").factors
    assert {name: factor.kind for name, factor in factors.items()} == {
        "v": "continuous",
        "n": "categorical",
    }


def test_parquet_columns_without_cells_are_left_out(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    columns = {"id": ["1"], "file": ["a"], "plate": ["7"], "tags": [["x"]], "thumbnail": [b"\xff"]}
    pq.write_table(pa.table(columns), table)
    target = tmp_path / "schema.yaml"
    infer_schema(table, "id", "file", target)
    assert list(Declaration.from_yaml(target).factors) == ["plate"]
    text = target.read_text(encoding="utf-8")
    assert '# "tags": left out, as it holds list<' in text
    assert '# "thumbnail": left out, as it holds binary' in text


def test_several_values_in_a_cell(tmp_path: Path) -> None:
    """Combinations of a few names are told from names that hold the sign."""
    table = tmp_path / "t.csv"
    cells = [("a;b", "x;1", "p|q"), ("b", "y;2", "p"), ("", "z;3", "q| p"), ("b;a", "x;1", "")]
    lines = [f"{i},p{i},{','.join(cell)}\n" for i, cell in enumerate(cells)]
    table.write_text("id,path,tags,named,bars\n" + "".join(lines), encoding="utf-8")
    infer_schema(table, "id", "path", tmp_path / "schema.yaml")
    factors = Declaration.from_yaml(tmp_path / "schema.yaml").factors
    kinds = {name: factor.kind for name, factor in factors.items()}
    assert kinds == {"tags": "multi", "named": "categorical", "bars": "multi"}
    assert factors["bars"].separator == "|"
    text = (tmp_path / "schema.yaml").read_text(encoding="utf-8")
    assert "25 % missing, 3 combinations: 'a;b' (1×)" in text


@pytest.mark.parametrize("chunk", [1 << 7, 32 << 20])
def test_a_long_table_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """What is said of a column does not depend on them; of many values only some are counted."""
    monkeypatch.setattr("fino_fast.data.table._CHUNK_BYTES", chunk)
    monkeypatch.setattr("fino_fast.data.infer._COUNTED", 30)
    table = tmp_path / "t.csv"
    late = [""] * 150 + ['"1,5"'] * 50
    lines = [f"{i},p{i},{i - 50}.5,n{i},c{i % 3},{cell}\n" for i, cell in enumerate(late)]
    table.write_text("id,path,x,note,camera,late\n" + "".join(lines), encoding="utf-8")
    infer_schema(table, "id", "path", tmp_path / "schema.yaml")
    declaration = Declaration.from_yaml(tmp_path / "schema.yaml")
    kinds = {name: factor.kind for name, factor in declaration.factors.items()}
    assert kinds == {"x": "continuous", "camera": "categorical", "late": "continuous"}
    assert declaration.table.decimal == ","
    text = (tmp_path / "schema.yaml").read_text(encoding="utf-8")
    assert "0 % missing, -50.5 to 149.5" in text
    assert "0 % missing, more than 30 values: " in text
    assert "75 % missing, 1.5 to 1.5" in text


def test_what_cannot_be_inferred(tmp_path: Path) -> None:
    table, target = tmp_path / "t.csv", tmp_path / "schema.yaml"
    table.write_text("id,path\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="no column besides"):
        infer_schema(table, "id", "path", target)
    table.write_text("id,path,c\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no rows"):
        infer_schema(table, "id", "path", target)
    with pytest.raises(ConfigError, match="no column 'nr'"):
        infer_schema(table, "nr", "path", target)
    table.write_bytes(b"\xff\xfe,\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        infer_schema(table, "id", "path", target)
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="exists already"):
        infer_schema(table, "id", "path", target)
    assert target.read_text(encoding="utf-8") == "mine"
