"""What a call does, counted apart from any device."""

import dataclasses

from astro_dist.planning.devices import Device

__all__ = ["Work"]


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations and bytes of a call. A product of [m, k] and [k, n] counts 2 m k n operations.

    Attributes:
        compute: Operations in the compute dtype: forward passes, and on a GPU statistics.
        rounded: Operations on factors that are rounded to bfloat16 where that is faster: regularization and refinement.
        exact: Operations in float32: all else of the solve, and on a CPU statistics.
        elements: Number of elements that elementwise operations go through: proximal map, candidates of scales.
        steps: Number of small operations that wait for each other: columns of GPTQ and refinement.
        moved_bytes: Bytes that are read from and written to the shared folder.
        behind_bytes: Those of them that are moved while the device computes.
    """

    compute: float = 0.0
    rounded: float = 0.0
    exact: float = 0.0
    elements: float = 0.0
    steps: float = 0.0
    moved_bytes: float = 0.0
    behind_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        counts = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(a + b for a, b in counts))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * count for count in dataclasses.astuple(self)))

    def seconds(self, device: Device, half: bool) -> float:
        """Return the time that the work takes on a device.

        What is moved while the device computes takes no time of its own where computing takes longer, and all of the
        time where it does not.

        Args:
            device: The device.
            half: Whether forward passes run in 16 bits.
        """
        rate = device.bfloat16 if half else device.float32
        computing = (
            self.compute / rate + self.rounded / max(device.bfloat16, device.float32) + self.exact / device.float32
            + self.elements / device.elements + self.steps * device.step_s
        )  # fmt: skip
        behind, alone = self.behind_bytes, self.moved_bytes - self.behind_bytes
        return max(computing, behind / device.storage) + alone / device.storage
