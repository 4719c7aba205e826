"""Datasets of the Hub: pinned to a commit, streamed or kept in its cache, and none of their code runs."""

import gzip
import json
import random
import sys

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from astro.errors import ConfigError
from astro_dist.config.schema import CalibrationConfig
from astro_dist.source import hub_dataset
from astro_dist.source.calibration_text import read_texts, tokenize
from astro_dist.source.hub_dataset import read_dataset
from tests.support.models import byte_tokenizer

CARD = """---
configs:
- config_name: long
  data_files: [{split: train, path: long/*.parquet}]
- config_name: short
  data_files:
  - {split: train, path: "short/train-*"}
  - {split: test, path: "short/test-*"}
---
"""


@pytest.fixture
def hub(dataset_hub):
    return dataset_hub


@pytest.fixture
def lines(hub, tmp_path):
    """A dataset with two subsets, whose rows are numbered lines."""
    folder = tmp_path / "lines"
    for subset, split, count in (("long", "train", 30), ("short", "train", 30), ("short", "test", 5)):
        for part in range(2):
            texts = [f"{subset} {split} {part} {number:03d}." for number in range(count)]
            path = folder / subset / f"{split}-{part:05d}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table(texts), path, row_group_size=10)
    (folder / "README.md").write_text(CARD)
    hub.publish("org/lines", folder)
    return folder


def table(texts):
    return pa.table({"id": list(range(len(texts))), "text": texts})


def source(name="org/lines", **keys):
    return CalibrationConfig(source=name, **keys).texts[0]


def go_offline(monkeypatch, hub):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.close()


@pytest.mark.parametrize("kept_bytes", [0, 1 << 26], ids=["streamed", "kept"])
def test_rows_of_a_split_keep_their_order_within_row_groups(hub, lines, monkeypatch, kept_bytes):
    monkeypatch.setattr(hub_dataset, "_KEPT_BYTES", kept_bytes)
    rows, commit, notes = read_dataset(source(subset="short"), 10_000, 0)
    assert commit == hub.refs["org/lines"]["main"]
    assert rows.column == "text"
    assert sorted(rows.rows) == [f"short train {part} {number:03d}." for part in range(2) for number in range(30)]
    groups = [rows.rows[start : start + 10] for start in range(0, 60, 10)]
    assert all(group == sorted(group) for group in groups)
    assert groups != sorted(groups)
    assert [f"at commit {commit}" in note for note in notes] == ([True] if kept_bytes == 0 else [])


def test_what_is_streamed_and_what_is_kept_are_the_same_rows(hub, lines, monkeypatch):
    kept = read_dataset(source(subset="short"), 10_000, 3)[0]
    monkeypatch.setattr(hub_dataset, "_KEPT_BYTES", 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(lines.parent / "empty"))
    streamed, other = (read_dataset(source(subset="short"), 10_000, seed)[0] for seed in (3, 4))
    assert kept == streamed != other


def test_only_what_is_needed_of_a_large_split_is_read(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_dataset, "_KEPT_BYTES", 0)
    monkeypatch.setattr(hub_dataset, "SMALLEST_PIECE", 1)
    draw = random.Random(0)
    texts = [draw.randbytes(1000).hex() for _ in range(8000)]
    (tmp_path / "big").mkdir()
    pq.write_table(
        table(texts), tmp_path / "big" / "train.parquet", row_group_size=100, compression="none", use_dictionary=False
    )
    hub.publish("org/big", tmp_path / "big")
    rows = read_dataset(source("org/big"), 100_000, 0)[0]
    assert 100_000 <= sum(map(len, rows.rows)) < 104_000
    assert hub.served < 16_000_000 / 2


def test_a_run_asks_for_the_commit_that_it_began_with(hub, lines, tmp_path):
    first, commit, _ = read_dataset(source(subset="short", split="test"), 1000, 0)
    other = tmp_path / "other" / "short"
    other.mkdir(parents=True)
    (other.parent / "README.md").write_text(CARD)
    pq.write_table(table(["new"]), other / "test-00000-of-00001.parquet")
    hub.publish("org/lines", other.parent)
    assert read_dataset(source(subset="short", split="test"), 1000, 0)[0].rows == ["new"]
    assert read_dataset(source(subset="short", split="test"), 1000, 0, commit)[:2] == (first, commit)
    assert read_dataset(source(subset="short", split="test", revision=commit), 1000, 0)[:2] == (first, commit)


def test_without_a_network_the_cache_is_read(hub, lines, monkeypatch):
    online = read_dataset(source(subset="short"), 10_000, 0)
    go_offline(monkeypatch, hub)
    assert read_dataset(source(subset="short"), 10_000, 0) == online
    with pytest.raises(
        ConfigError, match="org/other: it is not in the Hub's cache .* run: hf download org/other --repo"
    ):
        read_dataset(source("org/other"), 10_000, 0)
    with pytest.raises(ConfigError, match="org/lines: .*run: hf download org/lines"):
        read_dataset(source(subset="long"), 10_000, 0)


