"""A correction reads inputs as they are, and its layer reads them rounded: the best one, against brute force."""

import dataclasses

import pytest
import torch

from astro.activation_config import ActivationScheme, Reconstruction
from astro.calibration.input_sums import InputSums, RoundingMoments, SumKind, side_by_side
from astro.config import Quantization, Regularizer
from astro.model.activation_rounding import round_activations
from astro.quantization.error_reconstruction import reconstruct
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.prepared_groups import InputGroups, factor_input_groups
from astro.quantization.recipe import Corrections, InputMoments, Recipe
from astro.quantization.unrounded_inputs import UnroundedInputs
from tests.support.models import correlated_inputs, random_weights

INT4 = ActivationScheme(4, "int")


def with_outliers(num_tokens: int, num_columns: int) -> torch.Tensor:
    X = correlated_inputs(num_tokens, num_columns)
    X[:, :3] *= 30
    return X


def groups_of(X: torch.Tensor, X_rounded: torch.Tensor, wants_rounded: bool = False, **settings: object) -> InputGroups:
    """An input group whose moments are those of some tokens, not shrunk, in float64."""
    lost = X - X_rounded
    H, drift, correction_drift = (
        (left.T @ right / len(X))[None] for left, right in ((X_rounded, X_rounded), (lost, X_rounded), (lost, X))
    )
    inputs = InputMoments(H, rounding=RoundingMoments(torch.zeros(1, 0, 2 * X.shape[1]), drift, correction_drift))
    quantization = Quantization(group_size=-1, **settings)
    corrections = Corrections(Reconstruction(rank=2), frozenset(["a"]), torch.float32, wants_rounded)
    recipe = Recipe(quantization, Regularizer(name="none"), torch.float16, corrections=corrections)
    return factor_input_groups(["a"], inputs, quantization.scheme("a", X.shape[1]), recipe)


@pytest.mark.parametrize("wants_rounded", [False, True])
def test_no_correction_of_that_rank_is_better_than_the_one_that_is_found(wants_rounded: bool) -> None:
    X = with_outliers(120, 7)
    X_rounded = round_activations(X, INT4)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    W_hat = W + 0.1 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    read = UnroundedInputs.of(groups_of(X, X_rounded, wants_rounded, damping=1e-4))
    assert read is not None
    assert torch.allclose(read.H[0], X.T @ X / len(X), rtol=1e-9)

    def objective(D: torch.Tensor) -> torch.Tensor:
        missed = (X_rounded if wants_rounded else X) @ W.T - X_rounded @ W_hat.T - X @ D.T
        return missed.square().sum() / len(X) + read.damping[0] * (W - W_hat - D).square().sum()

    factors = reconstruct(read.missed(W[None], W_hat[None]), read.H, read.damping, 2, 1.0)[0]
    least = objective(factors.B @ factors.A)
    best = torch.inf
    for _ in range(4):  # brute force from other starts
        A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 7), (5, 2)))
        leaves = [A.requires_grad_(), B.requires_grad_()]
        optimizer = torch.optim.LBFGS(leaves, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def closure(leaves: list[torch.Tensor] = leaves, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = objective(leaves[1] @ leaves[0])
            loss.backward()
            return loss

        optimizer.step(closure)
        best = min(best, float(objective(leaves[1].detach() @ leaves[0].detach())))
    assert best == pytest.approx(float(least), rel=1e-6)
    U, S, V = torch.linalg.svd(W - W_hat)
    assert least < 0.95 * objective(U[:, :2] * S[:2] @ V[:2])


def test_where_nothing_is_rounded_it_is_what_the_weights_miss() -> None:
    X, W = with_outliers(200, 16), torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W_hat = W + 0.1 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    read = UnroundedInputs.of(groups_of(X, X))
    assert read is not None
    torch.testing.assert_close(read.missed(W[None], W_hat[None])[0], W - W_hat, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("missing", ["drift", "correction_drift"])
def test_without_the_sums_for_it_there_is_nothing_to_read(missing: str) -> None:
    X = with_outliers(50, 8)
    groups = groups_of(X, round_activations(X, INT4))
    assert groups.inputs.rounding is not None
    rounding = dataclasses.replace(groups.inputs.rounding, **{missing: None})
    inputs = dataclasses.replace(groups.inputs, rounding=rounding)
    assert UnroundedInputs.of(dataclasses.replace(groups, inputs=inputs)) is None


@pytest.mark.parametrize(("method", "compensation"), [("gptq", "auto"), ("gptq", 1.0), ("gptq", 0.0), ("rtn", "auto")])
def test_a_layer_of_few_bits_behind_outliers_comes_close_to_the_least_error(
    method: str, compensation: str | float
) -> None:
    """The least error of the very integers that were solved, by the SVD over all tokens in float64."""
    X, W = with_outliers(2000, 96).float(), random_weights(64, 96)
    makes_up = method == "gptq" and compensation != 0
    sums = InputSums(96, X.device, SumKind(INT4, has_rounding_drift=makes_up, has_correction_drift=True), "none")
    for x in X.split(16):  # every token is in the sample
        sums.add_(x)
    H, _, rounding = sums.finish_("a")
    assert rounding is not None
    settings = Quantization(group_size=32, compensation=compensation, method=method)
    corrections = Corrections(Reconstruction(rank=16), frozenset(["a"]), torch.float32)
    how = Recipe(settings, Regularizer(name="none"), torch.float16, corrections=corrections)
    errors = []
    for known in (dataclasses.replace(rounding, correction_drift=None), rounding):
        inputs = InputMoments(H[None], rounding=side_by_side([known], 96))
        layers, (record,) = quantize_input_groups([{"a": W}], inputs, [2000], settings.scheme("a", 96), how)
        errors.append(record.relative_error)
        W_hat = layers["a"].dequantize().double()
    X, W, read = X.double(), W.double(), round_activations(X, INT4).double()
    S = torch.linalg.cholesky(X.T @ X)
    M = (X @ W.T - read @ W_hat.T).T @ X
    U, sigma, V = torch.linalg.svd(torch.linalg.solve_triangular(S, M.T, upper=False).T, full_matrices=False)
    D = torch.linalg.solve_triangular(S.T, ((U[:, :16] * sigma[:16]) @ V[:16]).T, upper=True).T
    least = float((X @ W.T - read @ W_hat.T - X @ D.T).square().sum() / (X @ W.T).square().sum())
    assert least < errors[1] < 1.05 * least
    assert errors[0] > 1.15 * errors[1]
