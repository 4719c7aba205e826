"""The errors this project raises.

AstroError
├── InputError             what the user gave is wrong; nothing was started (exit code 2)
│   ├── ConfigError        a value of the configuration
│   ├── CheckpointError    a file of the source checkpoint
│   └── UnsupportedError   an architecture, layer or format that cannot be handled
├── NumericalError         a Hessian that cannot be factored, a value that is not finite
└── RunError               a run that could not finish: a worker died
    ├── StorageError       the run directory cannot be written: a disk is full
    └── DamagedError       a file of the run directory is missing, or not as it was written

Every message says what failed, which file or tensor, what was expected, what was found and what to do next.
The classes take only what they are shown with, so that they survive pickling on their way through a cluster.
"""

from pathlib import Path

__all__ = [
    "AstroError",
    "CheckpointError",
    "ConfigError",
    "DamagedError",
    "InputError",
    "NumericalError",
    "RunError",
    "StorageError",
    "UnsupportedError",
]


class AstroError(Exception):
    """Base of every error raised on purpose."""


class InputError(AstroError):
    """What the user gave is wrong."""


class ConfigError(InputError, ValueError):
    """A value of the configuration is wrong. A ValueError too, so that pydantic reports it under its path."""


class CheckpointError(InputError):
    """A file of a checkpoint is missing, damaged or inconsistent."""


class UnsupportedError(InputError):
    """An architecture, a layer or a file format that cannot be handled."""


class NumericalError(AstroError):
    """An arithmetic step has no valid result."""


class RunError(AstroError):
    """A run could not finish; what it finished is kept."""


class StorageError(RunError):
    """A file of the run could not be written."""


class DamagedError(RunError):
    """A file of the run directory is missing, or not as it was written; it can be made again.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.args[1]}"
