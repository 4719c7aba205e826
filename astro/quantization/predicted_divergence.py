"""What the error of a layer is predicted to cost: nats of KL divergence a token, which add up over layers.

Let z be the outputs of a layer for all tokens of a text, and δ their change once the layer is quantized. Where δ is
small, the divergence of the model's predictions from the source's is, summed over the text,

    KL ≈ ½ δᵀ F δ,   F = E[g gᵀ],   g = ∂ℓ/∂z

ℓ is the summed cross-entropy and F the Fisher information of the model's predictions at z; the first-order term is 0,
because no prediction diverges less from the source's than its own. Three steps make this what a run has at hand:

    E[g gᵀ] ≈ diag(g²)                   the text's own next tokens, and errors that do not add up coherently
    Σ_r g_tr² δ_tr² ≈ e_t ‖δ_t‖²         e_t = mean over r of g_tr²: errors favour no output for its gradient
    mean of e_t ‖δ_t‖² ≈ ē tr(ΔW H ΔWᵀ)  ē = mean of e_t: beyond its weight w_t, H says nothing about a token

With the layer error ‖ΔW X‖² = tr(ΔW H ΔWᵀ) under the weighted H this is, a token,

    nats = ½ ē ‖ΔW X‖²

Errors of different layers are as good as independent, so that their nats add up. The prediction is worth most for
comparing layers and widths; large errors, as at 2 bits, leave the range where a square tells the divergence.
An expert has an ē of its own. It is the mean over all tokens, those that do not go to the expert counting with 0.

Source: the diagonal of the Fisher information, GuidedQuant, arXiv 2505.07004. Shapes: T tokens t, R outputs r.
"""

__all__ = ["predicted_divergence"]


def predicted_divergence(gradient_energy: float, error: float) -> float:
    """Return the KL divergence that a layer error is predicted to cause, in nats a token.

    Args:
        gradient_energy: Mean of the squared gradient of the summed loss over all tokens and over the layer's outputs.
        error: Layer error ‖ΔW X‖², the weighted mean over tokens of the squared change of the outputs, summed over
            these.
    """
    return 0.5 * gradient_energy * error
