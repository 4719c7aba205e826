"""Notes on experts that the result does not have packed."""

import pytest
import transformers

from astro_dist.planning.validate import prepare
from tests.support.architectures import EXPERTS
from tests.support.models import write_checkpoint

DBRX = transformers.DbrxConfig(
    d_model=64, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=260,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
)  # fmt: skip


@pytest.mark.parametrize("name", ["dbrx", "mixtral", "gpt-oss"])
def test_experts_that_nobody_reads_packed_are_told(run_config, tmp_path, name):
    source = write_checkpoint(tmp_path / "source", DBRX if name == "dbrx" else EXPERTS[name])
    prepared = prepare(run_config(model__source=str(source), quantization__group_size=32))
    notes = [note for note in prepared.notes if note.startswith("the experts stay in 16 bits")]
    assert len(notes) == (name == "dbrx")
    if notes:
        assert "6 matrices" in notes[0]
        assert "transformer.blocks.0.ffn.experts.mlp.w1" in notes[0]
        assert prepared.plan.coverage.share < 0.5
