"""What the user should know of a model's zero experts, whose tensors the result does not have."""

from collections.abc import Iterator, Sequence

from astro.model.skeleton import Skeleton

__all__ = ["zero_expert_notes"]


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
