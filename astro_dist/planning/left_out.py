"""What the user should know of experts that the result does not have, or not packed."""

from collections.abc import Iterator, Sequence

from astro.model.skeleton import Skeleton

__all__ = ["exact_expert_notes", "zero_expert_notes"]


def zero_expert_notes(skeleton: Skeleton, left_out: Sequence[str]) -> Iterator[str]:
    """Say what is left out of the result, and who cannot read it.

    Args:
        skeleton: The model on the meta device.
        left_out: Names of the checkpoint tensors that belong to zero experts.
    """
    if skeleton.has_zero_experts:
        yield (
            "experts that pass their input on have no weights in files that servers read; transformers 5 asks for "
            "gate and up projections of them too, so that it reads neither such files nor the result: serve it with "
            "vLLM"
        )
    if left_out:
        yield (
            f"{len(left_out)} tensors of experts that pass their input on, which no model reads, are left out of the "
            f"result, the first is {left_out[0]}"
        )


def exact_expert_notes(matrices: Sequence[str]) -> Iterator[str]:
    """Say which experts stay in 16 bits because nothing reads them packed.

    DBRX holds the rows of all experts of a block in matrices that belong to no linear layer. Whatever packed tensors of
    them were called, vLLM 0.32 would not fill its parameters: of those that are no weights, its loader of DBRX keeps
    the last alone, or none.

    Args:
        matrices: Model's names of the matrices in blocks that are not quantized.
    """
    joined = [name for name in matrices if ".experts." in name and not name.endswith(".weight")]
    if joined:
        yield (
            f"the experts stay in 16 bits: {len(joined)} matrices hold those of a block together, the first is "
            f"{joined[0]}, and nothing reads them packed: vLLM's loader takes them as weights alone, and transformers "
            "has no linear layers for them"
        )
