"""A sample of the tokens of an input group whose inputs servers round, on which errors of outputs are measured.

x̂ is what a token's inputs x become. Shapes: T tokens, C columns, N sampled tokens.
"""

import torch

from astro.linalg.tiling import near_rows

__all__ = ["MOST_ROWS", "RoundedSample"]

_SAMPLED = 16
"""Tokens of every chunk that are kept. A few hundred say within some percent what a layer makes of all of them, and
take less memory than a matrix of columns × columns."""
MOST_ROWS = 4096
"""Largest number of rows of a sample; of more, every second one is dropped."""
_WHOLE = 1 << 50
"""What the importance of all tokens of a chunk is cut into. Times a number of tokens it still fits into 64 bits."""
_TINY = torch.finfo(torch.float32).tiny


class RoundedSample:
    """A sample of tokens before and after rounding, in which tokens are the likelier the more they weigh.

    What rounding takes from a token grows with its inputs, and few tokens have massive ones: those of even places would
    be none of these, or far too many. So a token is sampled by its share of the energy of the inputs, Σ v ‖x‖², and by
    its share of what rounding takes, Σ v ‖x − x̂‖², half by each. What a token's error counts for, v, is its weight w in
    H. Where w is a root of the energy that the loss's gradient has, v is w², that energy itself: see
    `predicted_divergence`.

    Attributes:
        rows: For each sampled token x̂ and x − x̂, one behind the other, scaled so that sums of squares over the rows are
            those of √v x̂ and √v (x − x̂) over all tokens, float32 [N, 2C].
    """

    def __init__(self, num_columns: int, device: torch.device) -> None:
        """Begin with an empty sample.

        Args:
            num_columns: Number C of columns.
            device: Device of the sample.
        """
        self.rows = torch.zeros(0, 2 * num_columns, dtype=torch.float32, device=device)

    def add_(self, X: torch.Tensor, X_rounded: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Add a sample of one chunk.

        Args:
            X: Inputs of the layer [..., C].
            X_rounded: The same, rounded.
            counts: What the error of each token counts for, v, float32 [T] and at least 0; 1 where not given.
        """
        X, X_rounded = X.reshape(-1, X.shape[-1]), X_rounded.reshape(-1, X.shape[-1])
        if counts is None:
            counts = torch.ones(len(X), device=X.device)
        if len(X) > _SAMPLED:
            chosen, counts = _sampled(X, X_rounded, counts)
            X, X_rounded = X[chosen], X_rounded[chosen]
        rounded = X_rounded.float()
        self.merge_(torch.cat([rounded, X.float() - rounded], dim=-1) * counts.sqrt().unsqueeze(-1))

    def merge_(self, rows: torch.Tensor) -> None:
        """Add a sample that was taken elsewhere.

        Args:
            rows: The `rows` of another sample, on the device of this one.
        """
        self.rows = torch.cat([self.rows, rows])
        while len(self.rows) > MOST_ROWS:
            kept = self.rows[::2]
            self.rows = kept * (len(self.rows) / len(kept)) ** 0.5


def _sampled(X: torch.Tensor, X_rounded: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose tokens, and return their places and what each of them counts for in the place of v, float32."""
    lost = torch.cat([_norms(X[rows] - X_rounded[rows]) for rows in near_rows(X)])
    shares = torch.stack([_norms(X), lost]).double().square_()  # of each token, did it count 1
    shares /= (shares @ counts.double()).clamp_(min=_TINY).unsqueeze(-1)
    share = shares.mean(0)
    # Sums of integers are the same in any order. Their sum is less than all where rounding takes nothing.
    cumulative = (share * counts * _WHOLE).long().cumsum(0)
    places = (torch.arange(_SAMPLED, device=X.device) * 2 + 1) * cumulative[-1] // (2 * _SAMPLED)
    chosen = torch.searchsorted(cumulative, places, right=True).clamp_(max=len(X) - 1)
    expected = _SAMPLED * share[chosen] * _WHOLE / cumulative[-1].clamp(min=1)  # how often each is chosen, over v
    return chosen, torch.where(expected > 0, 1 / expected, 0.0).float()


def _norms(X: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(X, dim=-1, dtype=torch.float32)
    return norms
