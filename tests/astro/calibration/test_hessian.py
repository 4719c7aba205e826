"""Accumulation, damping and factorization against their definitions in float64."""

import pytest
import torch

from astro.calibration import drift as drift_module
from astro.calibration import hessian as hessian_module
from astro.calibration.drift import DriftAccumulator
from astro.calibration.hessian import HessianAccumulator, shrinkage
from astro.errors import NumericalError
from astro.linalg.cholesky import factorize
from astro.linalg.symmetric import layer_error
from tests.support.devices import here
from tests.support.models import correlated_inputs, naive_hessian, random_weights

pytestmark = pytest.mark.usefixtures("device")


def hessian(X, pieces=1, name="layer"):
    accumulator = HessianAccumulator(X.shape[1], here())
    for piece in X.float().chunk(pieces):
        accumulator.add_(piece)
    return accumulator.finish_(name)


@pytest.mark.parametrize("num_columns", [1, 48, 1025, 2100])
def test_against_naive_float64_product(num_columns):
    X = correlated_inputs(70, num_columns).float().double()
    H = hessian(X, pieces=3)
    expected = naive_hessian(X)
    torch.testing.assert_close(H.double(), expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)
    assert torch.equal(H, H.T)


def test_tokens_of_every_leading_dimension_count():
    X = correlated_inputs(24, 8).float()
    accumulator = HessianAccumulator(8, here())
    accumulator.add_(X.reshape(2, 3, 4, 8))
    assert accumulator.num_tokens == 24
    torch.testing.assert_close(accumulator.finish_("x").double(), naive_hessian(X), rtol=1e-5, atol=1e-5)


def test_more_text_is_believed_more():
    """What two columns say of each other counts by the number of tokens, and their energies as they are."""
    X = correlated_inputs(10, 8)
    plain, few, many = X.T @ X / 10, hessian(X).double(), hessian(X.repeat(1000, 1)).double()
    torch.testing.assert_close(few.diagonal(), plain.diagonal(), rtol=1e-5, atol=0)
    torch.testing.assert_close(many, plain, rtol=1e-2, atol=1e-5)
    apart = [float((H - torch.diag(H.diagonal())).abs().sum()) for H in (few, plain)]
    assert apart[0] < 0.7 * apart[1]


def test_bfloat16_inputs_are_multiplied_exactly():
    X = correlated_inputs(64, 16).to(torch.bfloat16)
    accumulator = HessianAccumulator(16, here())
    accumulator.add_(X)
    # On a GPU in another order. Products that were rounded to bfloat16 would be off by 1e-3.
    torch.testing.assert_close(accumulator.finish_("x"), hessian(X.double()), rtol=1e-6, atol=1e-7)


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def half(request, monkeypatch):
    """The dtype that a GPU multiplies as it is. Its product, which a CPU has not, is made of one in float32."""
    real = torch.mm

    def mm(A, B, out_dtype):
        assert A.dtype == B.dtype == request.param
        assert real(A.to("meta"), B.to("meta"), out_dtype=out_dtype).dtype == torch.float32  # the call exists
        return real(A.float(), B.float())

    for module in (hessian_module, drift_module):
        monkeypatch.setattr(module, "is_multiplied_exactly", lambda X: True)
    monkeypatch.setattr(hessian_module.torch, "mm", mm)
    return request.param


def test_what_a_gpu_gets_in_16_bits_comes_to_the_same(half):
    X = correlated_inputs(64, 300).to(half)
    accumulator = HessianAccumulator(300, here())
    accumulator.add_(X)
    assert torch.equal(accumulator.finish_("x"), hessian(X.double()))


def test_drift_that_a_gpu_gets_in_16_bits_is_as_good(half):
    X = correlated_inputs(64, 40).to(half)
    X_source = (X.double() * 1.01 + 0.003 * correlated_inputs(64, 40, seed=5)).to(half)
    accumulator = DriftAccumulator(40, here())
    accumulator.add_(X_source, X)
    expected = (X_source.double() - X.double()).T @ X.double() / 64
    H = accumulator.finish_("x", torch.ones(40)).double()
    torch.testing.assert_close(H, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_drift_of_float16_may_be_larger_than_float16(half):
    X = torch.full((2, 3), 6e4).to(half)
    accumulator = DriftAccumulator(3, here())
    accumulator.add_(-X, X)
    found = accumulator.finish_("x", torch.ones(3)).double()
    torch.testing.assert_close(found, -2 * X[0, 0].double().square().expand(3, 3))


@pytest.mark.parametrize("share", [0.5, 1 / 3, 0.8])
def test_spread_of_drifts_is_what_chance_adds_to_the_whole_however_uneven_the_parts_are(share):
    """The drift is nothing but chance: on average ‖Δ‖² = ‖D‖², and Δ is a naive float64 form."""
    tokens, spread_energy, drift_energy = 60, 0.0, 0.0
    first = round(share * tokens)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        noise, X = (torch.randn(tokens, 4, generator=generator) for _ in range(2))
        whole, part = DriftAccumulator(4, here()), DriftAccumulator(4, here())
        whole.add_(X + noise, X)
        part.add_((X + noise)[:first], X[:first])
        D = [(noise[rows].T.double() @ X[rows].double()) / len(X[rows]) for rows in (slice(first), slice(first, None))]
        expected = (share * (1 - share)) ** 0.5 * (D[0] - D[1])
        spread = whole.spread_(part).double()
        torch.testing.assert_close(spread, expected, rtol=1e-4, atol=1e-6)
        spread_energy += float(spread.square().sum())
        drift_energy += float(whole.finish_("x", torch.ones(4)).square().sum())
    assert spread_energy == pytest.approx(drift_energy, rel=0.1)


def test_no_token_is_an_error():
    with pytest.raises(NumericalError, match="q_proj: no calibration token reached"):
        HessianAccumulator(4, here()).finish_("q_proj")


def test_inputs_that_are_not_finite_are_an_error():
    X = correlated_inputs(8, 4)
    X[3, 2] = float("nan")
    with pytest.raises(NumericalError, match="v_proj: its calibration inputs hold NaN"):
        hessian(X, name="v_proj")


def test_factor_reproduces_the_damped_reordered_matrix():
    H = hessian(correlated_inputs(200, 40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    factor = factorize(H, order, 0.01, 1.0, ["x"])
    P = H.double()[order][:, order]
    P.diagonal().add_(0.01 * H.double().diagonal().mean())
    N = factor.feedback.double()
    assert torch.equal(N, N.triu())
    assert bool((N.diagonal() == 1).all())
    M = torch.linalg.solve_triangular(N, P, upper=True)
    D = torch.linalg.solve_triangular(N, M.T, upper=True)  # N⁻¹ P N⁻ᵀ is the diagonal D²
    off = D - torch.diag(D.diagonal())
    assert float(off.abs().max()) < 1e-4 * float(D.diagonal().abs().max())


def test_singular_hessian_needs_only_its_damping():
    factor = factorize(hessian(correlated_inputs(5, 40)), torch.arange(40), 0.01, 1.0, ["x"])
    assert (factor.damping, factor.attempts) == (0.01, 1)


def test_damping_is_raised_and_counted_where_it_is_too_small():
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.2]))
    factor = factorize(H, torch.arange(4), 0.01, 10.0, ["x"])
    assert factor.attempts == 3
    assert factor.damping == pytest.approx(1.0)


