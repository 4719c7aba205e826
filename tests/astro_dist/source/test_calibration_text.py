"""Text to chunks: fixed by the text, the tokenizer and the settings."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from astro.errors import ConfigError
from astro_dist.config.schema import CalibrationConfig
from astro_dist.schedule.names import is_held_out
from astro_dist.source.calibration_text import read_documents, tokenize
from tests.support.models import byte_tokenizer

DOCUMENTS = [f"document {i:02d} " * 20 for i in range(8)]


def settings(**changes):
    return CalibrationConfig(
        **{"samples": 10, "sequence_length": 32, "chunk_samples": 4, "holdout_samples": 5, **changes}
    )


def test_chunks_have_fixed_sizes_and_names():
    found = tokenize(DOCUMENTS, byte_tokenizer(), settings())
    assert [(chunk.name, chunk.tokens.shape) for chunk in found.chunks] == [
        ("c0000", (4, 32)), ("c0001", (4, 32)), ("c0002", (2, 32)), ("h0000", (4, 32)), ("h0001", (1, 32)),
    ]  # fmt: skip


def test_every_fourth_document_is_held_out():
    tokenizer = byte_tokenizer()
    found = tokenize(DOCUMENTS, tokenizer, settings(samples=40, holdout_samples=15))
    texts = {True: "", False: ""}
    for chunk in found.chunks:
        texts[is_held_out(chunk.name)] += "".join(tokenizer.decode(row) for row in chunk.tokens)
    assert [f"document {i:02d}" in texts[True] for i in range(8)] == [i in (3, 7) for i in range(8)]
    assert [f"document {i:02d}" in texts[False] for i in range(8)] == [i not in (3, 7) for i in range(8)]


def test_single_document_is_split_at_three_quarters():
    found = tokenize(["a" * 900 + "b" * 300], byte_tokenizer(), settings())
    calibration, holdout = (
        {t for c in found.chunks if is_held_out(c.name) is h for t in c.tokens.ravel()} for h in (False, True)
    )
    assert len(calibration) == len(holdout) == 1
    assert calibration != holdout


def test_seed_chooses_and_repeats():
    hashes = [tokenize(DOCUMENTS, byte_tokenizer(), settings(seed=seed)).sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_bos_begins_each_sequence_where_the_tokenizer_puts_one():
    tokenizer = byte_tokenizer()

    def with_bos(text, add_special_tokens=True, **options):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [256, *ids] if add_special_tokens else ids}

    with_bos.bos_token_id = 256
    found = tokenize(DOCUMENTS, with_bos, settings())
    assert all((chunk.tokens[:, 0] == 256).all() and (chunk.tokens[:, 1:] != 256).all() for chunk in found.chunks)


def test_no_holdout_is_allowed():
    found = tokenize(DOCUMENTS, byte_tokenizer(), settings(holdout_samples=0))
    assert [chunk.name for chunk in found.chunks] == ["c0000", "c0001", "c0002"]


def test_large_text_is_sampled_before_it_is_tokenized():
    seen = []
    tokenizer = byte_tokenizer()

    def counting(text, **options):
        seen.append(text)
        return tokenizer(text, **options)

    counting.bos_token_id = None
    found = tokenize(DOCUMENTS * 100, counting, settings(samples=2, holdout_samples=1))
    assert 2 * 32 * 64 <= sum(len(text) for text in seen if len(text) > 1) < 4 * 32 * 64
    assert [chunk.tokens.shape for chunk in found.chunks] == [(2, 32), (1, 32)]


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(ConfigError, match=r"calibration.samples: 1000 sequences of 32 tokens .* gives 45"):
        tokenize(DOCUMENTS, byte_tokenizer(), settings(samples=1000))


def test_python_docs_need_no_download():
    documents = read_documents(CalibrationConfig(source="python-docs"))
    assert sum(map(len, documents)) > 300_000


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    pq.write_table(pa.table({"text": ["one", "", None, "two"]}), tmp_path / "a.parquet")
    read = {name: read_documents(CalibrationConfig(source=str(tmp_path / name))) for name in ("a.txt", "a.parquet")}
    assert read == {"a.txt": ["some text"], "a.parquet": ["one", "two"]}


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.csv", "expected python-docs, a .txt file or a .parquet"), ("no.txt", "cannot be read"),
     ("bad.parquet", "cannot be read"), ("column.parquet", "it has no column .text., only other; see"),
     ("numbers.parquet", "holds int64, expected text"), ("empty.txt", "holds no text")],
)  # fmt: skip
def test_wrong_files_are_explained(tmp_path, name, message):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "empty.txt").write_text("  \n")
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(ConfigError, match=message):
        read_documents(CalibrationConfig(source=str(tmp_path / name)))
