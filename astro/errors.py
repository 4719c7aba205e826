"""The errors this project raises.

AstroError
├── InputError             what the user gave is wrong; nothing was started (exit code 2 of the command line)
│   ├── ConfigError        a value of the configuration
│   ├── CheckpointError    a file of the source checkpoint
│   └── UnsupportedError   an architecture, layer or format that cannot be handled
├── NumericalError         a Hessian that cannot be factored, a value that is not finite
│   └── DivergedError      a training whose loss is not finite
└── RunError               a run that could not finish: a worker died
    ├── StorageError       the run directory cannot be written: a disk is full
    ├── MemoryShortage     a device or a machine had less memory than a step wanted
    └── DamagedError       a file of the run directory is missing, or not as it was written

Catch `AstroError` to catch everything that this project raises on purpose; whatever else comes out is a defect:

    try:
        summary = pipeline.quantize(config)
    except InputError as error:    # the user has to change something; nothing was started
        ...
    except AstroError as error:    # the run stopped; what it finished is kept, and the same command goes on from there
        ...

Every message says what failed, which file or tensor it was, what was expected, what was there instead and what to do
next, so that `str(error)` is all that a user needs to see. Each error takes only what its message is made of, so that
it survives pickling on its way through a cluster.
"""

from pathlib import Path

__all__ = [
    "AstroError",
    "CheckpointError",
    "ConfigError",
    "DamagedError",
    "DivergedError",
    "InputError",
    "MemoryShortage",
    "NumericalError",
    "RunError",
    "StorageError",
    "UnsupportedError",
]


class AstroError(Exception):
    """Every error that is raised on purpose is of this class."""


class InputError(AstroError):
    """The user gave something that is wrong; nothing was started."""


class ConfigError(InputError, ValueError):
    """A value of the configuration is wrong. It is a ValueError too, so that pydantic reports it under its path."""


class CheckpointError(InputError):
    """A file of a checkpoint is missing, damaged or inconsistent."""


class UnsupportedError(InputError):
    """An architecture, a layer or a file format cannot be handled."""


class NumericalError(AstroError):
    """An arithmetic step has no valid result."""


class DivergedError(NumericalError):
    """A training has no valid result any more. All of its workers come to that in the same step."""


class RunError(AstroError):
    """A run could not finish; what it finished is kept."""


class StorageError(RunError):
    """A file of the run could not be written."""


class MemoryShortage(RunError):
    """A device or a machine had less memory than a step wanted. It would be short again for the same step."""


class DamagedError(RunError):
    """A file of the run directory is missing, or not as it was written; it can be made again.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, reason: str) -> None:
        """Say which file it is and what is wrong with it.

        Args:
            path: The file.
            reason: What is wrong with the file; the message is `path: reason`.
        """
        super().__init__(path, reason)
        self.path = path

    def __str__(self) -> str:
        """Return the path and what is wrong."""
        return f"{self.path}: {self.args[1]}"
