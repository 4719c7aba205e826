"""How much is quantized, in numbers and in words."""

import json

import pytest
import torch

from astro_dist.planning.coverage import MULTI_TOKEN, Coverage
from astro_dist.planning.validate import prepare


def test_all_weights_of_the_blocks_are_counted_once(run_config, llama):
    plan = prepare(run_config()).plan
    coverage = plan.coverage
    assert coverage.quantized + sum(coverage.left.values()) == coverage.in_blocks
    assert coverage.quantized == plan.weights == 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert coverage.left == {"input_layernorm": 3 * 64, "post_attention_layernorm": 3 * 64}
    assert sum(coverage.copied_bytes.values()) == sum(unit.read_bytes for unit in plan.copies)
    assert list(coverage.copied_bytes) == ["embeddings, norm and head"]
    assert coverage.in_words.startswith("quantized 99.7 % of the blocks' weights; left in 16 bits: ")


def test_few_quantized_weights_are_said_loudly(run_config):
    prepared = prepare(run_config(quantization__ignore=["*.mlp.*"]))
    assert prepared.plan.coverage.share < 0.8
    (note,) = [note for note in prepared.notes if "WARNING" in note]
    assert "only 33 % of the blocks' weights are quantized" in note
    assert "mlp.up_proj 22 %" in note
    assert not any("WARNING" in note for note in prepare(run_config()).notes)


@pytest.mark.parametrize(
    ("quantized", "left", "words"),
    [
        (93, {"mlp.gate": 5, "self_attn.indexer.wk": 2}, "quantized 93 % of the blocks' weights; left in 16 bits: "
         "mlp.gate 5 %, self_attn.indexer.wk 2 %"),
        (100, {}, "quantized 100 % of the blocks' weights"),
    ],
)  # fmt: skip
def test_words(quantized, left, words):
    assert Coverage(quantized, 100, left, {}).in_words == words


def test_sizes_of_what_is_copied_are_said():
    coverage = Coverage(9, 9, {}, {"embeddings, norm and head": 2_000_000_000, MULTI_TOKEN: 11_500_000_000})
    assert coverage.copied_in_words == "copied as they are: embeddings, norm and head 2.0 GB, " + (
        "multi-token prediction 11.5 GB"
    )
    (note,) = coverage.notes()
    assert "multi-token prediction, 11.5 GB, are carried over in 16 bits" in note


def test_json_is_read_back():
    coverage = Coverage(93, 100, {"mlp.gate": 7}, {MULTI_TOKEN: 12})
    assert Coverage.from_json(json.loads(json.dumps(coverage.to_json()))) == coverage
    assert torch.tensor(coverage.share).isclose(torch.tensor(0.93))
