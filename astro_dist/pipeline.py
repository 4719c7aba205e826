"""Do a whole run: validate, plan, execute, assemble, summarize, publish."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import astro
from astro.storage.atomic import write_json
from astro_dist.config.cluster_paths import require_absolute_paths
from astro_dist.config.schema import RunConfig, run_key
from astro_dist.console import show_log_by_default, waiting_for
from astro_dist.execution.driver import Driver, Limits
from astro_dist.execution.executor import Executor
from astro_dist.execution.local_executor import LocalExecutor
from astro_dist.export.adapter_file import ADAPTER_WEIGHTS
from astro_dist.export.assemble import assemble
from astro_dist.export.finished_run import FinishedRun
from astro_dist.export.inventory import all_shards, is_whole, replace_card, seal
from astro_dist.export.model_card import planned_card
from astro_dist.planning.compute_dtype import compute_dtype
from astro_dist.planning.cost import CostModel
from astro_dist.planning.deadlines import deadlines
from astro_dist.planning.devices import DEVICES, measure
from astro_dist.planning.disk_size import DiskSize
from astro_dist.planning.estimate import require_room
from astro_dist.planning.input_clips import clips_sha256
from astro_dist.planning.outlook import Outlook
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.validate import Prepared, prepare, tokens_of
from astro_dist.planning.worker_count import local_workers
from astro_dist.publish.background_upload import BackgroundUpload
from astro_dist.publish.publication import Publication
from astro_dist.report.command_output import settings_line
from astro_dist.report.progress import ProgressDisplay
from astro_dist.report.run_figures import Shape
from astro_dist.report.summary import Session, summarize
from astro_dist.report.tracking import Tracking
from astro_dist.run_directory.beginning import begin as begin_run
from astro_dist.run_directory.beginning import is_begun, keep_side_files
from astro_dist.run_directory.identity import Identity, begun_commit, begun_texts
from astro_dist.run_directory.journal import Damaged
from astro_dist.run_directory.layer_widths import settle_widths
from astro_dist.run_directory.local_activations import local_activations, open_activations
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.resume import make_schedule, require_same_arithmetic
from astro_dist.run_directory.summary import Summary, read_summary
from astro_dist.schedule.names import is_block_unit
from astro_dist.schedule.schedule import Schedule
from astro_dist.schedule.unit_words import UnitWords
from astro_dist.source.calibration_text import Chunk, TokenChunks, as_tensors
from astro_dist.source.weight_check import check_weights
from astro_dist.worker.spec import WorkerSpec

__all__ = ["quantize"]

_log = logging.getLogger("astro_dist")


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run that may begin or go on.

    Attributes:
        prepared: The run, after all checks.
        run: Run directory.
        fingerprint: SHA-256 of the source, hex.
        tokens: Tokens of the calibration text.
        activations_stamp: Stamp of the folder of local activations; empty where the run has none.
        tracking: Library that logs the figures of the session, if any.
    """

    prepared: Prepared
    run: RunDirectory
    fingerprint: str
    tokens: TokenChunks
    activations_stamp: str
    tracking: Tracking

    @property
    def config(self) -> RunConfig:
        """Return the configuration of the run."""
        return self.prepared.config

    @property
    def chunks(self) -> Sequence[Chunk]:
        """Return the chunks of the calibration text."""
        return self.tokens.chunks

    def schedule(self) -> Schedule:
        """Make the schedule from what the run directory holds."""
        return make_schedule(self.config, self.prepared.plan, self.run, self.chunks)

    def card(self) -> str:
        """Write the card of the finished run."""
        return str(FinishedRun.open(self.run.root).card(self.config.publish.repo))


