"""Freed memory is kept between arrays, and given back when a block is done."""

import os
import platform
import subprocess
import sys

import pytest

CHURN = """
import resource
import torch
from astro.process import keep_freed_memory, return_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def churn():
    before = faults()
    for _ in range(20):
        a = torch.ones(6 << 20)
        b = a + 1
        del a, b
    return faults() - before

fresh = churn()
assert keep_freed_memory()
churn()
kept, held = churn(), resident()
return_freed_memory()
assert kept < fresh / 4, (kept, fresh)
assert resident() < held - 4000, (resident(), held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps freed memory")
def test_freed_memory_is_used_again_and_then_returned():
    subprocess.run([sys.executable, "-c", CHURN], check=True, timeout=120)


SETTINGS = """
import torch
from astro.process import configure_process

torch.backends.cuda.matmul.allow_tf32 = True
configure_process(1)
matmul = torch.backends.cuda.matmul
assert not matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
assert not matmul.allow_fp16_reduced_precision_reduction and not matmul.allow_bf16_reduced_precision_reduction
import os
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""


def test_products_are_summed_in_float32():
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    subprocess.run([sys.executable, "-W", "error", "-c", SETTINGS], check=True, timeout=120, env=environment)
