"""On-disk layouts of quantized linear layers, one module each, all with the same functions."""

from types import ModuleType

from astro.formats import compressed_tensors, gptq_v1

__all__ = ["LAYOUTS"]

LAYOUTS: dict[str, ModuleType] = {"compressed-tensors": compressed_tensors, "gptq": gptq_v1}
"""By what `quantization.format` and `quant_method` call them."""
