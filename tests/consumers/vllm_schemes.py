"""Ask vLLM's own reader which scheme, kernel and type of inputs a config gives: a script for an environment with vLLM.

    PYTHONPATH=HUMMING VLLM_ENVIRONMENT/bin/python tests/consumers/vllm_schemes.py < LINES

Each line of the input is a JSON object: `config`, the `quantization_config`; `name`, the name of the layer in vLLM;
`rows` and `columns`, its sizes; `capability`, that of the GPU, which is pretended; `backend`, what `--linear-backend`
says. For each of them the output has a line with a JSON object: `scheme` and `kernel`, names of classes; `bits` and
`group_size` of the weights; `inputs`, the type that the kernel multiplies, None where no package `humming` is there to
say so of its kernels; of an attention module the `scales` that it reads; or `error`. No weight is prepared and nothing
is multiplied.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
from unittest import mock

os.environ |= {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.kernels import linear as linear_kernels
from vllm.model_executor.kernels.linear.mixed_precision.humming import HummingLinearKernel
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
    compressed_tensors_moe_w4a8_fp8,
    compressed_tensors_moe_w4a8_int8,
    compressed_tensors_moe_w8a8_int8,
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.utils import humming as humming_utils
from vllm.model_executor.layers.quantization.utils.humming import linear as humming_linear
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.utils.import_utils import has_humming

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_CUTLASS = "CutlassW4A8LinearKernel"
_EXPERTS = (
    compressed_tensors_moe_w4a8_fp8.CompressedTensorsW4A8Fp8MoEMethod,
    compressed_tensors_moe_w4a8_int8.CompressedTensorsW4A8Int8MoEMethod,
    compressed_tensors_moe_w8a8_int8.CompressedTensorsW8A8Int8MoEMethod,
    compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod,
)
"""Classes that hold packed experts, which are not built, because they look for kernels."""


class RoutedExperts(torch.nn.Module):
    """Stands for vLLM's class of that name, which a target `Linear` means too."""

    ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"
    moe_config = None


class _InputsKnown(Exception):
    """The kernel has said which type its inputs have."""


@contextlib.contextmanager
def _pretended(capability, backend):
    """Let vLLM take this machine for one with a GPU."""
    platform = type(current_platform)
    found = DeviceCapability(*divmod(capability, 10))
    with contextlib.ExitStack() as stack:
        for name, value in {
            "_enum": PlatformEnum.CUDA,
            "get_device_capability": classmethod(lambda cls, device_id=0: found),
            "is_cuda": lambda self: True,
            "is_cuda_alike": lambda self: True,
            "is_cpu": lambda self: False,
        }.items():
            stack.enter_context(mock.patch.object(platform, name, value))
        stack.enter_context(mock.patch.object(linear_kernels, "_get_linear_backend", return_value=backend))
        if not has_humming():
            module = sys.modules[HummingLinearKernel.__module__]
            stack.enter_context(mock.patch.object(module, "has_humming", return_value=True))
        yield


def _converted(schema, param_dtype, **_):
    """Say what a schema becomes, without converting tensors."""
    return schema.to_humming_schema(param_dtype), {}


def _humming_inputs(layer, kernel, capability):
    """Return the type of inputs that vLLM asks Humming for, by its own code up to where weights would be prepared."""
    from humming.schema import base
    from humming.schema import humming as humming_schema

    def stop(original, **arguments):
        raise _InputsKnown(str(original(**arguments).a_dtype or "16 bits"))

    layer.weight, layer.has_bias = torch.nn.Parameter(torch.empty(0), requires_grad=False), False
    fallback = functools.partial(stop, humming_linear.check_and_fallback_input_schema)
    with (
        mock.patch.object(humming_utils, "convert_linear_layer_to_humming_standard"),
        mock.patch.object(humming_linear, "check_and_fallback_input_schema", fallback),
        mock.patch.object(base.BaseWeightSchema, "convert_humming", _converted),
        mock.patch.object(base.BaseInputSchema, "convert_humming", _converted),
        mock.patch.object(humming_schema, "current_device", mock.Mock(sm_version=capability)),
    ):
        try:
            kernel.process_weights_after_loading(layer)
        except _InputsKnown as known:
            return str(known)
    raise AssertionError("Humming was not asked for the type of inputs")


def linear_scheme(config, name, rows, columns, capability):
    """Return what becomes of a linear layer."""
    config.packed_modules_mapping = _FUSED
    layer = torch.nn.Linear(1, 1, bias=False)
    scheme = config.get_scheme(layer, name)
    if scheme is None:
        return {"scheme": None}
    layer, dtype = torch.nn.Module(), torch.bfloat16 if capability >= 80 else torch.float16
    layer.input_size_per_partition, layer.output_partition_sizes, layer.params_dtype = columns, [rows], dtype
    scheme.create_weights(
        layer,
        output_size=rows,
        input_size=columns,
        output_partition_sizes=[rows],
        input_size_per_partition=columns,
        params_dtype=dtype,
        weight_loader=None,
    )
    kernel = type(scheme.kernel).__name__
    inputs = "float8e4m3" if kernel == _CUTLASS else "16 bits"
    if isinstance(scheme.kernel, HummingLinearKernel):
        inputs = _humming_inputs(layer, scheme.kernel, capability) if has_humming() else None
    bits = getattr(scheme, "num_bits", 4)
    return {
        "scheme": type(scheme).__name__, "kernel": kernel, "inputs": inputs, "bits": bits,
        "group_size": scheme.group_size,
    }  # fmt: skip


def expert_scheme(config, name):
    """Return what becomes of the experts of a layer."""
    layer = RoutedExperts()
    with contextlib.ExitStack() as stack:
        for method in _EXPERTS:
            stack.enter_context(mock.patch.object(method, "__init__", return_value=None))
        return {"scheme": type(CompressedTensorsMoEMethod.get_moe_method(config, layer, name)).__name__}


def cache_scheme(config, name):
    """Return what becomes of the keys and values of an attention module, and the scales that are read for it."""
    layer = Attention.__new__(Attention)  # which would look for a kernel
    torch.nn.Module.__init__(layer)
    method = config.get_quant_method(layer, name)
    method.create_weights(layer)
    return {"scheme": type(method).__name__, "scales": sorted(dict(layer.named_parameters()))}


def answer(question):
    """Answer one line."""
    with _pretended(question["capability"], question.get("backend", "auto")):
        try:
            config = CompressedTensorsConfig.from_config(question["config"])
            if "experts" in question["name"]:
                return expert_scheme(config, question["name"])
            if question["name"].endswith(".attn"):
                return cache_scheme(config, question["name"])
            return linear_scheme(
                config, question["name"], question["rows"], question["columns"], question["capability"]
            )
        except (NotImplementedError, RuntimeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as rendezvous, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous.name}.0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # what vLLM started in the background is not waited for
