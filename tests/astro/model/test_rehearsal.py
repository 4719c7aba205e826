"""What a run would stumble over is found before it starts, and without any weights."""

import json
import types

import pytest
import torch
import transformers

from astro.errors import UnsupportedError
from astro.model.rehearsal import rehearse
from astro.model.skeleton import Skeleton
from tests.support.architectures import DENSE, EXPERTS, STATEFUL

CONFIGS = {**DENSE, **EXPERTS, **STATEFUL}


@pytest.fixture
def skeleton_of(tmp_path):
    def build(name):
        CONFIGS[name].save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        content = json.loads(path.read_text())
        architecture = transformers.AutoModelForCausalLM._model_mapping[type(CONFIGS[name])].__name__
        path.write_text(json.dumps({**content, "architectures": [architecture]}))
        return Skeleton(tmp_path, torch.float32)

    return build


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_passes_and_stays_without_weights(skeleton_of, name):
    skeleton = skeleton_of(name)
    before = dict(skeleton.model.named_parameters())
    width = rehearse(skeleton)
    assert width == (256 if name in ("hy-v4", "deepseek-v4") else 64)
    tensors = (*skeleton.model.parameters(), *skeleton.model.buffers())
    assert all(tensor.is_meta for tensor in tensors)
    after = dict(skeleton.model.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())


def broken(skeleton, forward):
    skeleton.model.model.forward = types.MethodType(forward, skeleton.model.model)
    return skeleton


def changes_between(self, input_ids, **kwargs):
    hidden = self.embed_tokens(input_ids)
    for layer in self.layers:
        hidden = layer(hidden) + 1
    return hidden


def counts_outputs(self, input_ids, **kwargs):
    hidden, total = self.embed_tokens(input_ids), 0.0
    for layer in self.layers:
        hidden, extra = layer(hidden)
        total = total + extra
    return hidden


def repeats_a_block(self, input_ids, **kwargs):
    hidden = self.embed_tokens(input_ids)
    for layer in (self.layers[0], *self.layers):
        hidden = layer(hidden)
    return hidden


def has_streams_first(self, input_ids, **kwargs):
    hidden = self.embed_tokens(input_ids).expand(4, 3, *input_ids.shape[1:], 64)
    for layer in self.layers:
        hidden = layer(hidden)
    return hidden


def is_wrong(self, input_ids, **kwargs):
    hidden, _ = self.layers[0](self.embed_tokens(input_ids))
    return hidden


@pytest.mark.parametrize(
    ("forward", "returns", "message"),
    [
        (changes_between, lambda hidden: hidden, "changes the hidden states between block 0 and block 1"),
        (counts_outputs, lambda hidden: (hidden, hidden.sum()), "computes with what its blocks return"),
        (repeats_a_block, lambda hidden: hidden, "calls block 0 where block 1 would follow"),
        (has_streams_first, lambda hidden: hidden, r"has hidden states \[4, 3, 8, 64\] for \[1, 8\] tokens"),
        (
            is_wrong,
            lambda hidden: hidden,
            "LlamaForCausalLM: its blocks cannot be run one by one: ValueError: not enough",
        ),
    ],
)
def test_blocks_that_do_not_simply_follow_each_other_are_refused(skeleton_of, forward, returns, message):
    skeleton = broken(skeleton_of("llama"), forward)
    skeleton.blocks[0].forward = lambda hidden, **_: returns(hidden)
    with pytest.raises(UnsupportedError, match=message):
        rehearse(skeleton)
