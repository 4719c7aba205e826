import pytest
import torch

from astro.model.low_rank import LowRank
from astro.quantization import error_reconstruction
from astro.quantization.error_reconstruction import reconstruct, remaining_errors


def problem(layers: int, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors of layers, Hessians of correlated inputs, and what is added to their diagonals; float64."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, columns, dtype=torch.float64)
    mixing = torch.randn(layers, columns, columns, generator=generator, dtype=torch.float64)
    X = torch.randn(layers, 3 * columns, columns, generator=generator, dtype=torch.float64) * spread @ mixing
    H = X.mT @ X / X.shape[1]
    E = 0.01 * torch.randn(layers, rows, columns, generator=generator, dtype=torch.float64)
    return E, H, 0.01 * H.diagonal(dim1=-2, dim2=-1).mean(-1)


def damped(H: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    return H + damping[:, None, None] * torch.eye(H.shape[-1], dtype=H.dtype)


def least_error(E: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
    """What the truncated SVD of the whitened error leaves, Σ σ² behind the rank, as the paper has it."""
    sigma = torch.linalg.svdvals(E.double() @ torch.linalg.cholesky(H.double()))
    return sigma[..., rank:].square().sum(-1)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(24, 40, 5), (40, 24, 5), (7, 16, 7), (16, 7, 99), (1, 8, 1)])
def test_the_correction_leaves_what_the_svd_of_the_whitened_error_leaves(rows: int, columns: int, rank: int) -> None:
    E, H, damping = problem(2, rows, columns)
    corrections = reconstruct(E, H, damping, rank, 1.0)
    left = torch.tensor(remaining_errors(E, damped(H, damping), corrections), dtype=torch.float64)
    assert torch.allclose(left, least_error(E, damped(H, damping), rank), rtol=1e-8, atol=1e-12)


def test_the_factors_are_those_of_the_paper() -> None:
    E, H, damping = problem(1, 12, 20)
    S = torch.linalg.cholesky(damped(H, damping))
    U, sigma, Vt = torch.linalg.svd(E @ S)
    L_A, L_B = U[..., :4] * sigma[..., None, :4], Vt[..., :4, :] @ torch.linalg.inv(S)
    factors = reconstruct(E, H, damping, 4, 1.0)[0]
    assert torch.allclose(factors.B @ factors.A, (L_A @ L_B)[0], atol=1e-9)
    assert torch.allclose(factors.B.abs(), L_A[0].abs(), atol=1e-9)
    assert torch.allclose(factors.A.abs(), L_B[0].abs(), atol=1e-7)


def test_no_other_correction_of_that_rank_is_better() -> None:
    E, H, damping = problem(1, 6, 8)
    metric = damped(H, damping)
    best = reconstruct(E, H, damping, 2, 1.0)[0]
    least = remaining_errors(E, metric, [best])[0]
    A, B = best.A.clone().requires_grad_(), best.B.clone().requires_grad_()
    left = E[0] - B @ A
    (left @ metric[0] @ left.T).trace().backward()
    gradients = [factor.grad for factor in (A, B) if factor.grad is not None]
    assert len(gradients) == 2
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-9 * metric.abs().max()
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-1, 1.0) * 20:
        moved = [
            factor + scale * factor.std() * torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            for factor in (best.A, best.B)
        ]
        assert remaining_errors(E, metric, [LowRank(*moved)])[0] > least


