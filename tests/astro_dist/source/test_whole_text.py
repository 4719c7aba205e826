"""Rows of whole texts, in order, the empty ones too: from files and from datasets of the Hub."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from astro.errors import ConfigError
from astro_dist.config.schema import TextSource
from astro_dist.source.whole_text import read_rows

ROWS = ["", " = A title = \n", "Täxt"]


def rows(name, column="page", **keys):
    return list(read_rows(TextSource(source=str(name), column=column, share=1.0, **keys), "--text"))


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def test_rows_of_every_kind_of_file(tmp_path):
    lines = "\n".join(json.dumps({"page": row}) for row in ROWS) + "\n"
    write_parquet(tmp_path / "a.parquet", page=[*ROWS, None])
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("Täxt\n", encoding="utf-8-sig")
    assert rows(tmp_path / "a.parquet") == [*ROWS, ""]
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "a.jsonl.gz") == ROWS
    assert rows(tmp_path / "a.txt") == ["Täxt\n"]


def test_the_text_that_every_python_ships_is_one_too():
    topics = rows("python-docs", column="auto", split="test")
    assert len(topics) > 50
    assert sum(map(len, topics)) > 200_000


def test_rows_of_a_dataset_are_those_of_the_split_in_order(dataset_hub, tmp_path):
    for part in range(2):
        texts = [f"{part} {number}" if number % 3 else "" for number in range(5)]
        write_parquet(tmp_path / "data" / f"test-{part:05d}-of-00002.parquet", page=texts)
    dataset_hub.publish("org/pages", tmp_path / "data")
    assert rows("org/pages", split="test") == ["", "0 1", "0 2", "", "0 4", "", "1 1", "1 2", "", "1 4"]
    with pytest.raises(ConfigError, match="--text org/pages: .*it has no column text, only page; see `column`"):
        rows("org/pages", "text", split="test")
    with pytest.raises(ConfigError, match="--text org/pages: .*no split 'train'; set `split` to one of test"):
        rows("org/pages", split="train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a.csv: expected python-docs, a file \(\*.txt, .*, or a dataset on the Hub"),
        ("none.txt", None, "none.txt: there is no such file"),
        ("a.jsonl", b'{"page": 3}', "line 1: expected text in column 'page', got 3"),
        ("a.jsonl", b'{"page": ""}\n{"text": ""}', "it has no column page, only text"),
        ("a.jsonl", b"{", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        rows(tmp_path / name)


@pytest.mark.parametrize(("column", "message"), [("none", "no column none"), ("number", "expected text in column")])
def test_column_without_text_is_refused(tmp_path, column, message):
    write_parquet(tmp_path / "a.parquet", page=ROWS, number=[1, 2, 3])
    with pytest.raises(ConfigError, match=message):
        rows(tmp_path / "a.parquet", column)


def test_files_have_no_subsets(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="only a dataset on the Hub has a subset"):
        rows(tmp_path / "a.txt", subset="raw")
