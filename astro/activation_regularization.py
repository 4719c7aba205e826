"""Training that leaves no outlier channels in activations: rounded inputs with learned clips, and kurtosis of outputs.

Source: Nrusimha et al., arXiv 2404.03605. A layer's inputs are rounded while it is trained, so that the layer before
learns to make inputs that a few bits hold. Alone, that moves the difficulty into the weights; so the kurtosis of a
layer's outputs is added to the loss. Weights are trained as they are, and quantized afterwards.

Both are hooks on the linear layers of a model. Its class, its parameters and their names stay what they were.

Shapes: T tokens, C columns (inputs of a layer), R rows (outputs), L regularized layers. Equations (1) to (5), of the
rounding, are in `model.clipped_rounding`; two more are numbered here:

(6) K(y) = 1/R Σ_r ((y_r − μ) / (σ + ε))⁴, μ and σ the mean and the standard deviation of the R features of a token
(7) loss = mean over predicted tokens of the cross-entropy + λ · mean over all tokens of Σ_layers K(y)

The first token of a sequence is not predicted, but its outputs count. The paper sums K over tokens, and does not say
how it takes the cross-entropy. Here both are means, so that neither workers nor the sizes of batches and sequences
change the objective. A sum of K beside a mean of the cross-entropy, with the published λ of 1e-5 and 2048 tokens,
ruined a small model (tests/bench/README.md).
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from astro.errors import ConfigError, NumericalError
from astro.linalg import compiled
from astro.model.clipped_rounding import round_clipped
from astro.model.clips_file import write_clips
from astro.model.exact_layers import is_held_exact
from astro.model.experts import expert_owners, is_gate, num_experts
from astro.model.model_class import find_blocks
from astro.model.residual_writers import residual_writers
from astro.training_config import ActivationRegularization

__all__ = ["ActivationRegularizer", "kurtosis_sum", "regularized_layers", "rehearse"]

_EPSILON = 1e-8
"""ε of (6): small beside the standard deviation of any output. The paper does not tell its value."""


def kurtosis_sum(y: torch.Tensor) -> torch.Tensor:
    """Add up the kurtosis of each token, equation (6).

    Args:
        y: Outputs of a layer [..., R].

    Returns:
        The sum over all tokens, float32 (float64 of such outputs), without dimensions.
    """
    total: torch.Tensor = _KurtosisSum.apply(y)  # type: ignore[no-untyped-call]
    return total


def rehearse(settings: ActivationRegularization, dtype: torch.dtype, device: torch.device) -> None:
    """Regularize the input and the output of one layer forward and backward, so that what is compiled is compiled.

    Args:
        settings: What is done to layers.
        dtype: Dtype of inputs and outputs.
        device: Device of the training.
    """
    # The sizes are like those of a model, because a compiler vectorizes for the sizes that it meets first.
    x = torch.linspace(-5, 5, 2 * 64 * 1024, device=device).view(2, 64, 1024).to(dtype).requires_grad_()
    if settings.input_bits is not None:
        clips = torch.tensor([-settings.clip, settings.clip], device=device, requires_grad=True)
        round_clipped(x, clips, settings.input_bits).square().sum().backward()  # a gradient of full strides
    if settings.kurtosis:
        (1e-5 * torch.stack([kurtosis_sum(x)]).sum()).backward()


class ActivationRegularizer:
    """Regularizes the linear layers of a model while it is trained, from construction until `detach`.

    Attributes:
        settings: What is done to the layers.
        names: Names of the regularized layers in the model's order.
        output_names: Names of those whose outputs count.
        left_out: Names of the parameters that hold the experts of a block together. They are no linear layers, so
            nothing is done to them.
        clips: Learned clips, c⁻ and c⁺ of each layer, float32 [L, 2]; no parameter of the model. It asks for a gradient
            only where inputs are rounded.
    """

    def __init__(self, model: nn.Module, settings: ActivationRegularization, device: torch.device) -> None:
        """Find the layers and put hooks on them.

        Args:
            model: A causal language model of transformers, which can be run.
            settings: What is done to the layers.
            device: Device of the clips: the one on which the model will be trained.

        Raises:
            ConfigError: A pattern matches no linear layer of the blocks.
            UnsupportedError: The blocks of the model cannot be found.
        """
        self.settings = settings
        chosen, self.left_out = regularized_layers(model, settings.layers)
        self.names = tuple(chosen)
        self.output_names: tuple[str, ...] = ()
        if settings.kurtosis:
            writers = residual_writers(model) if settings.outputs == "residual" else set(chosen)
            self.output_names = tuple(name for name in chosen if name in writers)
            if not self.output_names:
                raise ConfigError(
                    "regularization.outputs: residual, but none of the chosen layers writes to the residual stream; "
                    "add some to regularization.layers, such as '*.down_proj', or take outputs: all"
                )
        start = torch.tensor([[-settings.clip, settings.clip]], device=device).repeat(len(chosen), 1)
        self.clips = nn.Parameter(start, requires_grad=settings.input_bits is not None)
        self._collected: list[torch.Tensor] = []
        self._hooks = []
        for index, (name, layer) in enumerate(chosen.items()):
            if settings.input_bits is not None:
                self._hooks.append(layer.register_forward_pre_hook(self._rounding(index, settings.input_bits)))
            if name in self.output_names:
                self._hooks.append(layer.register_forward_hook(self._collect))

    def penalty(self, num_tokens: int) -> torch.Tensor:
        """Return what the forwards since the last call add to the loss, the second part of equation (7).

        Args:
            num_tokens: Number of tokens that these forwards saw.
        """
        collected, self._collected = self._collected, []
        if not collected:
            return torch.zeros((), device=self.clips.device)
        return self.settings.kurtosis / num_tokens * torch.stack(collected).sum()

    def parameter_group(self) -> dict[str, Any]:
        """Return the clips as a group of AdamW: its rate, but neither momentum (β₁ = 0) nor decay."""
        return {"params": [self.clips], "betas": (0.0, 0.999), "weight_decay": 0.0}

    def require_open(self) -> None:
        """Refuse clips that have met.

        Raises:
            NumericalError: c⁻ is not below c⁺ in some layer, or a clip is not finite.
        """
        low, high = self.clips.detach().cpu().unbind(1)
        for name, below, above in zip(self.names, low.tolist(), high.tolist(), strict=True):
            if not below < above or not abs(above) + abs(below) < float("inf"):
                raise NumericalError(
                    f"{name}: its learned clips are {below:g} and {above:g}, expected the first below the second"
                )

    def detach(self) -> None:
        """Take all hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def save(self, path: Path) -> None:
        """Write the clips, and the width that they were learned for.

        Args:
            path: Path of the file, see `clips_file.CLIPS_FILE`.

        Raises:
            StorageError: The file cannot be written.
        """
        bits = self.settings.input_bits
        assert bits is not None, "clips are only learned where inputs are rounded"
        write_clips(path, dict(zip(self.names, self.clips.detach(), strict=True)), bits)

    def _rounding(self, index: int, bits: int) -> Callable[..., tuple[Any, ...]]:
        """Return the hook that rounds the inputs of one layer."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (round_clipped(args[0], self.clips[index], bits), *args[1:])

        return hook

    def _collect(self, _: nn.Module, __: tuple[Any, ...], y: torch.Tensor) -> None:
        if torch.is_grad_enabled():  # who only evaluates asks for no penalty
            self._collected.append(kurtosis_sum(y))


def regularized_layers(model: nn.Module, patterns: Sequence[str]) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Find the linear layers of a model's blocks that patterns match. Gates never are among them.

    Args:
        model: A causal language model of transformers, which may be on the meta device.
        patterns: Shell patterns for names of layers.

    Returns:
        The layers by name, and the names of the parameters that hold the experts of a block together.

    Raises:
        ConfigError: A pattern matches none.
        UnsupportedError: The blocks of the model cannot be found.
    """
    layers, joined = _linear_layers(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            known = f", whose names are like {next(reversed(layers))}" if layers else ""
            raise ConfigError(
                f"regularization.layers: {pattern!r} matches no linear layer of the blocks{known}; take a shell "
                "pattern that does, such as '*.down_proj', or '*' for all"
            )
    return {n: m for n, m in layers.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}, joined


def _linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Return the linear layers of all blocks by name, without gates, and the parameters that hold experts together."""
    layers: dict[str, nn.Module] = {}
    joined: list[str] = []
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        block_name = f"{prefix}.{index}"
        experts, owners = num_experts(block), expert_owners(block, block_name)
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, nn.Linear):
                parent = model.get_submodule(name.rpartition(".")[0])
                if not is_held_exact(name, parent) and not is_gate(name, module, experts, owners):
                    layers[name] = module
            elif isinstance(module, Conv1D):
                layers[name] = module
            else:
                named = module.named_parameters(recurse=False)
                joined += [f"{name}.{key}" for key, value in named if value.ndim == 3 and len(value) == experts]
    return layers, tuple(joined)


class _KurtosisSum(torch.autograd.Function):
    """Equation (6). It keeps y alone."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y)
        ctx.gradient_of = compiled.carried(_kurtosis_gradient)
        return _kurtosis(y.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (y,) = (X.detach() for X in ctx.saved_tensors)
        (gradient,) = gradients
        whole: torch.Tensor = ctx.gradient_of(y, gradient)
        return whole


@compiled.fused
def _kurtosis(y: torch.Tensor) -> torch.Tensor:
    """Return the sum of equation (6) over all tokens."""
    a, deviation = _centered(y)
    return (a / (deviation + _EPSILON)).square().square().mean(-1).sum()


@compiled.fused
def _kurtosis_gradient(y: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of that sum for y, times the one that is given [], in the dtype of y."""
    a, deviation = _centered(y)
    S = deviation + _EPSILON
    z = a / S
    squares = z.square()
    cubes, moment = squares * z, squares.square().mean(-1, keepdim=True)
    # ∂K/∂y_r = 4/(R S) [z_r³ − mean z³ − mean z⁴ · a_r / σ], because ∂σ/∂y_r = a_r / (R σ). A token whose
    # outputs are all equal has a = 0 and the gradient 0.
    bracket = cubes - cubes.mean(-1, keepdim=True) - moment * a / deviation.where(deviation > 0, 1)
    return (gradient * 4 / y.shape[-1] * bracket / S).to(y.dtype)


def _centered(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y − μ and σ [..., 1], in float32 at least."""
    exact = y.to(torch.promote_types(y.dtype, torch.float32))
    centered = exact - exact.mean(-1, keepdim=True)
    return centered, centered.square().mean(-1, keepdim=True).sqrt()