def test_with_drift_the_target_is_the_output_in_the_source() -> None:
    """‖W (x + γ d) − (Ŵ + B A) x‖² + λ‖Ŵ + B A − W‖² over tokens is least at the correction of W* − Ŵ."""
    generator = torch.Generator().manual_seed(0)
    X, D = (torch.randn(200, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    W, W_hat = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    gamma, H, drift = 0.3, X.T @ X / len(X), D.T @ X / len(X)
    damping = torch.tensor([0.05], dtype=torch.float64)
    target = W + gamma * W @ drift @ torch.linalg.inv(damped(H[None], damping)[0])
    best = reconstruct((target - W_hat)[None], H[None], damping, 2, 1.0)[0]

    def objective(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        V = W_hat + B @ A
        outputs = W @ (X + gamma * D).T - V @ X.T
        return outputs.square().sum() / len(X) + damping[0] * (V - W).square().sum()

    least = objective(best.A, best.B)
    for start in range(3):  # brute force from other starts
        factors = [torch.randn(2, 8, generator=generator, dtype=torch.float64),
                   torch.randn(5, 2, generator=generator, dtype=torch.float64)]  # fmt: skip
        leaves = [factor.requires_grad_() for factor in factors]
        optimizer = torch.optim.LBFGS(leaves, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(leaves: list[torch.Tensor] = leaves, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = objective(*leaves)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert objective(*leaves) >= least - 1e-9, start
    plain = reconstruct((W - W_hat)[None], H[None], damping, 2, 1.0)[0]
    assert objective(plain.A, plain.B) > least * 1.001


def test_a_higher_rank_is_never_worse_and_the_highest_leaves_nothing() -> None:
    E, H, damping = problem(1, 12, 20)
    left = [remaining_errors(E, H, reconstruct(E, H, damping, rank, 1.0))[0] for rank in range(1, 13)]
    before = remaining_errors(E, H, [LowRank(E.new_zeros(1, 20), E.new_zeros(12, 1))])[0]
    assert all(one >= other for one, other in zip([before, *left], left, strict=False))
    assert left[-1] < 1e-12 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspace_iteration_comes_close_to_the_exact_decomposition(dtype: torch.dtype) -> None:
    E, H, damping = problem(2, 700, 96)
    corrections = reconstruct(E.to(dtype), H.to(dtype), damping.to(dtype), 24, 1.0)
    wide = [factors.to(torch.float64) for factors in corrections]
    left = torch.tensor(remaining_errors(E, damped(H, damping), wide), dtype=torch.float64)
    least = least_error(E, damped(H, damping), 24)
    assert (left >= least * (1 - 1e-6)).all()
    assert (left <= least * 1.002).all()
    assert all(factors.A.dtype == dtype for factors in corrections)


def test_few_rows_of_a_wide_layer_are_exact_in_float32() -> None:
    E, H, damping = problem(1, 48, 1024)
    factors = reconstruct(E.float(), H.float(), damping.float(), 16, 1.0)[0].to(torch.float64)
    left, least = remaining_errors(E, damped(H, damping), [factors])[0], least_error(E, damped(H, damping), 16)
    assert left == pytest.approx(float(least), rel=1e-5)


def test_auto_takes_the_least_rank_that_holds_the_energy() -> None:
    E, H, damping = problem(3, 16, 24)
    sigma = torch.linalg.svdvals(E @ torch.linalg.cholesky(damped(H, damping))).square()
    for factors, of_layer in zip(reconstruct(E, H, damping, "auto", 0.8), sigma, strict=True):
        held = of_layer.cumsum(0) / of_layer.sum()
        assert held[factors.rank - 1] >= 0.8
        assert factors.rank == 1 or held[factors.rank - 2] < 0.8


def test_of_noise_auto_takes_half_of_all_directions() -> None:
    E = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H, damping = torch.eye(256, dtype=torch.float64)[None], torch.zeros(1, dtype=torch.float64)
    ranks = [reconstruct(E, H, damping, "auto", energy)[0].rank for energy in (0.9, 0.2)]
    assert 0.45 * 256 < ranks[0] < 0.55 * 256
    assert ranks[1] < 0.1 * 256


def test_auto_stops_at_the_largest_rank_that_servers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_reconstruction, "MOST_RANK", 3)
    assert reconstruct(*problem(1, 16, 24), "auto", 0.99)[0].rank == 3


def test_layers_side_by_side_are_corrected_as_alone() -> None:
    E, H, damping = problem(3, 16, 24)
    for layer, factors in enumerate(reconstruct(E, H, damping, 4, 1.0)):
        one = slice(layer, layer + 1)
        alone = reconstruct(E[one], H[one], damping[one], 4, 1.0)[0]
        assert torch.allclose(factors.B @ factors.A, alone.B @ alone.A, atol=1e-10)


def test_the_same_bytes_come_of_the_same_errors() -> None:
    E, H, damping = (tensor.float() for tensor in problem(1, 600, 64))
    torch.manual_seed(1)
    first = reconstruct(E, H, damping, 8, 1.0)[0]
    torch.manual_seed(2)
    second = reconstruct(E.clone(), H.clone(), damping, 8, 1.0)[0]
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


@pytest.mark.parametrize("rank", [4, "auto"])
def test_without_an_error_nothing_is_corrected(rank: int) -> None:
    E, H, damping = problem(1, 8, 12)
    factors = reconstruct(torch.zeros_like(E), H, damping, rank, 0.9)[0]
    assert (factors.rank, factors.A.shape, factors.B.shape) == (0, (0, 12), (8, 0))


def test_directions_without_an_error_are_left_out() -> None:
    E, H, damping = problem(1, 8, 12)
    E[0] = E[0, :2].repeat(4, 1)  # of rank 2
    factors = reconstruct(E, H, damping, 5, 1.0)[0]
    assert factors.rank == 2
    assert torch.allclose(factors.B @ factors.A, E[0], atol=1e-12)
