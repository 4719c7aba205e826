"""How a run says what differs between it and the run that its directory holds."""

import dataclasses

import pytest

from astro_dist.run_directory.identity import Identity

THERE = Identity(
    key="a",
    source_sha256="1",
    tokens_sha256="2",
    version="0.1",
    arithmetic={"quantization": {"bits": 4}, "calibration": {"samples": 24}},
    texts={"0": {"source": "a.txt", "samples": 24, "holdout_samples": 2}},
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {
                "arithmetic": {"quantization": {"bits": 4}, "calibration": {"samples": 16}},
                "tokens_sha256": "3",
                "texts": {"0": {"source": "a.txt", "samples": 16, "holdout_samples": 3}},
            },
            "calibration.samples: 24 there, 16 here",
        ),
        (
            {"tokens_sha256": "3", "texts": {"0": {"source": "b.txt", "samples": 24, "holdout_samples": 2}}},
            "calibration.source: a.txt there, b.txt here",
        ),
        (
            {"texts": {"0": {"source": "a.txt", "samples": 24, "holdout_samples": 2}, "1": {"source": "b.txt"}}},
            "calibration.sources.1.source: None there, b.txt here",
        ),
        ({"tokens_sha256": "3"}, "SHA-256 of the calibration text's tokens: 2 there, 3 here"),
        ({"source_sha256": "3"}, "SHA-256 of the source model's files: 1 there, 3 here"),
    ],
)
def test_a_difference_is_told_in_the_keys_of_the_user_and_once(changes, words):
    assert dataclasses.replace(THERE, **changes).difference(THERE) == words