def test_a_cache_that_holds_a_part_of_a_split_is_refused(hub, lines, monkeypatch, tmp_path):
    read_dataset(source(subset="short"), 10_000, 0)
    (part,) = (tmp_path / "cache").rglob("train-00001-of-00002.parquet")
    part.unlink()
    go_offline(monkeypatch, hub)
    with pytest.raises(ConfigError, match="the cache holds 1 of 2 files"):
        read_dataset(source(subset="short"), 10_000, 0)


def test_a_dataset_without_a_card_is_read_by_the_names_of_its_files(hub, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"question {number}", "name": None}]} for number in range(3)]
    (tmp_path / "chats" / "data").mkdir(parents=True)
    with gzip.open(tmp_path / "chats" / "data" / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    hub.publish("org/chats", tmp_path / "chats")
    read = read_dataset(source("org/chats"), 1000, 0)[0]
    assert read.column == "messages"
    assert read.rows == [[{"role": "user", "content": f"question {number}"}] for number in range(3)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "org/nothing"}, "no such file here, and the Hub has no such dataset"),
        ({"subset": "short", "revision": "v9"}, "no branch, tag or commit 'v9'; correct `revision`"),
        ({}, "has several subsets and no default one; set `subset` to one of long, short"),
        ({"subset": "shor"}, "has no subset 'shor'; set `subset` to one of long, short"),
        (
            {"subset": "short", "split": "train_sft"},
            "no split 'train_sft'; set `split` to one of train, test",
        ),
        ({"subset": "short", "column": "prompt"}, "no column prompt, only id, text; see `column`"),
        ({"subset": "short", "column": "id"}, "column 'id' holds 0, expected text or a list of messages"),
    ],
)
def test_what_is_missing_is_named(hub, lines, keys, message):
    with pytest.raises(ConfigError, match=message):
        read_dataset(source(**keys), 1000, 0)


def test_a_gated_dataset_says_where_to_ask(hub, lines):
    hub.gated.add("org/lines")
    with pytest.raises(ConfigError, match="ask.* for at https://huggingface.co/datasets/org/lines; then set HF_TOKEN"):
        read_dataset(source(subset="short"), 1000, 0)


@pytest.mark.parametrize("file", ["code.py", "train.pkl"])
def test_no_code_of_a_dataset_runs(hub, tmp_path, file):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    hub.publish("org/code", tmp_path / "code")
    with pytest.raises(ConfigError, match="org/code: no files that end in .* code in a dataset is never run"):
        read_dataset(source("org/code"), 1000, 0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["{folder}/secret.jsonl", "../../secret.jsonl"])
def test_files_outside_a_dataset_are_never_read(hub, tmp_path, monkeypatch, place):
    (tmp_path / "secret.jsonl").write_text('{"text": "a secret"}\n')
    (tmp_path / "astray").mkdir()
    files = place.format(folder=tmp_path)
    (tmp_path / "astray" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: a\n  data_files: [{{split: train, path: {files}}}]\n---\n"
    )
    hub.publish("org/astray", tmp_path / "astray")
    with pytest.raises(ConfigError, match="org/astray: "):
        read_dataset(source("org/astray"), 1000, 0)
    go_offline(monkeypatch, hub)
    in_cache = tmp_path / "cache" / "datasets--org--astray" / "secret.jsonl"  # above the folders of commits
    in_cache.write_text('{"text": "a secret"}\n')
    with pytest.raises(ConfigError, match="which is no file of the dataset; such a file is never read"):
        read_dataset(source("org/astray"), 1000, 0)


def test_chats_of_parts_are_counted(hub, tmp_path):
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 1000}]}]} for _ in range(500)]
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub.publish("org/parts", tmp_path / "parts")
    assert len(read_dataset(source("org/parts"), 1000, 0)[0].rows) < 100  # 64 kB are the least that is read


def test_without_the_library_the_command_to_install_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="org/lines: is no file here, .* missing; run: pip install 'datasets>=4.6'"):
        read_dataset(source(), 1000, 0)


def test_what_was_read_is_recorded(hub, lines):
    config = CalibrationConfig(
        source="org/lines", subset="short", samples=10, holdout_samples=2, sequence_length=32, chunk_samples=4
    )
    tokenizer = byte_tokenizer()
    (share,) = tokenize(read_texts(config, tokenizer), tokenizer, config).shares
    assert share.to_json() == {
        "source": "org/lines", "subset": "short", "split": "train", "column": "auto", "share": 1.0,
        "commit": hub.refs["org/lines"]["main"], "samples": 10, "holdout_samples": 2,
    }  # fmt: skip
