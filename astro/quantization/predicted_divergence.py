"""What the error of a layer is predicted to cost: nats of KL divergence a token, which add up over layers.

Let z be the outputs of a layer for all tokens of a text, and δ their change once the layer is quantized. Where δ is
small, the divergence of the model's predictions from the source's is, summed over the text,

    KL ≈ ½ δᵀ F δ,   F = E[g gᵀ],   g = ∂ℓ/∂z

ℓ is the summed cross-entropy and F the Fisher information of the model's predictions at z; there is no term of first
order, because no prediction diverges less from the source's than its own. Three steps make this what a run has at hand:

    E[g gᵀ] ≈ diag(g²)                the text's own next tokens, and errors that do not add up coherently
    Σ_r g_tr² δ_tr² ≈ e_t ‖δ_t‖²      e_t = mean over r of g_tr²: errors favour no output for its gradient
    mean of √e_t · (√e_t ‖δ_t‖²) ≈ (mean of √e_t) · (mean of √e_t ‖δ_t‖²)

The last mean is that of the weights w_t = √e_t / (mean of √e_t) that the tokens have in H. With the layer error
‖ΔW X‖² = tr(ΔW H ΔWᵀ), which is their weighted mean of ‖δ_t‖², this is, a token,

    nats = ½ ē ‖ΔW X‖²,   ē = (mean of √e_t)²

Errors of different layers are taken to be independent, so that their nats add up. With the mean of e_t instead, which a
few tokens own, the order of layers is predicted worse. The prediction is for comparing layers and widths: it is right
within a factor of about five, and mostly too low. An expert has an ē of its own, in which the tokens count that go to
it: theirs is the mean of √e_t, and ē is less by their share of all tokens.

Where inputs are rounded the third step would not hold: a token's error grows with its inputs, and tokens with massive
inputs are those for which e_t is least. There the layer error is measured on a sample of tokens, each of which counts
with w_t² in the place of w_t, see `RoundedSample`, and no step is needed: the mean of e_t ‖δ_t‖² is ē times the mean of
w_t² ‖δ_t‖². Were w_t taken there too, 4-bit weights and 8-bit inputs of a 135M model would be predicted to cost ten
times what they do.

Source: the diagonal of the Fisher information, GuidedQuant, arXiv 2505.07004. Shapes: T tokens t, R outputs r.
"""

__all__ = ["predicted_divergence"]


def predicted_divergence(gradient_energy: float, error: float) -> float:
    """Return the KL divergence that a layer error is predicted to cause, in nats a token.

    Args:
        gradient_energy: Energy ē of the gradient of the summed loss at the layer's outputs.
        error: Layer error ‖ΔW X‖², the weighted mean over tokens of the squared change of the outputs, summed over
            these.
    """
    return 0.5 * gradient_energy * error
