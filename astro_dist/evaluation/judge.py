"""The judgement of a model: its perplexity on a text, its scores in tasks, or both."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from astro.errors import ConfigError
from astro.process import configure_process, peak_rss_bytes
from astro_dist.config.schema import TextSource
from astro_dist.evaluation.calibrated_text import calibration_note
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.tasks import TaskScore, require_harness, run_tasks, tasks_of
from astro_dist.evaluation.text_loss import TextLoss, measure_text
from astro_dist.evaluation.text_share import Measured, measure_here
from astro_dist.evaluation.text_windows import WindowCut, cut_windows
from astro_dist.export.named_model import find_model
from astro_dist.source.whole_text import read_rows, require_place

__all__ = ["JudgeRequest", "Judgement", "Pool", "judge"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """What shall be found out about a model.

    Attributes:
        text: Text to measure the perplexity on, and its column; None for none.
        window: Number of tokens of a window.
        leads_each: Whether the tokenizer's first tokens stand in front of every window, and not once.
        tasks: Names of tasks, see `tasks_of`; None for none.
        include: Folder with more tasks; None for none.
        limit: Largest number of windows, and of questions of each task; None for all.
        against: Model to compare the predictions on the text with; None for none.
    """

    text: TextSource | None = None
    window: int = 2048
    leads_each: bool = False
    tasks: str | None = None
    include: Path | None = None
    limit: int | None = None
    against: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was found out about a model.

    Attributes:
        model: Folder or repository of the model.
        text: What it predicts of the text; None where there was no text.
        tasks: Its scores in tasks.
        dtype: Dtype of the forward passes, such as "torch.float32".
        device: Kind of the device, "cpu" or "cuda".
        peak_rss_bytes: Largest resident memory of a process that judged, files that it mapped included, in bytes.
        notes: Sentences for the user on what the figures are worth.
    """

    model: str
    text: TextLoss | None
    tasks: Sequence[TaskScore]
    dtype: str
    device: str
    peak_rss_bytes: int
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the judgement as a JSON object."""
        return dataclasses.asdict(self)


class Pool(Protocol):
    """Workers that measure a text instead of this process."""

    def settle(self, settings: JudgeSettings) -> JudgeSettings:
        """Start, and return the settings of each worker."""

    def measure(
        self,
        model: StreamedModel,
        against: StreamedModel | None,
        batches: Sequence[torch.Tensor],
        num_leading: int,
    ) -> Measured:
        """Measure batches; see `Measure`."""


def judge(name: str, request: JudgeRequest, settings: JudgeSettings, pool: Pool | None = None) -> Judgement:
    """Judge a model, with one block of it in memory at a time.

    Args:
        name: Run directory, folder of a model, or ORG/NAME[@REVISION] on the Hub.
        request: What shall be found out.
        settings: Device, dtype and memory.
        pool: Workers that measure the text; None where this process does. Tasks are always run by this process.

    Raises:
        InputError: The model, the text or a task cannot be used.
        NumericalError: A forward pass overflowed.
    """
    if request.text is None and request.tasks is None:
        raise ConfigError("nothing to judge by: give --text FILE, --tasks NAMES, or both")
    if request.against is not None and request.text is None:
        raise ConfigError("--against: compares predictions on a text; give --text FILE too")
    if pool is not None and request.tasks is not None:
        raise ConfigError(
            "--workers: only a text is shared among them, tasks are run by one process; leave out one of them"
        )
    tasks = tasks_of(request.tasks) if request.tasks is not None else {}
    if tasks:
        require_harness()
    if request.text is not None:
        require_place(request.text, "--text")
    configure_process(torch.get_num_threads())
    source, other = find_model(name), find_model(request.against) if request.against else None
    if pool is None:
        settings.require_device()
    else:
        settings = pool.settle(settings)
    model = StreamedModel(source, settings)
    against = StreamedModel(other, settings, "--against") if other else None
    text = None
    if request.text is not None:
        cut = WindowCut(request.window, request.limit, request.leads_each)
        windows = cut_windows(request.text.source, read_rows(request.text, "--text"), model.tokenizer, cut)
        measure = pool.measure if pool else measure_here
        text = measure_text(model, windows, settings.batch_tokens, against, measure)
    return Judgement(
        model=model.name,
        text=text,
        tasks=run_tasks(model, tasks, settings.batch_tokens, request.limit, request.include) if tasks else (),
        dtype=str(model.dtype),
        device=model.device.type,
        peak_rss_bytes=(text.peak_rss_bytes if text else 0) or peak_rss_bytes(),
        notes=_notes(name, request),
    )


def _notes(name: str, request: JudgeRequest) -> list[str]:
    """Say for which of the models the text is none that they have not seen."""
    if request.text is None:
        return []
    return [
        f"{model}: {note}" if request.against else note
        for model in filter(None, (name, request.against))
        if (note := calibration_note(model, request.text))
    ]
