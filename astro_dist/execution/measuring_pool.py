"""The workers of a Ray cluster measure a text: each takes a share of its windows through the blocks of the model."""

import dataclasses
import itertools
import logging
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

import torch

from astro.errors import AstroError, RunError
from astro_dist.config.execution import ExecutionConfig
from astro_dist.console import waiting_for
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.measuring_worker import BeginShare, GoOn, MeasuringSpec, MeasuringWorker, SharedModel
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.text_share import Measured
from astro_dist.execution.executor import Event, Failed, Returned
from astro_dist.execution.failure import is_defect
from astro_dist.execution.ray_executor import RayExecutor
from astro_dist.source.long_wait import LongWait
from astro_dist.wording import counted

__all__ = ["MeasuringPool", "cut_shares"]

_log = logging.getLogger("astro_dist")

_TICK_S = 1.0
_MOST_FAILURES = 3
"""Number of times that the same share may fail before the measurement fails."""


class MeasuringPool:
    """Workers that measure a text. They are started when it is known what they measure, and ended with the pool.

    Their number changes no bit of the figures: a worker without a GPU computes with one thread, and batches are cut and
    summed up in the same order whoever measures them.
    """

    def __init__(self, workers: int | Literal["auto"], device: str) -> None:
        """Prepare to start; nothing is started.

        Args:
            workers: Number of workers; `auto` as in the configuration of a run.
            device: Kind of device of the workers; `auto` as in the configuration of a run.
        """
        self._config = ExecutionConfig.model_validate({"workers": workers, "device": device})
        self._executor: RayExecutor | None = None
        self._settings: JudgeSettings | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.close()

    def settle(self, settings: JudgeSettings) -> JudgeSettings:
        """Connect to the cluster, or start one on this machine, and say on which kind of device its workers compute.

        Args:
            settings: Settings as they were asked for.

        Returns:
            The settings of each worker.

        Raises:
            RunError: There is no cluster, or it has no room for a worker.
            ConfigError: GPUs are asked for, but there is none.
        """
        with waiting_for("starting workers"):
            self._executor = RayExecutor(self._config)
        self._settings = dataclasses.replace(settings, device="cuda" if self._executor.has_gpus else "cpu")
        return self._settings

    def measure(
        self,
        model: StreamedModel,
        against: StreamedModel | None,
        batches: Sequence[torch.Tensor],
        num_leading: int,
    ) -> Measured:
        """Measure a text.

        Args:
            model: The model; only its headers are read here.
            against: Model with the same tokens to compare with; None for none.
            batches: Tokens, each int64 [B, T].
            num_leading: Number of tokens in front of every sequence that are no text.

        Returns:
            The figures of all sequences in their order.

        Raises:
            AstroError: A share cannot be measured, or no worker can start.
        """
        executor, settings = self._executor, self._settings
        assert executor is not None, "the pool is not started yet"
        assert settings is not None
        waves = len(model.waves(batches, copies=2 if against else 1))
        shares = cut_shares(batches, executor.num_workers, waves)
        spec = MeasuringSpec(_shared(model), _shared(against) if against else None, settings, executor.threads)
        executor.start(spec, MeasuringWorker)
        wait = LongWait(
            f"{model.name}: measured by {counted(executor.num_workers, 'worker')}", 100.0, "% of the text's way"
        )
        return _join(_Shares(executor, [BeginShare(tuple(share), num_leading) for share in shares], wait).measure())


def cut_shares(batches: Sequence[torch.Tensor], workers: int, waves: int) -> list[Sequence[torch.Tensor]]:
    """Cut batches into as many shares for every worker, none larger than a wave.

    Args:
        batches: Tokens, each int64 [B, T].
        workers: Number of workers.
        waves: Number of waves that one worker would need for all batches.
    """
    rounds = -(-waves // workers)
    number = min(rounds * workers, len(batches))
    bounds = [len(batches) * share // number for share in range(number + 1)]
    return [batches[begin:end] for begin, end in itertools.pairwise(bounds)]


class _Shares:
    """Hands out shares until all of them are measured. The share of a worker that is lost is measured by another."""

    def __init__(self, executor: RayExecutor, shares: Sequence[BeginShare], wait: LongWait) -> None:
        self._executor, self._shares, self._wait = executor, shares, wait
        self._waiting = deque(range(len(shares)))
        self._at: dict[int, int] = {}
        self._done: dict[int, float] = {}
        self._measured: dict[int, Measured] = {}
        self._failures: Counter[int] = Counter()

    def measure(self) -> list[Measured]:
        """Measure all shares, and return their figures in order."""
        while len(self._measured) < len(self._shares):
            for worker in self._executor.idle():
                self._hand_out(worker)
            event = self._executor.wait(_TICK_S)
            if event is not None:
                self._take(event)
            self._wait.reached(100.0 * sum(self._done.values()) / len(self._shares))
        return [self._measured[share] for share in range(len(self._shares))]

    def _hand_out(self, worker: int) -> None:
        if worker in self._at:
            self._executor.submit(worker, GoOn())
        elif self._waiting:
            share = self._at[worker] = self._waiting.popleft()
            self._executor.submit(worker, self._shares[share])

    def _take(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._judge(event)
        elif isinstance(event, Returned):
            share = self._at[event.worker]
            if isinstance(event.result, Measured):
                self._measured[share], self._done[share] = event.result, 1.0
                del self._at[event.worker]
            elif isinstance(event.result, float):
                self._done[share] = event.result

    def _judge(self, event: Failed) -> None:
        """Give the share of a worker that is gone to another, as often as makes sense.

        Raises:
            AstroError: Trying again cannot help, or did not.
        """
        share, error = self._at.pop(event.worker, None), event.error
        place = "its start" if share is None else f"share {share + 1} of {len(self._shares)}"
        _log.warning("worker %d, %s: %s", event.worker, place, error)
        is_last = share is None and not self._at and not self._executor.idle()
        if share is not None:
            self._waiting.appendleft(share)
            self._done.pop(share, None)
            self._failures[share] += 1
        if not event.lost and isinstance(error, AstroError):
            raise error
        if is_last or is_defect(error) or (share is not None and self._failures[share] > _MOST_FAILURES):
            raise RunError(
                f"the text cannot be measured: worker {event.worker}, {place}: {type(error).__name__}: {error}; "
                "nothing of it is kept, run the same command to try again"
            ) from error


def _join(parts: Sequence[Measured]) -> Measured:
    return Measured(
        sequences=tuple(figures for part in parts for figures in part.sequences),
        against=tuple(figures for part in parts for figures in part.against),
        num_readings=sum(part.num_readings for part in parts),
        peak_rss_bytes=max(part.peak_rss_bytes for part in parts),
    )


def _shared(model: StreamedModel) -> SharedModel:
    return SharedModel(model.source, model.fingerprint)
