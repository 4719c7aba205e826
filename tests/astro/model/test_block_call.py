"""A lone block equals the same block of the whole model, for many architectures."""

import json

import pytest
import torch
import transformers
from torch import nn

from astro.calibration.block_statistics import BlockStatistics, input_stages, inputs_of
from astro.calibration.token_weights import TokenWeights
from astro.config import Experts
from astro.errors import CheckpointError, NumericalError, UnsupportedError
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockCall, BlockState, SharedDict, forward
from astro.model.call_file import differing_tensors, with_tensors
from astro.model.recording import count_outputs, record
from astro.model.skeleton import Skeleton
from astro.storage.checked_tensors import load_part, save_part
from astro.storage.checkpoint import Checkpoint
from tests.support.architectures import DENSE, EXPERTS, IDS, STATEFUL, streamed_logits
from tests.support.dequantized import keys_of
from tests.support.models import naive_hessian, write_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", {**DENSE, **EXPERTS, **STATEFUL})
def test_streamed_logits_equal_the_whole_models(name, tmp_path):
    folder = write_checkpoint(tmp_path / name, {**DENSE, **EXPERTS, **STATEFUL}[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(streamed_logits(folder, IDS, tmp_path), expected)


def opened(folder, index=0):
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    keys = keys_of(skeleton, checkpoint, index)
    return checkpoint, skeleton, keys, skeleton.linear_layers(index, keys)[0]


def short(groups):
    return [[name.rsplit(".", 1)[1] for operand in group for name in operand.names] for group in groups]


def test_layers_with_one_input_are_found(llama):
    checkpoint, skeleton, _, linears = opened(llama)
    skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), CPU)
    hidden, calls = record(skeleton, IDS, count_outputs(skeleton, IDS[:1]))
    layers = BlockLayers(skeleton.model, linears)
    statistics = BlockStatistics(layers, CPU, TokenWeights("none"))
    seen = {}
    module = skeleton.model.get_submodule("model.layers.0.mlp.down_proj")
    handle = module.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with torch.no_grad():
        for _ in range(2):
            statistics.run(lambda: forward(skeleton.blocks[0], BlockState(hidden), calls[0]), "c0000")
    handle.remove()
    expected = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert short(statistics.input_groups) == expected
    with torch.no_grad():
        stages = input_stages(layers, lambda: forward(skeleton.blocks[0], BlockState(hidden), calls[0]))
        assert [len(stage) for stage in stages] == [1, 1, 1, 1]
        assert [stage[0] for stage in stages] == statistics.input_groups
        (down,) = stages[-1][0]
        inputs = inputs_of(layers, [down], lambda: forward(skeleton.blocks[0], BlockState(hidden), calls[0]))
    assert torch.equal(inputs[down].X, seen["x"])
    *_, last = statistics.finish_(Experts(), [])
    X = seen["x"].reshape(-1, 128)
    assert (last.num_tokens, last.routed_tokens, last.fallback) == (80, 80, "")
    torch.testing.assert_close(last.H.double(), naive_hessian(X, repeats=2), rtol=1e-4, atol=1e-6)


def test_layer_that_no_token_reached_is_an_error(llama):
    checkpoint, skeleton, keys, linears = opened(llama)
    skeleton.load(skeleton.blocks[0], checkpoint.read(keys), CPU)
    layers = BlockLayers(skeleton.model, linears[:1])
    with pytest.raises(NumericalError, match="q_proj: no calibration token reached"):
        list(BlockStatistics(layers, CPU, TokenWeights("none")).finish_(Experts(), []))
    with pytest.raises(NumericalError, match="q_proj: reached by some calibration chunks, not by all"):
        inputs_of(layers, layers.operands, lambda: IDS)
    with pytest.raises(NumericalError, match="q_proj: no calibration token reached"):
        input_stages(layers, lambda: IDS)


def test_block_without_its_tensor_is_an_error(llama):
    _, skeleton, keys, _ = opened(llama)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.0\.self_attn\.q_proj\.weight"):
        skeleton.linear_layers(0, [key for key in keys if "q_proj" not in key])


def test_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedError, match="no causal language model for model_type 'nonesuch'"):
        Skeleton(tmp_path, torch.float32)


def test_code_of_a_checkpoint_does_not_run_unless_asked(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "evil.C"}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match="trust_remote_code: true"):
        Skeleton(tmp_path, torch.float32)


def test_code_of_a_checkpoint_is_not_offered_at_the_terminal(tmp_path, monkeypatch):
    content = {"model_type": "clip_text_model", "auto_map": {"AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UnsupportedError, match="trust_remote_code: true"):
        Skeleton(tmp_path, torch.float32)


@pytest.mark.parametrize("key", ["full", 3, "3", "a/0"])
@pytest.mark.parametrize("length", [None, 1, 12])
def test_shared_dictionary_comes_out_of_a_file_as_it_went_in(tmp_path, key, length):
    tensors = [torch.full((2,), float(i)) for i in range(length or 1)]
    value = tensors[0] if length is None else tuple(tensors)
    seen = []

    class Writer(nn.Module):
        def forward(self, hidden, shared):
            seen.append(dict(shared))
            shared[key] = value
            return hidden

    call = BlockCall((SharedDict(0, {}),), {}, 0, ("dict.0",))
    state = forward(Writer(), BlockState(torch.zeros(1, 2, 4)), call)
    save_part(tmp_path / "state", {"hidden": state.hidden, **state.others})
    others, _ = load_part(tmp_path / "state")
    forward(Writer(), BlockState(others.pop("hidden"), others), BlockCall(call.args, {}, 1))
    assert seen[0] == {}
    assert list(seen[1]) == [key]
    assert type(seen[1][key]) is type(value)
    assert torch.equal(torch.stack(list(seen[1][key])), torch.stack(list(value)))


def test_entries_whose_keys_look_alike_are_told_apart():
    first, second = (BlockCall(({1: torch.full((2,), n), "1": torch.ones(2)},), {}) for n in (0.0, 5.0))
    (entries,) = with_tensors(first, differing_tensors(second, first)).args
    assert [entries[1].tolist(), entries["1"].tolist()] == [[5, 5], [1, 1]]
