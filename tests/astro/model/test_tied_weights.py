"""A head of its own beside `tie_word_embeddings: true` counts, as it does in transformers."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.model.skeleton import Skeleton
from astro.model.tied_weights import untied_weights, without_tying
from astro.storage.checkpoint import INDEX_NAME, Checkpoint
from astro_dist import pipeline
from tests.support.models import LLAMA, write_checkpoint


@pytest.mark.parametrize("tied", [False, True])
def test_perplexity_is_that_of_transformers_and_the_result_says_what_it_is(run_config, tmp_path, tied):
    source = write_checkpoint(tmp_path / "llama", transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    content = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(content))
    perplexity = pipeline.quantize(run_config()).perplexity
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokens = load_file(tmp_path / "run" / "tokens.safetensors")["h0000"]
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert perplexity.original == pytest.approx(math.exp(loss), rel=1e-4)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("row", [None, 0, -1])
def test_tokens_at_the_end_of_the_vocabulary_count_too(tmp_path, row):
    config = transformers.LlamaConfig(**LLAMA | {"vocab_size": 2000}, tie_word_embeddings=True)
    source = write_checkpoint(tmp_path / "llama", config)
    shards = sorted(source.glob("*.safetensors"))
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    head = tensors["model.embed_tokens.weight"].clone()
    if row is not None:
        head[row] += 1
    for path in (*shards, source / INDEX_NAME):
        path.unlink(missing_ok=True)
    save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(source)
    untied = untied_weights(Skeleton(source, torch.float32), checkpoint, checkpoint.entries)
    assert untied == ([] if row is None else ["lm_head.weight"])


def test_configs_within_a_config_tie_nothing_either():
    content = {"text_config": {"tie_word_embeddings": True, "a": 1}, "vision_config": {"b": 2}}
    assert without_tying(content) == {
        "text_config": {"tie_word_embeddings": False, "a": 1}, "vision_config": {"b": 2}, "tie_word_embeddings": False,
    }  # fmt: skip
