"""Where and how a model is judged: device, dtype and memory."""

import dataclasses

import torch

from astro.errors import ConfigError
from astro_dist.worker.device_check import takes_gpu

__all__ = ["JudgeSettings"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEVICES = ("auto", "cpu", "cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Settings under which models are judged.

    Attributes:
        device: Device of forward passes: "cpu", "cuda", or "auto" for a GPU where there is one.
        dtype: Dtype of forward passes, or "auto" for that of the model.
        hidden_gb: Memory for hidden states that wait between blocks, in GB, of each process that measures.
        trust_remote_code: Whether code that the model ships may run.
    """

    device: str = "auto"
    dtype: str = "auto"
    hidden_gb: float = 4.0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is not known.
        """
        if self.device not in _DEVICES:
            raise ConfigError(f"--device {self.device}: expected one of {', '.join(_DEVICES)}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: expected one of {', '.join(_DTYPES)}")
        if not self.hidden_gb > 0:
            raise ConfigError(f"--hidden-gb {self.hidden_gb}: expected more than 0")

    def require_device(self) -> None:
        """Refuse a GPU that this process cannot use, and one that is asked for and not there.

        Raises:
            ConfigError: So it is; the message says what to install.
        """
        takes_gpu(self.device, "--device")

    @property
    def torch_device(self) -> torch.device:
        """The device itself."""
        is_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if is_gpu else "cpu")

    @property
    def hidden_bytes(self) -> float:
        """Memory for hidden states, in bytes."""
        return self.hidden_gb * 1e9

    @property
    def batch_tokens(self) -> int:
        """Number of tokens that pass through a block together: enough for a GPU, few for a CPU's memory."""
        return 16384 if self.torch_device.type == "cuda" else 2048

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype of forward passes.

        Args:
            stored: Dtype of the weights.
        """
        if self.dtype != "auto":
            dtype: torch.dtype = getattr(torch, self.dtype)
            return dtype
        # As in a run: CPUs have no float16 arithmetic worth the name.
        return torch.float32 if stored == torch.float16 and self.torch_device.type == "cpu" else stored
