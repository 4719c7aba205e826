"""Mode `stages`: whole runs beside the other modes, and what holds of each block."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from astro.model.block_call import BlockState, forward
from astro.model.recording import count_outputs, record
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.export.finished_run import FinishedRun
from astro_dist.report.findings import Findings
from astro_dist.report.html import write_report
from astro_dist.schedule.names import is_held_out
from tests.support.architectures import DENSE, EXPERTS, STATEFUL
from tests.support.dequantized import write_dequantized
from tests.support.models import write_checkpoint

ARCHITECTURES = {**DENSE, **EXPERTS, **STATEFUL}
SETTINGS = {
    "plain": {},
    "weighed": {"calibration__token_weights": "loss"},
    "uncompensated": {"quantization__compensation": 0.0},
    "a share that is given": {"quantization__compensation": 0.5},
    "one chunk": {"calibration__chunk_samples": 8},
    "rounded": {"quantization__method": "rtn"},
    "rounded inputs": {"activations__bits": 4, "activations__kv_cache": "fp8", "quantization__group_size": 64},
    "corrected": {"reconstruction__rank": 4, "activations__bits": 8, "activations__smoothing": "aser"},
    "ignored": {"quantization__ignore": ["*.q_proj", "*.k_proj", "*.v_proj"], "activations__kv_cache": "fp8"},
}


def run(run_config, mode, folder, **changes):
    """Run, and return the tensors of the result and the records of its input groups by name."""
    settings = {"execution__mode": mode, "execution__hessian_shares": 2, "quantization__bits": 3, **changes}
    summary = pipeline.quantize(run_config(output__dir=str(folder), **settings))
    checkpoint = Checkpoint.open(Path(summary.model))
    blocks = Findings.read(folder).blocks.values()
    return checkpoint.read(checkpoint.entries), {each.name: each for block in blocks for each in block.layers}


def require_same_first_block(run_config, tmp_path, **changes):
    """The first block has no errors before it, and two chunks are two shares: both modes do the same to it."""
    tensors, records = run(run_config, "stages", tmp_path / "stages", **changes)
    expected, expected_records = run(run_config, "sequential", tmp_path / "sequential", **changes)
    names = [name for name in expected if re.match(r"\D+\.0\.", name)]
    assert names
    for name in names:
        assert torch.equal(tensors[name], expected[name]), name
    for name, layer in records.items():
        if ".layers.0." in name:
            assert layer.relative_error == expected_records[name].relative_error
            # Where the share is not measured, the other mode says it of a first stage that has no errors, too.
            is_first = "q_proj" in name and "kv_cache" not in " ".join(changes)
            assert layer.compensation == (0.0 if is_first else expected_records[name].compensation)
    return records


@pytest.mark.parametrize("setting", SETTINGS)
def test_first_block_is_that_of_mode_sequential_to_the_byte(run_config, tmp_path, setting):
    require_same_first_block(run_config, tmp_path, **SETTINGS[setting])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(run_config, tmp_path, name):
    write_checkpoint(tmp_path / name, ARCHITECTURES[name])
    source = {"model__source": str(tmp_path / name), "quantization__group_size": 16}
    require_same_first_block(run_config, tmp_path, **source)


@pytest.mark.parametrize("policy", ["all-tokens", "shared-hessian", "rtn"])
def test_experts_that_few_tokens_reach(run_config, tmp_path, policy):
    """Their shared Hessian is added up in one order only where there is one share."""
    write_checkpoint(tmp_path / "moe", EXPERTS["qwen3-moe"])
    changes = {"model__source": str(tmp_path / "moe"), "quantization__group_size": 16}
    changes |= {"calibration__chunk_samples": 8} if policy == "shared-hessian" else {}
    records = require_same_first_block(run_config, tmp_path, experts__policy=policy, experts__min_tokens=150, **changes)
    assert {layer.fallback for layer in records.values()} == {"", policy}


def test_later_stages_make_up_for_earlier_ones(run_config, tmp_path):
    _, records = run(run_config, "stages", tmp_path / "stages")
    for name, layer in records.items():
        assert 0 <= layer.compensation <= 1
        assert layer.compensation == 0 or "q_proj" not in name, "nothing is quantized before the first stage"
    assert sum(layer.compensation > 0 for layer in records.values()) > 2
    _, in_one_piece = run(run_config, "stages", tmp_path / "whole", calibration__chunk_samples=8)
    assert {layer.compensation for layer in in_one_piece.values()} == {0.0, 0.25}


def test_no_block_knows_of_another(run_config, llama, tmp_path):
    """With the first block left as it is, the second one stays the same to the byte."""
    tensors, _ = run(run_config, "stages", tmp_path / "both")
    alone, _ = run(run_config, "stages", tmp_path / "alone", quantization__ignore=["model.layers.0.*"])
    names = [name for name in tensors if ".layers.1." in name]
    assert names
    assert all(torch.equal(tensors[name], alone[name]) for name in names)


@torch.no_grad()
def test_blocks_return_what_they_should_more_nearly_than_those_of_mode_blocks(run_config, llama, tmp_path):
    errors = {}
    for mode in ("blocks", "stages"):
        run(run_config, mode, tmp_path / mode, calibration__samples=12, calibration__token_weights="none")
        write_dequantized(llama, tmp_path / mode / "model", tmp_path / f"{mode}-dequantized")
        ids = load_file(tmp_path / mode / "tokens.safetensors")
        ids = torch.cat([chunk for name, chunk in ids.items() if not is_held_out(name)])
        errors[mode] = block_errors(llama, tmp_path / f"{mode}-dequantized", ids)
    assert all(errors["stages"][i] < 0.97 * errors["blocks"][i] for i in range(2)), errors


def block_errors(source, result, ids):
    """Relative squared error of what each block returns for its inputs in the source."""
    models = []
    for folder in (source, result):
        checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
        skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), torch.device("cpu"))
        models.append(skeleton)
    hidden, calls = record(models[0], ids, count_outputs(models[0], ids))
    errors = []
    for index, call in enumerate(calls):
        wanted, got = (forward(skeleton.blocks[index], BlockState(hidden), call).hidden for skeleton in models)
        errors.append(float((got - wanted).double().square().sum() / wanted.double().square().sum()))
        hidden = wanted
    return errors


@pytest.mark.parametrize(("mode", "says"), [("blocks", False), ("stages", True), ("sequential", True)])
def test_card_and_page_say_what_errors_are_relative_to(run_config, tmp_path, mode, says):
    run(run_config, mode, tmp_path / mode)
    finished = FinishedRun.open(tmp_path / mode)
    page = write_report(Findings.read(tmp_path / mode)).read_text()
    for text in (finished.card(None).text, page):
        assert ("make up for" in text) == says
    assert ("behind the quantized ones before" in finished.card(None).text) == says
