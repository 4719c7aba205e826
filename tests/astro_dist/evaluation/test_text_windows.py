"""Rows of text from files, the empty ones too."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from astro.errors import ConfigError
from astro_dist.evaluation.text_windows import read_rows

ROWS = ["", " = A title = \n", "Täxt"]


def test_rows_of_every_kind_of_file(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"page": [*ROWS, None]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"page": row}) for row in ROWS) + "\n")
    (tmp_path / "a.txt").write_text("Täxt\n")
    assert read_rows(str(tmp_path / "a.parquet"), "page") == [*ROWS, ""]
    assert read_rows(str(tmp_path / "a.jsonl"), "page") == ROWS
    assert read_rows(str(tmp_path / "a.txt"), "page") == ["Täxt\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "expected a file whose name ends in .parquet, .jsonl, .txt"),
        ("none.txt", None, "cannot be read"),
        ("a.jsonl", b'{"page": 3}', "line 1: expected an object with a text under 'page'"),
        ("a.jsonl", b"{", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_rows(str(tmp_path / name), "page")


@pytest.mark.parametrize("column", ["none", "number"])
def test_column_without_text_is_refused(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({"page": ROWS, "number": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=f"column '{column}'.*see --column"):
        read_rows(str(tmp_path / "a.parquet"), column)
