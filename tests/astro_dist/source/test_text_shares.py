"""Several texts, each with its share, and texts that are short."""

import pytest

from astro.errors import ConfigError
from astro_dist.config.schema import CalibrationConfig
from astro_dist.schedule.names import is_held_out
from astro_dist.source.calibration_text import tokenize
from astro_dist.source.documents import CalibrationText, Document
from astro_dist.source.text_shares import apportion
from tests.support.models import byte_tokenizer

LENGTH = 32


def mixture(shares, sequences, **keys):
    """Chunks of texts that have their own letter each and room for so many sequences to calibrate on."""
    sources = [{"source": f"{chr(97 + i)}.txt", "share": share} for i, share in enumerate(shares)]
    config = CalibrationConfig(sources=sources, sequence_length=LENGTH, chunk_samples=4, **keys)
    texts = [
        CalibrationText(source, (Document(chr(97 + i) * -(-LENGTH * count // 3)),) * 4)
        for i, (source, count) in enumerate(zip(config.texts, sequences, strict=True))
    ]
    return tokenize(texts, byte_tokenizer(), config)


def sequences_of(chunks, letter, held_out):
    rows = [row for chunk in chunks.chunks if is_held_out(chunk.name) is held_out for row in chunk.tokens]
    token = byte_tokenizer()(letter)["input_ids"][0]
    return sum(bool((row == token).all()) for row in rows)


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [(10, [0.7, 0.3], [7, 3]), (128, [1.0], [128]), (10, [0.33, 0.33, 0.33], [4, 3, 3]), (3, [0.9, 0.1], [3, 0]),
     (1, [0.5, 0.5], [1, 0]), (0, [0.5, 0.5], [0, 0]), (16, [0.55, 0.25, 0.2], [9, 4, 3])],
)  # fmt: skip
def test_counts_are_within_one_sequence_of_their_shares(count, shares, expected):
    assert apportion(count, shares) == expected
    assert sum(expected) == count


def test_texts_are_mixed_by_their_shares_and_recorded():
    chunks = mixture([0.7, 0.3], [60, 60], samples=20, holdout_samples=10)
    for held_out, expected in ((False, (14, 6)), (True, (7, 3))):
        assert tuple(sequences_of(chunks, letter, held_out) for letter in "ab") == expected
    assert [(share.samples, share.holdout_samples) for share in chunks.shares] == [(14, 7), (6, 3)]
    assert len({tuple(sorted({int(row[0]) for row in chunk.tokens})) for chunk in chunks.chunks[:4]}) < 4


def test_the_seed_decides_the_mixture():
    hashes = [mixture([0.5, 0.5], [60, 60], samples=20, holdout_samples=10, seed=s).sha256 for s in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_text_that_runs_short_is_named():
    with pytest.raises(
        ConfigError, match=r"calibration.samples: 20 sequences .*, 10 of them from b.txt, .* gives 8 \("
    ):
        mixture([0.5, 0.5], [60, 8], samples=20, holdout_samples=2)


def test_where_a_text_is_short_all_give_less_so_that_shares_hold():
    chunks = mixture([0.75, 0.25], [60, 6], holdout_samples=4)
    assert [(share.samples, share.holdout_samples) for share in chunks.shares] == [(20, 3), (6, 1)]
    assert (
        "calibration.samples: 26 sequences of 32 tokens instead of 128, because the text has no more" in chunks.notes[0]
    )
    settled = chunks.settled(CalibrationConfig())
    assert (settled.samples, settled.holdout_samples) == (26, 4)


def test_a_short_text_is_taken_whole_where_nobody_said_how_much():
    chunks = mixture([1.0], [60])
    assert [(share.samples, share.holdout_samples) for share in chunks.shares] == [(60, 16)]
    assert [note.partition(":")[0] for note in chunks.notes] == ["calibration.samples"]
    chunks = mixture([1.0], [30])
    assert [(share.samples, share.holdout_samples) for share in chunks.shares] == [(30, 10)]
    assert [note.partition(":")[0] for note in chunks.notes] == ["calibration.samples", "calibration.holdout_samples"]


def test_enough_text_gives_the_defaults_without_a_word():
    chunks = mixture([1.0], [200])
    assert [(share.samples, share.holdout_samples) for share in chunks.shares] == [(128, 16)]
    assert chunks.notes == ()
    assert chunks.sha256 == mixture([1.0], [200], samples=128, holdout_samples=16).sha256


def test_hardly_any_text_is_refused_unless_it_was_meant():
    with pytest.raises(ConfigError, match=r"gives 6 sequences .* fewer than 8 .* only if you set calibration.samples"):
        mixture([1.0], [6])
    assert mixture([1.0], [6], samples=6).shares[0].samples == 6