def quantize(config: RunConfig) -> Summary:
    """Do a run, or go on with it, and publish it where the configuration says so.

    Args:
        config: Configuration of the run.

    Returns:
        The figures of the run, as summary.json holds them.

    Raises:
        InputError: Something the user gave is wrong; nothing was started.
        AstroError: The run failed, or could not be published; what is finished is kept.
    """
    begin = time.perf_counter()
    show_log_by_default()
    _refuse_relative_paths(config)
    tracking = Tracking(config.output.track)
    root = config.output.dir.expanduser().absolute()
    _log.info("%s; into %s", settings_line(config), root)
    asked = {"source": config.model.source, "revision": config.model.revision}
    prepared, chunks = tokens_of(prepare(config, begun_commit(root, asked)), begun_texts(root))
    config = prepared.config
    for note in prepared.notes:
        _log.info("note: %s", note)
    fingerprint = prepared.checkpoint.fingerprint()
    key = run_key(config, fingerprint, astro.__version__)
    parent = config.output.activations_dir
    local = local_activations(parent, root, key) if parent else None
    run = RunDirectory(root, key, rounds=config.execution.rounds, local=local)
    identity = Identity(
        key=key,
        source_sha256=fingerprint,
        tokens_sha256=chunks.sha256,
        version=astro.__version__,
        arithmetic=config.arithmetic(),
        commit=prepared.source.commit,
        asked=asked if prepared.source.commit else None,
        clips_sha256=clips_sha256(prepared.plan),
        texts={str(number): share.to_json() for number, share in enumerate(chunks.shares)},
    )
    begun = is_begun(run, identity)
    publication = Publication(run, config.publish) if config.publish.repo else None
    if publication:
        weights = [*prepared.plan.files, *([ADAPTER_WEIGHTS] if config.reconstruction.is_on else [])]
        for note in publication.prepare(weights, prepared.base, planned_card(config, prepared.base)):
            _log.info(note)
    if not begun and config.model.check_weights and not prepared.source.is_remote:
        for name in check_weights(prepared.checkpoint, prepared.plan.unknown):
            _log.warning("tensor %s, which the model does not read, holds NaN or Inf; it is copied as it is", name)
    with run.locked():
        if not begun:
            begin_run(run, config, identity, as_tensors(chunks.chunks))
        stamp = _open_activations(run, is_new=not begun)
        with tracking:
            summary = _run(_Job(prepared, run, fingerprint, chunks, stamp, tracking), publication, begin)
        return publication.finish() if publication else summary


def _open_activations(run: RunDirectory, is_new: bool) -> str:
    """Make the folder of local activations ready, and return its stamp; say so where it is lost."""
    if run.local is None:
        return ""
    stamp, is_lost = open_activations(run.local, is_new)
    if is_lost and not run.inventory.is_file():
        reason = f"{run.local} is missing; what was in it and is still needed is computed again"
        run.journal.note("damaged", unit="activations", reason=reason)
        _log.warning("damaged: activations: %s", reason)
    return stamp


def _run(job: _Job, publication: Publication | None, begin: float) -> Summary:
    """Do what is not finished of a run; `begin` is when the session began, on the performance counter."""
    prepared, run = job.prepared, job.run
    known = len(run.journal.of_kind(Damaged))
    words = UnitWords(len(prepared.plan.blocks), run.rounds)
    schedule = job.schedule()
    whole = schedule.complete and is_whole(run, all_shards(run))
    for event in run.journal.of_kind(Damaged)[known:]:
        _log.warning("damaged: %s: %s", words.unit(event.unit), event.reason)
    resumed = len(schedule.finished)
    workers: Mapping[int, Mapping[str, Any]] = {}
    if whole:
        _log.info("%s: this run was finished already; nothing was done, and the figures are those of then", run.root)
        run.drop_leftovers()
        return _renamed(job)
    job.tracking.begin(job.config, sum(map(is_block_unit, schedule.finished)))
    folder = prepared.source.folder
    if prepared.source.is_remote:
        folder = keep_side_files(run, folder)
    if not schedule.complete:
        with waiting_for("starting workers"):
            executor = _make_executor(job.config)
        uploads = publication.in_background() if publication else None
        with uploads or contextlib.nullcontext():  # an upload that is going on holds no worker
            try:
                workers = _execute(job, folder, schedule, executor, uploads)
            finally:
                executor.close()
    settle_widths(run, job.config.quantization, len(prepared.plan.blocks), schedule.finished)
    names = assemble(folder, prepared.plan, run, job.config, is_untied=bool(prepared.untied))
    session = Session(workers, time.perf_counter() - begin, resumed)
    summary = summarize(prepared.plan, run, job.config, prepared.notes, prepared.base, session)
    job.tracking.log_summary(summary)
    write_json(run.summary, summary.to_json())
    seal(run, all_shards(run), names, job.card())
    run.drop_leftovers()
    return summary


def _renamed(job: _Job) -> Summary:
    """Read the summary of a finished run, and correct it and the card where the base model has another name now."""
    base, run = job.prepared.base, job.run
    summary = read_summary(run.summary)
    if summary.base_model != base:
        summary = dataclasses.replace(summary, base_model=base)
        write_json(run.summary, summary.to_json())
        replace_card(run, job.card())
        _log.info("its card names %s now", base.name or "no base model")
    return summary


