"""Tasks of lm-evaluation-harness on a streamed model: MMLU, ARC and the like, with as many examples as papers give."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astro.errors import AstroError, ConfigError
from astro_dist.evaluation.streamed_model import StreamedModel

__all__ = ["PAPER_TASKS", "TaskScore", "require_harness", "run_tasks", "tasks_of"]

PAPER_TASKS = {"mmlu": 5, "triviaqa": 5, "nq_open": 5, "arc_challenge": 0, "arc_easy": 0, "hellaswag": 0}
"""Tasks of Astro's table of results, with the number of examples before each question (arXiv 2602.07596)."""
_ALL = "paper"
_RESAMPLES = 1000
"""Resamples of the questions for errors that have no formula. The harness's own 100,000 take minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A figure of a model in a task.

    Attributes:
        task: Name of the task, or of a group of tasks.
        shots: Number of examples before each question; None where the tasks of a group differ.
        metric: Name of the figure, such as "acc".
        value: The figure, mostly between 0 and 1.
        error: Standard error of the figure; None where the harness gives none.
        samples: Number of questions; None where the harness does not say.
    """

    task: str
    shots: int | None
    metric: str
    value: float
    error: float | None
    samples: int | None


def tasks_of(text: str) -> dict[str, int | None]:
    """Return the tasks that a list names, and the number of examples of each; None leaves it to the task.

    Args:
        text: Names with commas between them; `NAME:5` asks for 5 examples, and `paper` stands for `PAPER_TASKS`.

    Raises:
        ConfigError: A number of examples is none.

    >>> tasks_of("arc_easy, piqa, boolq:3")
    {'arc_easy': 0, 'piqa': None, 'boolq': 3}
    """
    tasks: dict[str, int | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, shots = part.partition(":")
        if part == _ALL:
            tasks |= PAPER_TASKS
        elif colon and not shots.isdigit():
            raise ConfigError(f"--tasks {part}: expected NAME or NAME:EXAMPLES, such as mmlu:5")
        else:
            tasks[name] = int(shots) if colon else PAPER_TASKS.get(name)
    if not tasks:
        raise ConfigError(f"--tasks {text!r}: names no task; expected such as arc_easy,hellaswag or paper")
    return tasks


def require_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks: needs lm-evaluation-harness, which is not installed; run pip install lm_eval")


def run_tasks(
    model: StreamedModel,
    tasks: dict[str, int | None],
    batch_tokens: int,
    limit: int | None = None,
    include: Path | None = None,
) -> list[TaskScore]:
    """Run tasks, and return their figures in the order of the tasks.

    Args:
        model: The model.
        tasks: Names of the tasks, and the number of examples of each; None leaves it to the task.
        batch_tokens: Number of tokens that pass through a block together.
        limit: Largest number of questions of each task; None for all.
        include: Folder with more tasks as YAML files, which may name code to run; None for none.

    Raises:
        ConfigError: A task is not known, or its data cannot be loaded.
    """
    require_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from astro_dist.evaluation.harness_model import HarnessModel

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"--tasks {unknown[0]}: lm-evaluation-harness knows no such task; `lm_eval ls tasks` lists them, and "
            "--include names a folder with more"
        )
    judged = HarnessModel(model, batch_tokens)
    scores: list[TaskScore] = []
    for shots in dict.fromkeys(tasks.values()):
        names = [name for name in tasks if tasks[name] == shots]
        try:
            results = lm_eval.simple_evaluate(
                model=judged, tasks=names, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
                bootstrap_iters=_RESAMPLES,
            )  # fmt: skip
        except AstroError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--tasks {', '.join(names)}: cannot be run: {type(error).__name__}: {error}; their data come from the "
                "Hub unless --include names a folder with tasks on local files"
            ) from error
        scores += _scores(results, names, shots)
    return [score for name in tasks for score in scores if score.task == name]


def _scores(results: dict[str, Any], names: Sequence[str], shots: int | None) -> list[TaskScore]:
    """Read the figures of tasks from what the harness returned."""
    scores = []
    for name in names:
        known = results.get("n-shot", {}).get(name) if shots is None else shots
        for key, value in results["results"].get(name, {}).items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results["results"][name].get(f"{metric}_stderr,{filtered}")
            scores.append(
                TaskScore(
                    task=name, shots=known, metric=metric, value=float(value),
                    error=float(error) if isinstance(error, int | float) else None, samples=_samples(results, name),
                )
            )  # fmt: skip
    return scores


def _samples(results: dict[str, Any], name: str) -> int | None:
    """Return the number of questions of a task, or of all tasks of a group together; None where it is not told."""
    counts, members = results.get("n-samples", {}), results.get("group_subtasks", {}).get(name)
    if name in counts:
        return int(counts[name]["effective"])
    parts = [_samples(results, member) for member in members or ()]
    return None if not parts or None in parts else sum(filter(None, parts))
