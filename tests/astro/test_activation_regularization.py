"""The kurtosis of outputs against float64, and the hooks that round inputs and collect it on real models."""

import copy

import pytest
import torch
import transformers

from astro.activation_regularization import ActivationRegularizer, kurtosis_sum
from astro.errors import ConfigError, NumericalError
from astro.linalg import compiled
from astro.model.clipped_rounding import round_clipped
from astro.model.clips_file import CLIPS_FILE, read_clips
from astro.storage.byte_store import FolderStore
from astro.training_config import ActivationRegularization
from tests.support.architectures import DENSE, EXPERTS, IDS
from tests.support.finite_differences import differences

CPU = torch.device("cpu")


def model_of(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), experts_implementation="eager")


def inputs(*shape, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


def naive_kurtosis(y):
    mean, deviation = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False).sqrt()
    return ((y - mean) / (deviation + 1e-8)).pow(4).mean(-1).sum()


def test_kurtosis_and_its_gradient_against_finite_differences():
    y = (inputs(2, 3, 7) * torch.tensor([1, 1, 20, 1, 0.1, 1, 1])).requires_grad_()
    kurtosis_sum(y).backward()
    torch.testing.assert_close(kurtosis_sum(y), naive_kurtosis(y))
    expected = differences(lambda moved: naive_kurtosis(moved), y.detach())
    torch.testing.assert_close(y.grad, expected, atol=1e-7, rtol=1e-6)


def test_kurtosis_of_normal_tokens_is_three_and_of_equal_features_nothing():
    assert kurtosis_sum(inputs(10, 5000)).item() / 10 == pytest.approx(3, abs=0.1)
    y = torch.ones(2, 6, requires_grad=True)
    kurtosis_sum(y).backward()
    assert y.grad.tolist() == torch.zeros(2, 6).tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_regularization_is_the_plain_one(shape, dtype):
    """Its value, and the gradients of inputs, outputs and clips."""
    torch._dynamo.reset()
    results = []
    for loops in ("plain", "compiled"):
        x, y = (inputs(*shape, scale=2.0).to(dtype).requires_grad_() for _ in range(2))
        clips = torch.tensor([-3.0, 2.5], requires_grad=True)
        graphs = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
        with compiled.using(loops):
            rounded = round_clipped(x, clips, 4)
            loss = rounded.float().square().sum() + kurtosis_sum(y)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        loss.backward()  # where nothing was chosen, as in autograd's own threads
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert (graphs[0] < graphs[1] < graphs[2]) == (loops == "compiled")
        results.append((rounded.detach(), x.grad, y.grad, clips.grad))
    torch.testing.assert_close(*results, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32(dtype):
    y = (inputs(4, 64) + 30).to(dtype)
    torch.testing.assert_close(kurtosis_sum(y), naive_kurtosis(y.float()))


def test_the_whole_loss_has_the_gradients_of_plain_autograd():
    model = model_of(DENSE["llama"]).double()
    reference = copy.deepcopy(model)
    regularizer = ActivationRegularizer(model, ActivationRegularization(clip=0.5, kurtosis=1e-3), CPU)
    regularizer.clips.data = regularizer.clips.data.double()
    clips = regularizer.clips.detach().clone().requires_grad_()
    sums = []

    def before(index):
        def hook(_, args):
            low, high = clips[index]
            x = args[0]
            clamped = torch.minimum(torch.maximum(x, low), high)
            v = (clamped - low) * 15 / (high - low)
            return (v + (v.round() - v).detach()) * (high - low) / 15 + low

        return hook

    for index, name in enumerate(regularizer.names):
        layer = reference.get_submodule(name)
        layer.register_forward_pre_hook(before(index))
        layer.register_forward_hook(lambda _, __, y: sums.append(naive_kurtosis(y)))
    loss = model(IDS, labels=IDS).loss + regularizer.penalty(IDS.numel())
    loss.backward()
    expected = reference(IDS, labels=IDS).loss + 1e-3 / IDS.numel() * sum(sums)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(regularizer.clips.grad, clips.grad)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_class_and_names_stay_and_detach_leaves_nothing():
    model = model_of(DENSE["llama"])
    kind, names, before = type(model), list(model.state_dict()), model(IDS).logits
    regularizer = ActivationRegularizer(model, ActivationRegularization(), CPU)
    assert (type(model), list(model.state_dict())) == (kind, names)
    assert not torch.equal(model(IDS).logits, before)
    regularizer.detach()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "falcon", "opt", "gemma2", "olmo2", "phi3"])
