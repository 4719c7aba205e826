"""Ask vLLM's own loader what it makes of a checkpoint, without a kernel: a script for an environment with vLLM.

    VLLM_ENVIRONMENT/bin/python tests/consumers/vllm_loader.py FOLDER [DRAFTER]
    VLLM_ENVIRONMENT/bin/python tests/consumers/vllm_loader.py < LINES

vLLM builds its model as it would for a GPU, every parameter is filled with a mark, and vLLM's loader reads the files.
What still holds the mark was not filled. No forward runs, and no weight is prepared for a kernel, so that experts,
widths and sparse attention that have no kernel on a CPU are checked too. DRAFTER is a method of speculation, such as
"mtp": then its model is loaded in place of the model itself. The last line of the output is a JSON object.

Without arguments each line of the input is a JSON list [FOLDER] or [FOLDER, DRAFTER], and for each of them the output
has a line with a JSON object, in which `error` says why vLLM refused. vLLM is imported only once then.
"""

import contextlib
import inspect
import json
import os
import signal
import sys
import tempfile
from unittest import mock

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.model_executor.layers.fused_moe import config as fused_moe_config
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform

_MARK = 0x5A5A5A5A
"""Value of whole numbers that no loader wrote; floats are NaN."""
_LONGEST_S = 300
_CACHE_SCALES = (".attn.k_scale", ".attn.v_scale")
_COMPUTED = (
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
    "attn.q_zero_point",
    "attn.k_zero_point",
    "attn.v_zero_point",
    "routed_experts.w13_weight_shape",
    "routed_experts.w2_weight_shape",
)
"""Endings of parameters that vLLM itself computes, or never reads, as the shapes of experts."""


class _NoKernel:
    """Stands for the kernel of a packed layer, which is never called."""

    def __init__(self, *args, **kwargs):
        pass


def _with_dense_attention(original):
    """CPUs have no sparse attention; the parameters are the same with dense attention."""

    def choose(cls, selected_backend, attn_selector_config, *args, **kwargs):
        dense = attn_selector_config._replace(use_sparse=False)
        return original.__func__(cls, selected_backend, dense, *args, **kwargs)

    return classmethod(choose)


class _TakesEveryExpert:
    """Stands for the platform where vLLM asks whether experts without a gate have a kernel."""

    def is_xpu(self):
        return True

    def __getattr__(self, name):
        return getattr(current_platform, name)


def _with_known_arguments(original):
    """Dense attention is not told what sparse attention asks for, such as the tokens that the indexer chose."""
    names = inspect.signature(original).parameters

    def initialize(self, *args, **kwargs):
        original(self, *args, **{name: value for name, value in kwargs.items() if name in names})

    return initialize


@contextlib.contextmanager
def _without_kernels():
    moe = compressed_tensors_moe_wna16
    with (
        mock.patch.object(compressed_tensors_wNa16, "choose_mp_linear_kernel", return_value=_NoKernel),
        mock.patch.object(moe, "select_wna16_moe_backend", return_value=(WNA16MoEBackend.TRITON, None)),
        mock.patch.object(CpuPlatform, "get_attn_backend_cls", _with_dense_attention(CpuPlatform.get_attn_backend_cls)),
        mock.patch.object(fused_moe_config, "current_platform", _TakesEveryExpert()),
        mock.patch.object(MLACommonImpl, "__init__", _with_known_arguments(MLACommonImpl.__init__)),
    ):
        yield


def _mark(parameter):
    if parameter.is_floating_point():
        parameter.fill_(float("nan"))
    elif parameter.dtype in (torch.int32, torch.int64):
        parameter.fill_(_MARK)


def _is_marked(parameter):
    if parameter.is_floating_point():
        return bool(torch.isnan(parameter.float()).any())
    return parameter.dtype in (torch.int32, torch.int64) and bool((parameter == _MARK).any())


@torch.no_grad()
def examine(folder, drafter=None):
    """Load a checkpoint as vLLM does, and tell which parameters were not filled and which layers are not packed."""
    speculation = {"speculative_config": {"method": drafter, "num_speculative_tokens": 1}} if drafter else {}
    config = EngineArgs(
        model=folder, dtype="bfloat16", max_model_len=128, max_num_seqs=4, enforce_eager=True, **speculation
    ).create_engine_config()
    model_config = config.speculative_config.draft_model_config if drafter else config.model_config
    with set_current_vllm_config(config), _without_kernels(), tempfile.NamedTemporaryFile() as rendezvous:
        init_distributed_environment(1, 0, f"file://{rendezvous.name}.0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(model_config.dtype)
        # A drafter comes after its model, from which the config learns which layers vLLM fuses.
        for part in [config.model_config, *([model_config] if drafter else [])]:
            model = initialize_model(vllm_config=config, model_config=part)
        torch.set_default_dtype(before)
        for parameter in model.parameters():
            _mark(parameter)
        get_model_loader(config.load_config).load_weights(model, model_config)
    methods = {name: type(getattr(module, "quant_method", None)).__name__ for name, module in model.named_modules()}
    return {
        "model": type(model).__name__,
        "parameters": sum(1 for _ in model.parameters()),
        "unfilled": [n for n, p in model.named_parameters() if _is_marked(p) and not n.endswith(_COMPUTED)],
        "packed": sum(1 for name, _ in model.named_parameters() if name.endswith("weight_packed")),
        "cache scales": {n: float(p) for n, p in model.named_parameters() if n.endswith(_CACHE_SCALES)},
        "not packed": [name for name, method in methods.items() if method.startswith("Unquantized")],
    }


def _examine_apart(folder, drafter=None):
    """Print what became of a checkpoint, from a process of its own, because vLLM can be set up only once in each."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(_LONGEST_S)
        try:
            answer = examine(folder, drafter)
        except BaseException as error:
            message = str(error).strip() or type(error).__name__
            answer = {"error": f"{type(error).__name__}: {message.splitlines()[0]}"}
        print("\n" + json.dumps(answer), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(json.dumps({"error": f"ended by signal {os.WTERMSIG(status)}"}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(examine(*sys.argv[1:])))
        sys.stdout.flush()
        os._exit(0)  # what vLLM started in the background is not waited for
    for line in sys.stdin:
        _examine_apart(*json.loads(line))
