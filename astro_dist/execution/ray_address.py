"""Whether anything answers where a Ray cluster is said to be: Ray itself would wait for it for a quarter of an hour."""

import os
import socket
import urllib.parse

from astro.errors import RunError
from astro_dist.config.schema import ExecutionConfig

__all__ = ["require_answer", "start_advice"]

_PATIENCE_S = 5.0
"""Seconds in which the cluster's head must take a connection."""
_VARIABLE, _FOLDER_VARIABLE = "RAY_ADDRESS", "RAY_TMPDIR"
_LOOPBACK = ("127.0.0.1", "localhost")


def require_answer(config: ExecutionConfig) -> None:
    """Refuse the address of a cluster where nothing takes a connection.

    Args:
        config: Section of the configuration with the cluster's address, which RAY_ADDRESS may give instead.

    Raises:
        RunError: Nothing answers there; the message says where the address comes from and what to do.
    """
    address = config.cluster_address or ""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # no number: Ray says so itself, and at once
        return
    if not host or not port:  # `auto`, `local`
        return
    reasons = [_refusal(name, port) for name in (host, *([socket.gethostname()] if host in _LOOPBACK else []))]
    if all(reasons):
        raise RunError(f"Ray cluster {address}: nothing answers there ({reasons[0]}); {_advice(address)}")


def start_advice(address: str | None, error: Exception) -> str:
    """Say what to do about a cluster that cannot be reached or started; empty where there is nothing to say.

    Args:
        address: Address of the cluster; None for a private one on this machine.
        error: Error that Ray raised.
    """
    if address is not None:
        return f"; {_advice(address)}"
    folder = os.environ.get(_FOLDER_VARIABLE)
    if folder and "AF_UNIX" in str(error):
        return (
            f"; {_FOLDER_VARIABLE} {folder} is too long for the sockets that Ray makes there: unset it, or shorten it"
        )
    return ""


def _refusal(host: str, port: int) -> str | None:
    """Say why no connection can be made; None where one can."""
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except OSError as error:
        return str(error)
    return None


def _advice(address: str) -> str:
    if os.environ.get(_VARIABLE) == address:
        return (
            f"the address is in the environment, perhaps left over from a cluster that is gone: unset {_VARIABLE} to "
            "run on this machine alone, or start the cluster"
        )
    return "correct execution.ray_address, or start the cluster"
