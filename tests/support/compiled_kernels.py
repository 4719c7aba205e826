"""The kernels of the column loops, compiled for a GPU of the H100's kind on a machine that has none.

    python -m tests.support.compiled_kernels

compiles each in the variant that a run wants, and prints its name and the seconds that took as JSON. It needs Triton.
Triton keeps what it compiled in TRITON_CACHE_DIR. The small program that starts a kernel is not built: it needs the
driver's library.
"""

import json
import time
from collections.abc import Iterator

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from astro.quantization import column_kernels as kernels

__all__ = ["compiled_kernels"]

_KINDS = {
    "group": "*i64",
    "Q": "*i8",
    "E_rounded": "*bf16",
    "caution": "fp32",
    "ROWS": "constexpr",
    "SCALE": "constexpr",
}
"""Types of arguments that are neither sizes nor pointers to float32."""
_TARGET = GPUTarget("cuda", 90, 32)


def compiled_kernels() -> Iterator[tuple[str, str, float]]:
    """Yield name, PTX and seconds of each kernel."""
    for kernel in (kernels.round_columns, kernels.move_scale, kernels.move_columns):
        sizes = dict.fromkeys(kernels._SIZES, "i32")
        kinds = {name: _KINDS.get(name) or sizes.get(name) or "*fp32" for name in kernel.arg_names}
        constants = {"ROWS": kernels.ROWS, "SCALE": tl.bfloat16}
        constants = {(kernel.arg_names.index(name),): x for name, x in constants.items() if name in kernel.arg_names}
        options = {"num_warps": 1, "enable_fp_fusion": False}
        start = time.perf_counter()
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
        code = triton.compile(source, target=_TARGET, options=options).asm["ptx"]
        yield kernel.__name__, code, time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps({name: seconds for name, _, seconds in compiled_kernels()}))
