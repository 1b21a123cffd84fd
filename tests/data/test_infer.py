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
        "defects": "categorical",
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
