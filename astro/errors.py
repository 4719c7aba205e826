"""The errors this project raises.

AstroError
├── InputError             what the user gave is wrong; nothing was started (exit code 2)
│   ├── ConfigError        a value of the configuration
│   ├── CheckpointError    a file of the source checkpoint
│   └── UnsupportedError   an architecture, layer or format that cannot be handled
├── NumericalError         a Hessian that cannot be factored, a value that is not finite
└── RunError               a run that could not finish: a worker died, a disk is full

Every message says what failed, which file or tensor, what was expected, what was found and what to do next.
The classes take one message, so that they survive pickling on their way through a cluster.
"""

__all__ = [
    "AstroError",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "NumericalError",
    "RunError",
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
