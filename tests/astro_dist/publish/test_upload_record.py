"""What is noted on disk of uploads: it reads as it was written, in the form that version 0.5.0 wrote."""

import json

import pytest

from astro_dist.publish.upload_record import PlaceUploads, UploadRecord, read_uploads
from astro_dist.run_directory.published_model import PublishedModel
from astro_dist.run_directory.unit_record import FileRecord

FILE, OTHER = FileRecord("config.json", 12, "ab" * 32), FileRecord("model-1.safetensors", 34, "cd" * 32)
PUBLISHED = PublishedModel(
    repository="org/model", revision="main", commit="ef" * 20, num_files=2, size_bytes=46, seconds=1.5, url="http://x"
)
WRITTEN = {
    "org/model@main": {
        "files": {
            "config.json": {"size_bytes": 12, "sha256": "ab" * 32},
            "model-1.safetensors": {"size_bytes": 34, "sha256": "cd" * 32},
        },
        "committed": {
            "repository": "org/model", "revision": "main", "commit": "ef" * 20, "files": 2, "bytes": 46,
            "seconds": 1.5, "url": "http://x",
        },
    },
    "me/other@w4": {"files": {"config.json": {"size_bytes": 12, "sha256": "ab" * 32}}, "committed": None},
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "uploads.json"


def test_record_is_written_as_it_always_was(path):
    UploadRecord(path, "org/model@main").commit([FILE, OTHER], PUBLISHED)
    UploadRecord(path, "me/other@w4").add(FILE)
    assert json.loads(path.read_text()) == WRITTEN


def test_record_reads_as_it_was_written(path):
    path.write_text(json.dumps(WRITTEN))
    assert read_uploads(path) == {
        "org/model@main": PlaceUploads({FILE.name: FILE, OTHER.name: OTHER}, PUBLISHED),
        "me/other@w4": PlaceUploads({FILE.name: FILE}, None),
    }


def test_files_that_are_forgotten_or_differ_are_not_there(path):
    record = UploadRecord(path, "org/model@main")
    for file in (FILE, OTHER):
        record.add(file)
    record.forget([FILE])
    assert not record.holds(FILE)
    assert record.holds(OTHER)
    assert not record.holds(FileRecord(OTHER.name, OTHER.size_bytes, "00" * 32))


@pytest.mark.parametrize("content", ["{", "[]", '{"org/model@main": {}}', '{"org/model@main": {"files": []}}'])
def test_record_that_is_damaged_counts_as_empty(path, content):
    path.write_text(content)
    assert read_uploads(path) == {}


def test_a_damaged_place_takes_no_other_with_it(path):
    path.write_text(json.dumps({"me/broken@main": {"files": {}, "committed": {"repository": "x"}}, **WRITTEN}))
    UploadRecord(path, "me/third@main").add(OTHER)
    assert set(read_uploads(path)) == {*WRITTEN, "me/third@main"}
