"""A worker that measures shares of a text, and the calls that it takes."""

import dataclasses
import platform
import time
from collections.abc import Generator
from typing import Any

import torch

from astro.errors import RunError
from astro.process import configure_process, peak_rss_bytes
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.text_share import Measured, pass_share
from astro_dist.source.resolve import Source, fetch_side_files
from astro_dist.worker.device_check import require_gpu, within_memory

__all__ = ["BeginShare", "GoOn", "MeasuringSpec", "MeasuringWorker", "SharedModel"]

_CALL_S = 1.0
"""Seconds after which a call returns, so that whoever waits sees how far the share is."""


@dataclasses.dataclass(frozen=True)
class SharedModel:
    """A model that every machine must see in the same way.

    Attributes:
        source: Where its files are.
        fingerprint: Fingerprint of its files, 64 hexadecimal digits.
    """

    source: Source
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class MeasuringSpec:
    """Everything that a worker has to know.

    Attributes:
        model: The model.
        against: Model to compare with; None for none.
        settings: Device, dtype and memory of each worker.
        threads: Number of CPU threads of each worker.
    """

    model: SharedModel
    against: SharedModel | None
    settings: JudgeSettings
    threads: int


@dataclasses.dataclass(frozen=True)
class BeginShare:
    """Begin to measure a share. The call returns what `GoOn` returns.

    Attributes:
        batches: Tokens, each int64 [B, T].
        num_leading: Number of tokens in front of every sequence that are no text.
    """

    batches: tuple[torch.Tensor, ...]
    num_leading: int


@dataclasses.dataclass(frozen=True)
class GoOn:
    """Go on with the share that was begun. The call returns the part that is done, or `Measured` at the end."""


class MeasuringWorker:
    """Measures one share after the other."""

    def __init__(self, spec: MeasuringSpec) -> None:
        """Take the specification; nothing is opened yet.

        Args:
            spec: What the worker has to know.
        """
        self._spec = spec
        self._steps: Generator[float, None, Measured] | None = None

    def is_up(self) -> bool:
        """Tell that the process of this worker is up."""
        return True

    def prepare(self, warms_up: bool = False) -> None:
        """Open the models.

        Args:
            warms_up: Not used, for there is nothing to compile.

        Raises:
            InputError: A model cannot be read on this machine.
            RunError: This machine has no GPU that torch can use, or sees another model than the command does.
        """
        spec = self._spec
        configure_process(spec.threads)
        if spec.settings.device == "cuda":
            require_gpu("--device")
        self._model = _opened(spec.model, spec.settings)
        self._against = _opened(spec.against, spec.settings) if spec.against else None

    def do(self, call: BeginShare | GoOn) -> Measured | float:
        """Measure for about a second.

        Args:
            call: What to do.

        Raises:
            RunError: No share was begun on this worker, which was restarted in between.
            MemoryShortage: There was too little memory.
        """
        if isinstance(call, BeginShare):
            self._steps = pass_share(self._model, self._against, call.batches, call.num_leading)
        if self._steps is None:
            raise RunError(f"{platform.node()}: no share was begun on this worker; it was restarted in between")
        return within_memory(self._go_on, self._model.device)

    def describe(self) -> dict[str, Any]:
        """Return where this worker runs and the most memory that it ever used, as JSON types."""
        return {"host": platform.node(), "peak_rss_bytes": peak_rss_bytes()}

    def _go_on(self) -> Measured | float:
        assert self._steps is not None
        done, end = 0.0, time.monotonic() + _CALL_S
        try:
            while time.monotonic() < end:
                done = next(self._steps)
        except StopIteration as finished:
            self._steps = None
            measured: Measured = finished.value
            return dataclasses.replace(measured, peak_rss_bytes=peak_rss_bytes())
        return done


def _opened(model: SharedModel, settings: JudgeSettings) -> StreamedModel:
    fetch_side_files(model.source)
    opened = StreamedModel(model.source, settings)
    if opened.fingerprint != model.fingerprint:
        raise RunError(f"{platform.node()}: {opened.name} is not the model that the command sees under this path")
    return opened
