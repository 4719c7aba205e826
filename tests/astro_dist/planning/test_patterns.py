"""Every pattern of `quantization.ignore` gets an answer."""

import pytest
import transformers

from astro.errors import ConfigError
from astro_dist.planning.validate import prepare
from tests.support.models import LLAMA, write_checkpoint


def test_what_is_never_quantized_may_be_named_and_a_note_says_so(run_config):
    prepared = prepare(run_config(quantization__ignore=["lm_head", "*.embed_tokens", "*.down_proj"]))
    assert "quantization.ignore: lm_head, *.embed_tokens: needless, that is never quantized" in prepared.notes
    assert prepare(run_config(quantization__ignore=["*.down_proj"])).plan.needless_ignore == ()


@pytest.mark.parametrize("pattern", ["*.mlp.gate", "model.layers.0.mlp.gate"])
def test_routers_may_be_named(run_config, tmp_path, pattern):
    sizes = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    write_checkpoint(tmp_path / "llama", transformers.Qwen3MoeConfig(**{**LLAMA, **sizes, "head_dim": 16}))
    assert prepare(run_config(quantization__ignore=[pattern])).plan.needless_ignore == (pattern,)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("re:.*mlp\\.gate$", r"a regular expression, expected a shell pattern, such as '\*mlp.gate'; a layer is called"),
     ("re:^model.layers.0.*", r"such as 'model.layers.0\*'"), ("*.lm_heat", "matches no linear layer")],
)  # fmt: skip
def test_regular_expressions_and_typing_errors_are_refused(run_config, pattern, message):
    with pytest.raises(ConfigError, match=message):
        prepare(run_config(quantization__ignore=[pattern]))
