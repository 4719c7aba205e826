"""A library for tracking experiments sees a run: its figures when blocks finish, and its summary at the end."""

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Protocol, Self

from astro.errors import ConfigError, RunError
from astro_dist.config.schema import RunConfig
from astro_dist.report.run_figures import RunFigures
from astro_dist.run_directory.summary import Summary

__all__ = ["Tracking"]

_log = logging.getLogger("astro_dist")

_PROJECT = "astro-dist"
"""Project, or experiment, in which sessions are listed where the library's own variable names no other."""


class _Client(Protocol):
    """One session in a library."""

    def begin(self, name: str, settings: Mapping[str, str]) -> None: ...
    def log(self, values: dict[str, float], step: int) -> None: ...
    def end(self, succeeded: bool) -> None: ...


class _Trackio:
    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def begin(self, name: str, settings: Mapping[str, str]) -> None:
        project = os.environ.get(f"{self._library.__name__.upper()}_PROJECT", _PROJECT)
        self._library.init(project=project, name=name, config=dict(settings))

    def log(self, values: dict[str, float], step: int) -> None:
        self._library.log(values, step=step)

    def end(self, succeeded: bool) -> None:
        self._library.finish()


class _Wandb(_Trackio):
    def end(self, succeeded: bool) -> None:
        self._library.finish(exit_code=0 if succeeded else 1)


class _Mlflow:
    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def begin(self, name: str, settings: Mapping[str, str]) -> None:
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            self._library.set_experiment(_PROJECT)
        self._library.start_run(run_name=name)
        self._library.log_params(dict(settings))

    def log(self, values: dict[str, float], step: int) -> None:
        self._library.log_metrics(values, step=step)

    def end(self, succeeded: bool) -> None:
        self._library.end_run("FINISHED" if succeeded else "FAILED")


_CLIENTS: dict[str, Callable[[ModuleType], _Client]] = {"trackio": _Trackio, "wandb": _Wandb, "mlflow": _Mlflow}


class Tracking:
    """Tells a library what a session does; without a library it does nothing.

    A session that goes on with a run is another entry of the same name, whose steps go on too. A step is a block that
    is done. What the library raises while the run goes on is said, and stops nothing.
    """

    def __init__(self, library: str | None) -> None:
        """Load the library; nothing is sent before `begin`.

        Args:
            library: Name of the library, as in `output.track`; None for none.

        Raises:
            ConfigError: It is not installed, or cannot be loaded.
        """
        self._client: _Client | None = None
        self._name, self._has_begun, self._logged = library, False, 0
        if library is not None:
            try:
                self._client = _CLIENTS[library](importlib.import_module(library))
            except ImportError as error:
                raise ConfigError(
                    f"output.track: {library} cannot be loaded ({error}); run pip install {library} where the command "
                    "runs, or leave the key out"
                ) from error

    def begin(self, config: RunConfig, blocks_done: int) -> None:
        """Begin a session.

        Args:
            config: Configuration of the run, which the library shows; the session has the name of the run directory.
            blocks_done: Number of blocks that are done already.

        Raises:
            RunError: The library refused, for example because nobody has logged in.
        """
        if self._client is None:
            return
        settings = {f"{section}.{key}": str(value) for section, v in config.plain().items() for key, value in v.items()}
        try:
            self._client.begin(config.output.dir.expanduser().absolute().name, settings)
        except Exception as error:  # each library has errors of its own
            raise RunError(
                f"output.track: {self._name} could not begin: {error}; mend it, or go on without by --set "
                "output.track=null"
            ) from error
        self._has_begun, self._logged = True, blocks_done

    def log_figures(self, figures: RunFigures) -> None:
        """Log the figures if more blocks are done than when they were logged last.

        Args:
            figures: Figures of this moment.
        """
        if self._has_begun and figures.blocks_done > self._logged:
            self._logged = figures.blocks_done
            self._log(figures.numbers())

    def log_summary(self, summary: Summary) -> None:
        """Log what came out.

        Args:
            summary: Figures of the finished run.
        """
        perplexity = summary.perplexity
        values = {
            "perplexity_original": perplexity.original,
            "perplexity_quantized": perplexity.quantized,
            "perplexity_change": perplexity.change,
            "kl_divergence": perplexity.divergence,
            "mean_relative_error": summary.mean_relative_error,
            "average_bits": summary.average_bits,
            "total_bytes": float(summary.total_bytes),
            "wall_s": summary.wall_s,
        }
        self._log({name: value for name, value in values.items() if value is not None})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the session, if one has begun; the library shows whether it failed."""
        self._try(lambda client: client.end(error is None))

    def _log(self, values: dict[str, float]) -> None:
        self._try(lambda client: client.log(values, self._logged))

    def _try(self, send: Callable[[_Client], None]) -> None:
        """Send something; a service that is down is no reason to lose a run of hours."""
        if self._client is None or not self._has_begun:
            return
        try:
            send(self._client)
        except Exception as error:  # each library has errors of its own
            _log.warning("output.track: %s did not take the figures: %s; the run goes on", self._name, error)
