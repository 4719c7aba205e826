"""What a test makes lies on its device, and what the product makes is left alone."""

import torch

from astro.quantization.gptq import activation_order
from tests.support.devices import here, on_device
from tests.support.models import random_weights


def test_what_tests_make_is_moved_and_what_the_product_makes_is_not():
    with on_device(torch.device("meta")):
        assert here().type == torch.ones(2).device.type == random_weights(2, 3).device.type == "meta"
        assert torch.ones(2, device="cpu").device.type == "cpu"
        assert torch.zeros_like(torch.ones(2, device="cpu")).device.type == "cpu"
        assert activation_order(torch.ones(2, 2, device="cpu")).device.type == "cpu"
    assert here().type == torch.ones(2).device.type == "cpu"