def test_residual_writers_of_dense_models(name):
    model = model_of(DENSE[name])
    settings = ActivationRegularization(input_bits=None, outputs="residual")
    regularizer = ActivationRegularizer(model, settings, CPU)
    kinds = {each.split(".", 3)[-1] for each in regularizer.output_names}
    assert (
        kinds
        == {
            "llama": {"self_attn.o_proj", "mlp.down_proj"},
            "gpt2": {"attn.c_proj", "mlp.c_proj"},
            "gpt-neox": {"attention.dense", "mlp.dense_4h_to_h"},
            "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},
            "opt": {"1.self_attn.out_proj", "1.fc2", "0.self_attn.out_proj", "0.fc2"},
            "gemma2": {"self_attn.o_proj", "mlp.down_proj"},
            "olmo2": {"self_attn.o_proj", "mlp.down_proj"},
            "phi3": {"self_attn.o_proj", "mlp.down_proj"},
        }[name]
    )


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "qwen2-moe"])
def test_experts_that_are_one_parameter_are_named_and_gates_left_alone(name):
    regularizer = ActivationRegularizer(model_of(EXPERTS[name]), ActivationRegularization(outputs="residual"), CPU)
    assert not any(each.endswith(("gate", "router")) for each in regularizer.names)
    assert any(each.endswith("mlp.experts.down_proj") for each in regularizer.left_out)
    assert all(each.endswith(("o_proj", "down_proj")) for each in regularizer.output_names)


def test_patterns_choose_layers_and_one_that_matches_none_is_refused():
    model = model_of(DENSE["llama"])
    regularizer = ActivationRegularizer(model, ActivationRegularization(layers=("*.down_proj",)), CPU)
    assert regularizer.names == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    with pytest.raises(
        ConfigError,
        match=r"layers: 'lm_head' matches no linear layer of the blocks, whose names are like model\.layers\.1",
    ):
        ActivationRegularizer(model, ActivationRegularization(layers=("lm_head",)), CPU)
    settings = ActivationRegularization(layers=("*.q_proj",), outputs="residual")
    with pytest.raises(ConfigError, match="none of the chosen layers writes to the residual stream"):
        ActivationRegularizer(model, settings, CPU)


def test_penalty_is_the_mean_over_tokens_and_is_taken_once():
    model = model_of(DENSE["llama"])
    regularizer = ActivationRegularizer(model, ActivationRegularization(input_bits=None, kurtosis=1.0), CPU)
    parts = []
    for row in IDS:
        model(row[None])
        parts.append(regularizer.penalty(len(row)))
    model(IDS)
    torch.testing.assert_close(regularizer.penalty(IDS.numel()), torch.stack(parts).mean())
    assert regularizer.penalty(1) == 0
    with torch.no_grad():
        model(IDS)
    assert regularizer.penalty(1) == 0


def test_clips_have_a_group_without_momentum_and_decay():
    model = model_of(DENSE["llama"])
    regularizer = ActivationRegularizer(model, ActivationRegularization(), CPU)
    group = regularizer.parameter_group()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, group], lr=1e-2, betas=(0.9, 0.999))
    loss = model(IDS, labels=IDS).loss + regularizer.penalty(IDS.numel())
    loss.backward()
    gradient = regularizer.clips.grad.clone()
    optimizer.step()
    assert torch.equal(optimizer.state[regularizer.clips]["exp_avg"], gradient)  # no momentum
    regularizer.clips.grad = -gradient
    optimizer.step()
    assert torch.equal(optimizer.state[regularizer.clips]["exp_avg"], -gradient)
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_clips_survive_a_file(tmp_path):
    regularizer = ActivationRegularizer(model_of(DENSE["llama"]), ActivationRegularization(), CPU)
    regularizer.clips.data = torch.randn(regularizer.clips.shape).sort(dim=1).values
    regularizer.save(tmp_path / CLIPS_FILE)
    read = read_clips(FolderStore(tmp_path), CLIPS_FILE)
    assert read.bits == 4
    assert read.by_layer.keys() == set(regularizer.names)
    assert torch.equal(torch.stack([read.by_layer[name] for name in regularizer.names]), regularizer.clips)


def test_clips_that_have_met_are_refused():
    regularizer = ActivationRegularizer(model_of(DENSE["llama"]), ActivationRegularization(), CPU)
    regularizer.require_open()
    regularizer.clips.data[3] = torch.tensor([1.0, 1.0])
    with pytest.raises(NumericalError, match=r"layers.0.self_attn.o_proj: its learned clips are 1 and 1"):
        regularizer.require_open()


def test_settings_say_what_is_wrong():
    with pytest.raises(ConfigError, match="clip: expected more than 0, got 0"):
        ActivationRegularization(clip=0)
    with pytest.raises(ConfigError, match="kurtosis: expected 0 or more, got -1"):
        ActivationRegularization(kurtosis=-1)
    with pytest.raises(ConfigError, match="input_bits: expected 2 to 8, or null for inputs as they are, got 1"):
        ActivationRegularization(input_bits=1)
    with pytest.raises(ConfigError, match="layers: names no layer"):
        ActivationRegularization(layers=())
    assert ActivationRegularization(input_bits=None, kurtosis=0).is_off
