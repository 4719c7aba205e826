"""Whole runs whose tokens are weighted by the loss."""

import pytest
from safetensors.torch import load_file, save_file

from astro_dist import pipeline
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import WeightsResult
from astro_dist.schedule.names import weights_unit


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
