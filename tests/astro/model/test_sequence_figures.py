"""Means and changes, and their errors, against what many samples spread."""

import math

import pytest
import torch

from astro.model.sequence_figures import Significant, mean_per_token, relative_change


def test_errors_are_those_of_sequences_and_of_differences():
    generator = torch.Generator().manual_seed(0)
    before = 100 + 30 * torch.rand(400, generator=generator, dtype=torch.float64)  # texts differ much
    after = before + 1 + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    change = relative_change(before.tolist(), after.tolist(), [50] * 400)
    assert change.value == pytest.approx(math.expm1(1 / 50), rel=0.02)
    assert change.error == pytest.approx(0.1 / 50 / 20 * (1 + change.value), rel=0.1)


def test_error_of_a_mean_over_sequences_of_different_lengths():
    generator = torch.Generator().manual_seed(1)
    means = []
    for _ in range(300):
        tokens = torch.randint(10, 90, (40,), generator=generator)
        sums = 2.0 * tokens + tokens * 0.3 * torch.randn(40, generator=generator)
        means.append(mean_per_token(sums.tolist(), tokens.tolist()))
    spread = torch.tensor([mean.value for mean in means]).std()
    assert float(torch.tensor([mean.error for mean in means]).mean()) == pytest.approx(float(spread), rel=0.15)


def test_a_single_sequence_has_no_error():
    assert mean_per_token([6.0], [3]) == Significant(2.0, None)
    assert relative_change([1.0], [1.0], [5]) == Significant(0.0, None)