def _refuse_relative_paths(config: RunConfig) -> None:
    """Refuse relative paths on a cluster, where they mean another folder on every node."""
    if config.execution.executor == "ray" and config.execution.cluster_address is not None:
        require_absolute_paths(config)


def _make_executor(config: RunConfig) -> Executor:
    if config.execution.executor == "local":
        execution = config.execution
        return LocalExecutor(local_workers(execution), execution.threads_per_worker, execution.device)
    from astro_dist.execution.ray_executor import RayExecutor  # Ray is slow to import and not needed for validation

    return RayExecutor(config.execution)


def _execute(
    job: _Job, folder: Path, schedule: Schedule, executor: Executor, uploads: BackgroundUpload | None
) -> Mapping[int, Mapping[str, Any]]:
    """Do every unit that is not finished, and return how the workers describe themselves at the end, by number."""
    config, plan, run = job.config, job.prepared.plan, job.run
    device = "cuda" if executor.has_gpus else "cpu"
    dtype = compute_dtype(config, plan, job.prepared.checkpoint, device)
    require_same_arithmetic(run, dtype, device)
    tokens = {chunk.name: chunk.tokens.size for chunk in job.chunks}
    planned = PlannedRun(plan, config, tokens, dtype, device)
    cost = CostModel(planned)
    if not schedule.finished:
        size = DiskSize(planned)
        needed, kept = size.most_bytes(executor.num_workers), size.kept_bytes()
        require_room(needed if run.local is None else kept, run.root)
        if run.local is not None:
            require_room(needed - kept, run.local, "output.activations_dir")
    spec = _worker_spec(job, folder, dtype, executor, cost.worker_bytes())
    blocks = len(plan.blocks) * run.rounds
    run.journal.note(
        "started", finished_units=len(schedule.finished), units=len(schedule.units), blocks=blocks,
        workers=executor.num_workers, compute_dtype=str(dtype),
    )  # fmt: skip
    blocks_done = sum(map(is_block_unit, schedule.finished))
    shape = Shape(len(plan.blocks), run.rounds, tokens)
    display = ProgressDisplay(shape, schedule.finished, _outlook(config, schedule, cost, executor.num_workers, device))
    if uploads:
        uploads.say = display.say

    def on_finished(now: Schedule) -> None:
        settle_widths(run, config.quantization, len(plan.blocks), now.finished)
        job.tracking.log_figures(display.figures())
        if uploads:
            uploads.offer(now.finished)

    driver = Driver(
        executor, run, display,
        Limits(config.execution.max_retries, deadlines(config, cost, device), config.execution.worker_timeout_s),
        job.schedule, on_finished,
    )  # fmt: skip
    executor.start(spec)
    with display:
        begun = f"going on: {blocks_done} of {blocks} blocks are finished" if schedule.finished else f"{blocks} blocks"
        display.say(f"{begun}; workers are starting")
        driver.run(schedule)
    return executor.describe()


def _outlook(config: RunConfig, schedule: Schedule, cost: CostModel, workers: int, device: str) -> Outlook:
    """Foretell a session. How GPUs of another kind compare with this one shows as soon as calls have returned."""
    nominal = DEVICES["h100"] if device == "cuda" else measure(config.execution.cpu_threads)
    return Outlook(schedule, workers, lambda call: cost.seconds(call, nominal), cost.result)


def _worker_spec(job: _Job, folder: Path, dtype: torch.dtype, executor: Executor, needed_bytes: int) -> WorkerSpec:
    config, device, threads = job.config, "cuda" if executor.has_gpus else "cpu", executor.threads
    return WorkerSpec(
        checkpoint=job.prepared.checkpoint,
        folder=folder,
        fingerprint=job.fingerprint,
        trust_remote_code=config.model.trust_remote_code,
        run=job.run,
        activations_stamp=job.activations_stamp,
        plan=job.prepared.plan,
        chunks=tuple(chunk.name for chunk in job.chunks),
        num_leading=job.tokens.num_leading,
        mode=config.execution.mode,
        shares=config.execution.hessian_shares,
        quantization=config.quantization,
        activations=config.activations,
        regularization=config.regularizer,
        reconstruction=config.reconstruction,
        experts=config.experts,
        token_weights=config.calibration.token_weights,
        compute_dtype=dtype,
        device=device,
        threads=threads,
        column_loops=config.execution.column_loops(device),
        tile_elements=config.execution.tile_elements(device),
        needed_bytes=needed_bytes,
    )
