"""Which linear layers write to the residual stream: their outputs reach the block's output through no other layer.

Nothing about architectures is written here. The model runs once with every linear layer's output cut off from what it
was computed from; a layer whose cut output still leads to the output of its block writes to the stream, whether it is
added as it is or through a norm. Outputs of another width, such as those of routers, are weights and no addends.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from astro.model.block_call import mapped
from astro.model.model_class import find_blocks

__all__ = ["residual_writers"]

_TOKENS = 4


def residual_writers(model: Any) -> set[str]:
    """Return the names of the linear layers inside blocks that write to the residual stream.

    Args:
        model: A causal language model of transformers, which can be run. It runs once, on a few tokens.
    """
    leaves: dict[str, torch.Tensor] = {}
    outputs: list[torch.Tensor] = []
    hooks = []
    prefix, blocks = find_blocks(model)

    def cut_layer(name: str) -> Any:
        def hook(_: nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
            leaves[name] = y.detach().requires_grad_()
            return leaves[name].clone()  # some models add to it in place

        return hook

    def cut_block(_: nn.Module, __: Any, output: Any) -> Any:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        return mapped(output, lambda value: value.detach() if isinstance(value, torch.Tensor) else value)

    for index, block in enumerate(blocks):
        for name, module in block.named_modules(prefix=f"{prefix}.{index}"):
            if isinstance(module, nn.Linear | Conv1D):
                hooks.append(module.register_forward_hook(cut_layer(name)))
        hooks.append(block.register_forward_hook(cut_block))
    device = model.get_input_embeddings().weight.device
    try:
        with torch.enable_grad():
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(
        [hidden.sum() for hidden in outputs if hidden.requires_grad], list(leaves.values()), allow_unused=True
    )
    width = outputs[0].shape[-1]
    return {
        name
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        if gradient is not None and leaf.shape[-1] == width
    }
