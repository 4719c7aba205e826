"""Text to chunks: fixed by the text, the tokenizer and the settings."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import processors

from astro.errors import CheckpointError, ConfigError
from astro_dist.config.schema import CalibrationConfig
from astro_dist.schedule.names import is_held_out
from astro_dist.source import calibration_text, long_wait
from astro_dist.source.documents import CalibrationText, Document
from tests.support.models import byte_tokenizer

DOCUMENTS = [f"document {i:02d} " * 20 for i in range(8)]


def settings(**changes):
    return CalibrationConfig(
        **{"samples": 10, "sequence_length": 32, "chunk_samples": 4, "holdout_samples": 5, **changes}
    )


def tokenized(documents, tokenizer, config):
    """The chunks of plain texts."""
    text = CalibrationText(config.texts[0], tuple(map(Document, documents)))
    return calibration_text.tokenize([text], tokenizer, config)


def texts_of(config, tokenizer=None):
    """The texts of all documents that a configuration names."""
    return [document.text for text in calibration_text.read_texts(config, tokenizer) for document in text.documents]


def test_chunks_have_fixed_sizes_and_names():
    found = tokenized(DOCUMENTS, byte_tokenizer(), settings())
    assert [(chunk.name, chunk.tokens.shape) for chunk in found.chunks] == [
        ("c0000", (4, 32)), ("c0001", (4, 32)), ("c0002", (2, 32)), ("h0000", (4, 32)), ("h0001", (1, 32)),
    ]  # fmt: skip


def test_every_fourth_document_is_held_out():
    tokenizer = byte_tokenizer()
    found = tokenized(DOCUMENTS, tokenizer, settings(samples=40, holdout_samples=15))
    texts = {True: "", False: ""}
    for chunk in found.chunks:
        texts[is_held_out(chunk.name)] += "".join(tokenizer.decode(row) for row in chunk.tokens)
    assert [f"document {i:02d}" in texts[True] for i in range(8)] == [i in (3, 7) for i in range(8)]
    assert [f"document {i:02d}" in texts[False] for i in range(8)] == [i not in (3, 7) for i in range(8)]


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_few_documents_are_split_at_three_quarters(documents):
    found = tokenized(["a" * 900 + "b" * 300] * documents, byte_tokenizer(), settings())
    calibration, holdout = (
        {t for c in found.chunks if is_held_out(c.name) is h for t in c.tokens.ravel()} for h in (False, True)
    )
    assert len(calibration) == len(holdout) == 1
    assert calibration != holdout


def test_a_large_file_is_enough_for_a_few_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20_000)
    few = settings(source=str(tmp_path / "a.txt"), samples=1, holdout_samples=1, sequence_length=16)
    found = tokenized(texts_of(few), byte_tokenizer(), few)
    assert [chunk.tokens.shape for chunk in found.chunks] == [(1, 16), (1, 16)]


ROWS = [f"row {i} of many: " + "abc def " * (i % 7) for i in range(400)]


@pytest.mark.parametrize(
    ("name", "seed", "prefix", "digest"),
    [
        ("a.parquet", 0, False, "e5525da5f7766f3e2d5370d68ea08e81af00c0d2456605687b16b1d3965de5aa"),
        ("a.jsonl", 0, False, "e5525da5f7766f3e2d5370d68ea08e81af00c0d2456605687b16b1d3965de5aa"),
        ("a.txt", 3, False, "d04b1dd2bb52f41bdc1478fa44be0ae6d90b727ef6f47a8a928ce2a8195df6e7"),
        ("a.parquet", 0, True, "e1a9511344e7fb88b6aade3dcfa4959039d58334508c9d191c33d68dacf4ec57"),
    ],
)
def test_tokens_of_a_text_never_change(tmp_path, name, seed, prefix, digest):
    pq.write_table(pa.table({"text": ROWS}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(ROWS) * 3)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 1, "text": row}) + "\n" for row in ROWS))
    config, tokenizer = (
        settings(source=str(tmp_path / name), seed=seed),
        glm_tokenizer() if prefix else byte_tokenizer(),
    )
    assert tokenized(texts_of(config), tokenizer, config).sha256 == digest


def test_seed_chooses_and_repeats():
    hashes = [tokenized(DOCUMENTS, byte_tokenizer(), settings(seed=seed)).sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_bos_begins_each_sequence_where_the_tokenizer_puts_one():
    tokenizer = byte_tokenizer()

    def with_bos(text, add_special_tokens=True, **options):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [256, *ids] if add_special_tokens else ids}

    with_bos.bos_token_id = 256
    found = tokenized(DOCUMENTS, with_bos, settings())
    assert all((chunk.tokens[:, 0] == 256).all() and (chunk.tokens[:, 1:] != 256).all() for chunk in found.chunks)


def glm_tokenizer(sequence="[gMASK] <sop> $A"):
    """A tokenizer that begins every text with two tokens and has no BOS."""
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens(["[gMASK]", "<sop>"])
    tokens = [(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=sequence, special_tokens=tokens)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("sequence", "prefix"), [("[gMASK] <sop> $A", [258, 259]), ("<sop> $A [gMASK]", [259]), ("$A <sop>", [])]
)
def test_sequences_begin_with_all_that_the_tokenizer_puts_in_front(sequence, prefix):
    for chunk in tokenized(DOCUMENTS, glm_tokenizer(sequence), settings()).chunks:
        assert (chunk.tokens[:, : len(prefix)] == prefix).all()
        assert (chunk.tokens[:, len(prefix) :] < 256).all()


def test_a_tokenizer_that_hides_its_prefix_is_refused():
    def changing(text, add_special_tokens=True, **options):
        return {"input_ids": [7, 8] if add_special_tokens else [5]}

    with pytest.raises(CheckpointError, match=r"makes \[5\] of the text 'a' alone, and \[7, 8\] with"):
        tokenized(DOCUMENTS, changing, settings())


def test_a_prefix_that_leaves_no_room_is_refused():
    with pytest.raises(ConfigError, match="sequence_length: 8 tokens have no room for text"):
        tokenized(DOCUMENTS, glm_tokenizer(" ".join(["<sop>"] * 8) + " $A"), settings(sequence_length=8))


def test_no_holdout_is_allowed():
    found = tokenized(DOCUMENTS, byte_tokenizer(), settings(holdout_samples=0))
    assert [chunk.name for chunk in found.chunks] == ["c0000", "c0001", "c0002"]


def test_large_text_is_sampled_before_it_is_tokenized():
    seen = []
    tokenizer = byte_tokenizer()

    def counting(text, **options):
        seen.append(text)
        return tokenizer(text, **options)

    counting.bos_token_id = None
    found = tokenized(DOCUMENTS * 100, counting, settings(samples=2, holdout_samples=1))
    assert 2 * 32 * 64 <= sum(len(text) for text in seen if len(text) > 1) < 4 * 32 * 64
    assert [chunk.tokens.shape for chunk in found.chunks] == [(2, 32), (1, 32)]


def test_a_giant_document_is_tokenized_in_pieces():
    lengths, tokenizer = [], byte_tokenizer()

    def measuring(text, **options):
        lengths.append(len(text))
        return tokenizer(text, **options)

    text = "a line of some words\n" * 40_000
    found = tokenized([text], measuring, settings(samples=16_000, holdout_samples=6_000))
    assert max(lengths) <= 1 << 18
    assert sum(length for length in lengths if length > 1) == len(text)
    assert sum(len(chunk.tokens) for chunk in found.chunks) == 22_000


def test_what_takes_long_says_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(long_wait, "_EVERY_S", 0.0)
    caplog.set_level("INFO", "astro_dist")
    tokenized(["word " * 100_000], byte_tokenizer(), settings())
    assert "calibration text: tokenized 0.1 of 0.4 million characters" in caplog.messages


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(ConfigError, match=r"calibration.samples: 1000 sequences of 32 tokens .* gives 45"):
        tokenized(DOCUMENTS, byte_tokenizer(), settings(samples=1000))


def test_python_docs_need_no_download():
    documents = texts_of(CalibrationConfig(source="python-docs"))
    assert sum(map(len, documents)) > 300_000


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    pq.write_table(pa.table({"text": ["one", "", None, "two"]}), tmp_path / "a.parquet")
    read = {name: texts_of(CalibrationConfig(source=str(tmp_path / name))) for name in ("a.txt", "a.parquet")}
    assert read == {"a.txt": ["some text"], "a.parquet": ["one", "two"]}


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.csv", r"a.csv: expected python-docs, a file \(\*.txt, \*.parquet, .*\), or a dataset"),
     ("no.txt", "cannot be read"), ("bad.parquet", "cannot be read"),
     ("column.parquet", "no column text or messages or conversations, only other; see `column`"),
     ("numbers.parquet", "holds int64, expected text"), ("empty.txt", "holds no text")],
)  # fmt: skip
def test_wrong_files_are_explained(tmp_path, name, message):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "empty.txt").write_text("  \n")
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(ConfigError, match=message):
        texts_of(CalibrationConfig(source=str(tmp_path / name)))


def test_documents_are_packed_without_a_gap():
    documents = ["a" * 5, "b" * 100, "c", "", "d" * 50]
    config = settings(samples=4, holdout_samples=0, chunk_samples=4)
    (chunk,) = tokenized(documents, byte_tokenizer(), config).chunks
    assert byte_tokenizer().decode(chunk.tokens.ravel()) == ("a" * 5 + "b" * 100 + "c" + "d" * 50)[: 4 * 32]


def test_empty_rows_are_left_out_and_do_not_count_as_documents(tmp_path):
    rows = ["one", "", None, " \n", "two", "three", "four"]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    lines = [json.dumps({"text": row}) for row in rows] + ['{"id": 3}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name in ("a.parquet", "a.jsonl"):
        assert texts_of(CalibrationConfig(source=str(tmp_path / name))) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_a_table_of_one_giant_document_is_sampled_and_held_out(tmp_path, name):
    text = " ".join(f"w{number:06d}" for number in range(100_000))
    line = json.dumps({"text": text}) + "\n"
    if name.endswith(".gz"):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(line)
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [text]}), tmp_path / name, use_dictionary=False)
    else:
        (tmp_path / name).write_text(line)
    config = settings(source=str(tmp_path / name), samples=8, holdout_samples=4)
    read = texts_of(config)
    assert len(read) > 50
    assert 100_000 < sum(map(len, read)) < 200_000
    assert all(piece in text for piece in read)
    parts = {
        held_out: "".join(
            byte_tokenizer().decode(row)
            for chunk in tokenized(read, byte_tokenizer(), config).chunks
            if is_held_out(chunk.name) is held_out
            for row in chunk.tokens
        )
        for held_out in (False, True)
    }
    words = {held_out: set(re.findall(r"w\d{6}", part)) for held_out, part in parts.items()}
    assert words[True]
    assert not words[True] & words[False]


def test_a_large_file_of_lines_is_sampled_from_all_over_it(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"other": "y" * 300, "text": f"{number:05d} " + "x" * 50}) + "\n")
    config = settings(source=str(tmp_path / "a.jsonl"), samples=8, holdout_samples=4)
    numbers = [int(text[:5]) for text in texts_of(config)]
    assert 1_500 < len(numbers) < 4_000
    assert numbers == sorted(set(numbers))
    assert numbers[0] < 500
    assert numbers[-1] > 19_500
    assert texts_of(config) == texts_of(config) != texts_of(config.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [('{"text": "a"}\n{"text": 3}\n', "auto", "line 2: column 'text' holds 3, expected text or a list of messages"),
     ('{"text": "a"}\n{"text"\n', "auto", "line 2 is no JSON .*; expected one object on each line"),
     ('[{"text": "a"}]\n', "auto", "line 1 holds .*, expected one JSON object on each line"),
     ('{"text": "a"}\n', "prompt", "no column prompt, only text; see `column`"),
     ('{"id": 1, "prompt": "a"}\n', "auto", "no column text or messages or conversations, only id, prompt"),
     ("\n", "auto", "holds no text")],
)  # fmt: skip
def test_wrong_lines_are_explained(tmp_path, content, column, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"a.jsonl: .*{message}"):
        texts_of(CalibrationConfig(source=str(tmp_path / "a.jsonl"), column=column))


@pytest.mark.parametrize("key", ["subset", "split", "revision"])
def test_keys_of_datasets_are_refused_for_files(tmp_path, key):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=f"calibration.{key}: only a dataset on the Hub has one, .*a.txt is none"):
        texts_of(CalibrationConfig(source=str(tmp_path / "a.txt"), **{key: "x"}))
