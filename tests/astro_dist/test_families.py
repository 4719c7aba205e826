"""Every family goes through a whole run, and transformers reads what it wrote."""

import pytest

from tests.support.families import FAMILIES, UNREADABLE, examine


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_result_is_what_transformers_makes_of_it(name, tmp_path):
    result = examine(FAMILIES[name](tmp_path / "source"), tmp_path / "scratch")
    assert result.streamed == 0
    assert result.coverage.quantized
    if name in UNREADABLE:
        assert result.failures or result.missing or result.unexpected
    else:
        assert (result.failures, result.missing, result.unexpected) == ({}, set(), set())
        assert result.difference < 1e-5


def test_step_that_fails_is_told_and_does_not_end_the_others(tmp_path):
    source = FAMILIES["llama"](tmp_path / "source")
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("LlamaForCausalLM", "UnheardForCausalLM"))
    result = examine(source, tmp_path / "scratch")
    assert "no UnheardForCausalLM" in result.failures["streamed"]
    assert result.streamed is None
    assert result.coverage.share > 0.9