def test_damping_beyond_its_limit_is_an_error():
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.2]))
    with pytest.raises(NumericalError, match=r"down_proj: the Hessian is not positive definite with damping 0\.1"):
        factorize(H, torch.arange(4), 0.01, 0.1, ["down_proj"])


def test_hessian_of_zeros_is_an_error():
    with pytest.raises(NumericalError, match="input of this layer is zero, .* name it in quantization.ignore"):
        factorize(torch.zeros(4, 4), torch.arange(4), 0.01, 1.0, ["x"])


@pytest.mark.parametrize("columns", [16, 600])
def test_layer_error_is_the_output_error(columns):
    X, W = correlated_inputs(50, columns), random_weights(6, columns).double()
    W_hat = W.round(decimals=1)
    expected = ((X @ (W - W_hat).T) ** 2).sum(0)
    torch.testing.assert_close(layer_error(W, W_hat, X.T @ X), expected)


def test_shares_of_one_chunk_merged_in_order_give_the_sum_over_all():
    X = correlated_inputs(40, 24).float()
    parts = []
    for rows in (X[:8], X[8:24], X[24:]):
        parts.append(HessianAccumulator(24, here()))
        parts[-1].add_(rows)
    whole, merged = (HessianAccumulator(24, here()) for _ in range(2))
    for part, rows in zip(parts, (X[:8], X[8:24], X[24:]), strict=True):
        merged.merge_(part.partial, part.num_tokens, part.totals.tolist())
        whole.add_(rows)
    assert torch.equal(merged.finish_("x"), whole.finish_("x"))


@pytest.mark.parametrize("seed", range(3))
def test_factor_solves_against_float64(seed):
    X = correlated_inputs(200, 32, seed)
    H, B = (X.T @ X / 200).float(), random_weights(5, 32)
    factor = factorize(H, torch.randperm(32, generator=torch.Generator().manual_seed(seed)), 0.05, 1.0, ["x"])
    damped = H.double() + 0.05 * H.double().diagonal().mean() * torch.eye(32)
    torch.testing.assert_close(
        factor.solve(B).double(), torch.linalg.solve(damped, B.double(), left=False), rtol=1e-3, atol=1e-4
    )


def test_cost_is_the_variance_of_a_column_given_those_after_it():
    X = correlated_inputs(200, 12)
    H, order = (X.T @ X / 200).float(), torch.tensor([3, 0, 7, 1, 2, 4, 5, 6, 11, 10, 9, 8])
    cost = factorize(H, order, 1e-6, 1.0, ["x"]).cost
    for i, column in enumerate(order.tolist()):
        after = order[i + 1 :]
        rest = X[:, column]
        if len(after):
            rest = rest - X[:, after] @ torch.linalg.lstsq(X[:, after], rest).solution
        assert float(cost[column]) == pytest.approx(float(rest.square().mean()), rel=1e-2)


def test_couplings_of_equal_columns_keep_what_as_many_tokens_say_and_those_of_an_outlier_keep_more():
    equal = shrinkage(torch.full((6,), 2.0), torch.tensor(18.0, dtype=torch.float64))
    torch.testing.assert_close(equal.square(), torch.full((6,), 18 / 24))
    energies = torch.tensor([1.0, 1.0, 0.0, 98.0])  # of mean 25
    squares = shrinkage(energies, torch.tensor(8.0, dtype=torch.float64)).square()
    torch.testing.assert_close(squares, torch.tensor([2 / 3, 2 / 3, 2 / 3, 1 / (1 + 0.5 * 25 / 98)]))
    assert not shrinkage(energies, torch.tensor(0.0, dtype=torch.float64)).any()


def test_a_hessian_with_an_outlier_channel_against_a_naive_one_is_symmetric_and_positive():
    X = correlated_inputs(30, 40).float()
    X[:, 7] *= 100
    H = hessian(X.double())
    torch.testing.assert_close(H.double(), naive_hessian(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(H, H.mT)
    assert float(torch.linalg.eigvalsh(H.double())[0]) > 0
