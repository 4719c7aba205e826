"""Whole runs whose tokens are weighted by the loss."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from astro.calibration.token_weights import OUTPUT
from astro.errors import UnsupportedError
from astro_dist import pipeline
from astro_dist.report.status import read_status
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import WeightsResult
from astro_dist.schedule.calls import Backward
from astro_dist.schedule.names import weights_unit
from astro_dist.worker import token_weigher
from astro_dist.worker.worker import Worker


def weigh(config, gain, folder):
    """Weights and records of a run on a model whose last norm has a small gain, and with it all gradients are small."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"].fill_(gain)
            save_file(tensors, path, metadata={"format": "pt"})
    pipeline.quantize(config)
    run = RunDirectory(config.output.dir, "")
    effective = {}
    for block in range(3):
        effective |= run.read(weights_unit(block), WeightsResult).effective_tokens
    return effective, {layer.name: layer for block in run.blocks().values() for layer in block.layers}


def test_float16_weighs_tokens_as_float32_does(run_config, llama, tmp_path):
    """Its smallest numbers are large for gradients, which are taken times a factor for that."""
    found = {}
    for dtype in ("float32", "float16"):
        folder = str(tmp_path / dtype)
        config = run_config(execution__compute_dtype=dtype, calibration__token_weights="loss", output__dir=folder)
        found[dtype] = weigh(config, 2.0**-20, llama)
    (effective, layers), (effective16, layers16) = found.values()
    assert effective16 == pytest.approx(effective, rel=0.01)
    assert layers16.keys() == layers.keys()
    for name, layer in layers.items():
        assert layers16[name].token_weights == layer.token_weights == "loss"
        assert layers16[name].gradient_energy == pytest.approx(layer.gradient_energy, rel=0.02, abs=0)


def test_tokens_at_the_output_of_a_block_without_gradient_are_weighted_by_the_loss(run_config, tmp_path, monkeypatch):
    """The gradient there is known. In the blocks before it nothing is."""
    written, real_save, real_pass = {}, token_weigher.save_part, token_weigher.pass_back

    def save_part(path, tensors):
        written[path.parent.parent.parent.name, path.stem] = {
            name: weights for name, weights in tensors.items() if name.endswith(f".{OUTPUT}") and name[0] == "c"
        }
        return real_save(path, tensors)

    def failing(layers, action, hidden, gradient):
        if any(".1." in operand.names[0] for operand in layers.operands):
            raise UnsupportedError("no gradient passes through this block: derivative for x is not implemented")
        return real_pass(layers, action, hidden, gradient)

    monkeypatch.setattr(token_weigher, "save_part", save_part)
    changes = {"calibration__token_weights": "loss", "quantization__tune_steps": 2}
    pipeline.quantize(run_config(**changes, output__dir=str(tmp_path / "sound")))
    monkeypatch.setattr(token_weigher, "pass_back", failing)
    summary = pipeline.quantize(run_config(**changes, output__dir=str(tmp_path / "failing")))
    assert [sorted(written["failing", f"{block:04}"]) for block in range(3)] == [
        [], ["c0000.output", "c0001.output"], ["c0000.output", "c0001.output"],
    ]  # fmt: skip
    for block in ("0001", "0002"):
        for name, weights in written["failing", block].items():
            assert torch.equal(weights, written["sound", block][name])
    layers = [layer for block in RunDirectory(tmp_path / "failing", "").blocks().values() for layer in block.layers]
    assert {layer.token_weights for layer in layers if ".1." in layer.name} == {"norm"}
    assert not summary.tuning.untuned


def test_while_tokens_are_weighed_status_shows_blocks_that_workers_are_at(run_config, monkeypatch):
    """A block that is loaded, or passed forward, is not begun; a gradient's way back through it is."""
    shown, real = [], Worker.do

    def do(self, call):
        if isinstance(call, Backward):
            shown.append({doing.unit for doing in read_status(config.output.dir).in_flight} | {call.unit})
        return real(self, call)

    monkeypatch.setattr(Worker, "do", do)
    config = run_config(calibration__token_weights="loss")
    pipeline.quantize(config)
    assert shown
    assert all(len(units) == 1 for units in shown)
