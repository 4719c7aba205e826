"""Text files: a large one is sampled while it is read, and nothing is lost or doubled where it is cut."""

import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from astro.errors import ConfigError
from astro_dist.source.sampling import cut_text
from astro_dist.source.text_files import read_file


def numbered(count):
    return " ".join(f"w{number:06d}" for number in range(count))


def test_small_files_are_read_whole(tmp_path):
    text = numbered(5000)
    (tmp_path / "a.txt").write_text(text)
    assert read_file(tmp_path / "a.txt", "text", len(text), 0).rows == [text]


@pytest.mark.parametrize("separator", [" ", "\n", "\r\n"])
def test_pieces_of_a_large_text_hold_whole_words_once(tmp_path, separator):
    words = numbered(40_000).split()
    (tmp_path / "a.txt").write_bytes(separator.join(words).encode())
    pieces = read_file(tmp_path / "a.txt", "text", 100_000, 0).rows
    found = [word for piece in pieces for word in piece.split()]
    assert "\r" not in "".join(pieces)
    assert set(found) <= set(words)
    assert found == sorted(set(found))
    assert 90_000 < sum(map(len, pieces)) < 110_000
    assert words.index(found[0]) < 4_000
    assert words.index(found[-1]) > 36_000


def test_a_sample_of_everything_is_the_text(tmp_path):
    text = numbered(1000)
    (tmp_path / "a.txt").write_text(text)
    assert "".join(read_file(tmp_path / "a.txt", "text", len(text) - 1, 0).rows) == text


def test_text_without_spaces_is_cut_between_characters(tmp_path):
    text = "漢字é𝄞" * 20_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = read_file(tmp_path / "a.txt", "text", 20_000, 1).rows
    assert len(pieces) == 64
    assert all(piece in text for piece in pieces)


def test_the_seed_chooses(tmp_path):
    (tmp_path / "a.txt").write_text(numbered(40_000))
    first, again, other = (read_file(tmp_path / "a.txt", "text", 50_000, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_memory_does_not_grow_with_the_file(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(8_000_000_000)  # a hole: it takes no room on the disk
    tracemalloc.start()
    pieces = read_file(tmp_path / "a.txt", "text", 100_000, 0).rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, pieces)) < 130_000
    assert peak < 5_000_000


def test_a_large_column_is_sampled_from_all_over_it(tmp_path):
    texts = [f"{number:05d} " + "x" * 200 for number in range(20_000)]
    pq.write_table(pa.table({"text": texts, "other": texts}), tmp_path / "a.parquet", use_dictionary=False)
    read = read_file(tmp_path / "a.parquet", "text", 200_000, 0).rows
    numbers = [int(text[:5]) for text in read]
    assert 300_000 < sum(map(len, read)) < 500_000
    assert numbers == sorted(set(numbers))
    assert numbers[0] < 500
    assert numbers[-1] > 19_500


def test_a_column_of_one_giant_text_is_sampled(tmp_path):
    pq.write_table(pa.table({"text": [numbered(100_000)]}), tmp_path / "a.parquet", use_dictionary=False)
    read = read_file(tmp_path / "a.parquet", "text", 50_000, 0).rows
    assert len(read) > 50
    assert 60_000 < sum(map(len, read)) < 140_000


@pytest.mark.parametrize("text", ["", "a", "ab cd\nef  gh\n\nij" * 50, "x" * 100, "\n" * 100, " " * 100])
def test_cut_pieces_are_the_text(text):
    pieces = list(cut_text(text, 16))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 16 for piece in pieces) or text == ""


def test_lines_stay_whole_where_they_fit():
    assert list(cut_text("one two\nthree\nfour five", 16)) == ["one two\n", "three\nfour five"]


def test_text_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("ä".encode("latin-1") * 300_000)
    with pytest.raises(ConfigError, match="a.txt: cannot be read: .utf-8. codec"):
        read_file(tmp_path / "a.txt", "text", 10_000, 0)
