"""What a server would cache is seen behind the rotary embedding, and rounded there."""

import pytest
import torch
import transformers

from astro.model.cache_scales import CacheScales, LargestByModule, LargestCached
from astro.model.kv_cache import cache_refusal, rounded_cache, watched_cache
from tests.support.architectures import DENSE, EXPERTS, STATEFUL
from tests.support.models import LLAMA

IDS = torch.arange(1, 33)[None]


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA)
    config._attn_implementation = request.param
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_largest_magnitudes_are_those_of_transformers_own_cache(model):
    largest, names = LargestByModule(), {module: name for name, module in model.named_modules()}
    with watched_cache(lambda module, seen: largest.add_(names[module], seen)):
        cache = model(IDS, use_cache=True).past_key_values
        model(IDS[:, :16], use_cache=False)
    for index, cached in enumerate(cache.layers):
        name = f"model.layers.{index}.self_attn"
        expected = [float(tensor.abs().amax()) for tensor in (cached.keys, cached.values)]
        assert largest.to_json()[name] == pytest.approx(expected)
        assert largest.scales[name].key == pytest.approx(expected[0] / 448)


@torch.no_grad()
def test_rounding_is_that_of_a_cache_of_eight_bits(model):
    attention = model.model.layers[1].self_attn
    exact = model(IDS).logits
    largest = {}
    with watched_cache(largest.__setitem__):
        model(IDS)
    scales = {attention: largest[attention].scales}
    seen = {}

    def attend(module, query, key, value, *args, **kwargs):
        seen[module] = (key, value)
        return original(module, query, key, value, *args, **kwargs)

    with rounded_cache(scales):
        rounded = model(IDS).logits
        original = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get("sdpa")
        if model.config._attn_implementation == "sdpa":
            transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
            model(IDS)
            del transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
            for tensor, scale in zip(seen[attention], (scales[attention].key, scales[attention].value), strict=True):
                assert torch.equal((tensor / scale).to(torch.float8_e4m3fn).float() * scale, tensor)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(model(IDS).logits, exact)


def test_largest_magnitudes_of_several_texts_are_joined():
    assert LargestCached(1.0, 4.0) | LargestCached(2.0, 3.0) == LargestCached(2.0, 4.0)
    assert LargestCached(448.0, 0.0).scales.key == 1.0
    assert LargestCached(0.0, 0.0).scales.value > 0


def test_modules_without_a_scale_are_left_alone(model):
    with torch.no_grad(), rounded_cache({torch.nn.Identity(): CacheScales(1.0, 1.0)}):
        rounded = model(IDS).logits
    assert torch.equal(rounded, model(IDS).logits.detach())


CONFIGS = {**DENSE, **EXPERTS, **STATEFUL}
LATENT, SHARED, UNSEEN = (
    "latent attention",
    "take the keys and values of others",
    "not handed to the attention functions",
)
REFUSED = {
    "falcon": UNSEEN, "bloom": UNSEEN, "deepseek-v3": LATENT, "glm5": LATENT, "hy-v4": LATENT, "longcat-flash": LATENT,
    "deepseek-v4": LATENT, "gemma4-e": SHARED,
}  # fmt: skip
HYBRID = {"qwen3-next": [0, 1], "bamba": [0, 1]}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_every_attention_is_seen_or_the_model_is_refused(name):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    refusal = cache_refusal(model, blocks)
    if name in REFUSED:
        assert REFUSED[name] in refusal
        return
    assert refusal is None
    largest = {}
    with watched_cache(largest.__setitem__):
        model(IDS)
    seen = [sum(module in largest for module in block.modules()) for block in blocks]
    assert seen == HYBRID.get(name, [1] * len(blocks))
