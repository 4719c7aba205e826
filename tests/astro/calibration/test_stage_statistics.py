"""What is summed of a stage's inputs, against the definitions in float64."""

import pytest
import torch

from astro.calibration.input_sums import SumKind
from astro.calibration.stage_statistics import StageStatistics
from astro.calibration.token_weights import TokenWeights, norm_weights
from astro.config import Experts
from astro.model.operands import Inputs, Operand
from tests.support.devices import here
from tests.support.models import correlated_inputs, naive_hessian, shrunk

pytestmark = pytest.mark.usefixtures("device")

COLUMNS = 24
GROUPS = [[Operand((name,), f"{name}.weight", None, COLUMNS)] for name in ("gate", "up")]
EXPERTS = [[Operand((f"experts.{i}",), "experts.weight", i, COLUMNS)] for i in range(2)]


def chunks(count):
    """Chunks of different sizes: inputs, and what they are in the source, which is systematic and chance."""
    source = correlated_inputs(100 * count, COLUMNS).float().to(here())
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(1)).to(here())
    X = 0.9 * source + 0.1 * noise
    sizes = [60 + 80 * (i % 2) for i in range(count)]
    sizes[-1] = len(X) - sum(sizes[:-1])
    return list(zip(X.split(sizes), source.split(sizes), strict=True))


def summed(groups, count, kind, in_halves=True):
    statistics = StageStatistics(groups, here(), TokenWeights("norm"), lambda _: kind, in_halves)
    for number, (X, source) in enumerate(chunks(count)):
        inputs = {operand: Inputs(X) for operand in statistics.operands}
        statistics.add_(f"c{number:04d}", inputs, {operand: Inputs(source) for operand in statistics.drifting})
    return statistics


def finished(statistics, **policy):
    return list(statistics.finish_(Experts(**policy), lambda _: None))


def naive_drift(parts):
    """Σ w (x_s − x) xᵀ / Σ w, and Σ w, over some chunks."""
    X, source = (torch.cat(tensors).double().cpu() for tensors in zip(*parts, strict=True))
    weights = norm_weights(X.float()).double()
    return (source - X).T * weights @ X / weights.sum(), float(weights.sum())


@pytest.mark.parametrize("count", [2, 3])
def test_against_definitions_in_float64(count):
    parts = chunks(count)
    X = torch.cat([X for X, _ in parts]).cpu()
    weights = norm_weights(X)
    energies = weights.double() * X.double().square().sum(-1)
    tokens = float(energies.sum() ** 2 / energies.square().sum())
    (even, of_even), (odd, of_odd) = naive_drift(parts[::2]), naive_drift(parts[1::2])
    apart = (of_even * of_odd) ** 0.5 / (of_even + of_odd) * (even - odd)
    for statistics in finished(summed(GROUPS, count, SumKind(has_drift=True))):
        H = statistics.H.cpu().double()
        torch.testing.assert_close(H, naive_hessian(X, weights), rtol=1e-4, atol=1e-4)
        expected = shrunk(naive_drift(parts)[0], H.diagonal(), tokens)
        torch.testing.assert_close(statistics.drift.cpu().double(), expected, rtol=1e-3, atol=1e-4)
        assert statistics.spread.device.type == "cpu"
        torch.testing.assert_close(
            statistics.spread.double(), shrunk(apart, H.diagonal(), tokens), rtol=1e-3, atol=1e-4
        )
        assert statistics.num_tokens == len(X)


def test_without_halves_there_is_a_drift_and_no_spread():
    halves, whole = (finished(summed(GROUPS, 3, SumKind(has_drift=True), in_halves))[0] for in_halves in (True, False))
    assert whole.spread is None
    torch.testing.assert_close(whole.drift, halves.drift)
    assert torch.equal(whole.H, halves.H)


def test_nothing_drifts_that_is_not_to():
    statistics = summed(GROUPS, 2, SumKind())
    assert statistics.drifting == []
    assert [(each.drift, each.spread) for each in finished(statistics)] == [(None, None)] * 2


def test_expert_that_no_token_reaches_takes_what_its_policy_says():
    statistics = StageStatistics(EXPERTS, here(), TokenWeights("norm"), lambda _: SumKind(), True)
    (X, _), *_ = chunks(1)
    statistics.add_("c0000", {EXPERTS[0][0]: Inputs(X, torch.arange(len(X), device=here()))}, {})
    seen, unseen = finished(statistics, policy="shared-hessian", min_tokens=10)
    assert (seen.fallback, unseen.fallback, unseen.routed_tokens) == ("", "shared-hessian", 0)
    assert torch.equal(unseen.H, seen.H)
