"""Products of rounded factors, with and without units for them."""

import pytest
import torch

from astro.linalg import bf16_matmul
from tests.support.models import random_weights

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("shape", [(40, 64), (3, 40, 64)])
def test_product_is_off_by_the_rounding_of_its_factors_at_most(monkeypatch, shape):
    monkeypatch.setattr(bf16_matmul, "_is_faster", lambda device: True)
    A, B = torch.randn(shape, generator=torch.Generator().manual_seed(0)), random_weights(64, 64)
    B = B.expand(*shape[:-2], 64, 64)
    product = bf16_matmul.product(bf16_matmul.operand(A), bf16_matmul.operand(B))
    assert product.dtype == torch.float32
    size = A.double().abs() @ B.double().abs()
    assert bool(((product - A.double() @ B.double()).abs() <= 2**-7 * size).all())


def test_nothing_is_rounded_where_that_would_be_emulated(monkeypatch):
    monkeypatch.setattr(bf16_matmul, "_is_faster", lambda device: False)
    A, B = random_weights(8, 16), random_weights(16, 16, seed=2)
    assert bf16_matmul.operand(B) is B
    assert torch.equal(bf16_matmul.product(bf16_matmul.operand(A), bf16_matmul.operand(B)), A @ B)


@pytest.mark.parametrize("shape", [(40, 64), (3, 40, 64)])
def test_a_gpu_adds_up_in_float32(shape):
    A = torch.empty(shape, dtype=torch.bfloat16, device="meta")  # goes the way of a GPU, without numbers
    product = bf16_matmul.product(A, A.mT)
    assert product.dtype == torch.float32
    assert product.shape == (*shape[:-1], 40)
