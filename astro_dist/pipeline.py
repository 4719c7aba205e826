"""A whole run: validate, plan, execute, assemble, summarize, publish."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import astro
from astro.errors import ConfigError
from astro.storage.atomic import write_json
from astro.storage.checkpoint import require_finite
from astro_dist.config.cluster_paths import require_absolute_paths
from astro_dist.config.schema import RunConfig, run_key
from astro_dist.execution.driver import Driver, Limits
from astro_dist.execution.executor import Executor
from astro_dist.execution.local_executor import LocalExecutor
from astro_dist.export.assemble import assemble
from astro_dist.export.finished_run import FinishedRun
from astro_dist.export.inventory import all_shards, is_whole, replace_card, seal
from astro_dist.export.model_card import planned_card
from astro_dist.planning.cost import CostModel
from astro_dist.planning.estimate import require_room
from astro_dist.planning.validate import Prepared, compute_dtype, prepare, tokens_of
from astro_dist.publish.background_upload import BackgroundUpload
from astro_dist.publish.publication import Publication
from astro_dist.report.progress import ProgressDisplay
from astro_dist.report.summary import Session, summarize
from astro_dist.run_directory.beginning import begin as begin_run
from astro_dist.run_directory.beginning import is_begun, keep_side_files
from astro_dist.run_directory.identity import Identity, begun_commit
from astro_dist.run_directory.journal import Damaged
from astro_dist.run_directory.layer_widths import settle_widths
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.resume import make_schedule
from astro_dist.run_directory.summary import Summary, read_summary
from astro_dist.run_directory.unit_record import EmbedResult
from astro_dist.schedule.calls import Call
from astro_dist.schedule.names import EMBED, is_block_unit
from astro_dist.schedule.schedule import Schedule
from astro_dist.source.calibration_text import Chunk, as_tensors
from astro_dist.worker.spec import WorkerSpec

__all__ = ["quantize"]

_log = logging.getLogger("astro_dist")

_CALL_PATIENCE_S = 600.0
_SLACK = 20.0
_SLOWEST_CORE, _SLOWEST_GPU = 5e9, 1e12
"""Operations a second below which no device in use is."""
_CRAWL = 5e6
"""Bytes a second below which no shared folder in use is."""


def quantize(config: RunConfig) -> dict[str, Any]:
    """Do a run, or go on with it, and publish it where the configuration says so.

    Args:
        config: Configuration of the run.

    Returns:
        The figures of the run as the JSON object that summary.json holds; see `Summary`.

    Raises:
        InputError: Something the user gave is wrong; nothing was started.
        AstroError: The run failed, or could not be published; what is finished is kept.
    """
    begin = time.perf_counter()
    _refuse_relative_paths(config)
    root = config.output.dir.expanduser().absolute()
    asked = {"source": config.model.source, "revision": config.model.revision}
    prepared = prepare(config, begun_commit(root, asked))
    chunks = tokens_of(prepared)
    fingerprint = prepared.checkpoint.fingerprint()
    key = run_key(config, fingerprint, astro.__version__)
    run = RunDirectory(root, key, rounds=config.execution.rounds)
    identity = Identity(
        key=key,
        source_sha256=fingerprint,
        tokens_sha256=chunks.sha256,
        version=astro.__version__,
        arithmetic=config.arithmetic(),
        commit=prepared.source.commit,
        asked=asked if prepared.source.commit else None,
    )
    begun = is_begun(run, identity)
    publication = Publication(run, config.publish) if config.publish.repo else None
    if publication:
        for note in publication.prepare(prepared.plan.files, prepared.base, planned_card(config, prepared.base)):
            _log.info(note)
    if not begun and config.model.check_weights and not prepared.source.is_remote:
        require_finite(prepared.checkpoint)
    with run.locked():
        if not begun:
            begin_run(run, config, identity, as_tensors(chunks.chunks))
        summary = _run(prepared, run, fingerprint, chunks.chunks, publication, begin)
        return (publication.finish() if publication else summary).to_json()


def _run(
    prepared: Prepared,
    run: RunDirectory,
    fingerprint: str,
    chunks: Sequence[Chunk],
    publication: Publication | None,
    begin: float,
) -> Summary:
    known = len(run.journal.of_kind(Damaged))
    schedule = make_schedule(prepared.config, prepared.plan, run, chunks)
    whole = schedule.complete and is_whole(run, all_shards(run))
    for event in run.journal.of_kind(Damaged)[known:]:
        _log.warning("damaged: %s: %s", event.unit, event.reason)
    resumed = len(schedule.finished)
    workers: dict[int, dict[str, Any]] = {}
    if whole:
        _log.info("%s: this run was finished already; nothing was done, and the figures are those of then", run.root)
        run.drop_leftovers()
        return _renamed(prepared, run)
    folder = prepared.source.folder
    if prepared.source.is_remote:
        folder = keep_side_files(run, folder)
    if not schedule.complete:
        executor = _make_executor(prepared.config)
        uploads = publication.in_background() if publication else None
        with uploads or contextlib.nullcontext():  # an upload that is going on holds no worker
            try:
                workers = _execute(prepared, folder, run, fingerprint, chunks, schedule, executor, uploads)
            finally:
                executor.close()
    settle_widths(run, prepared.config.quantization, len(prepared.plan.blocks), schedule.finished)
    names = assemble(folder, prepared.plan, run, prepared.config)
    session = Session(workers, time.perf_counter() - begin, resumed)
    summary = summarize(prepared.plan, run, prepared.config.quantization, prepared.notes, prepared.base, session)
    write_json(run.summary, summary.to_json())
    card = FinishedRun.open(run.root).card(prepared.config.publish.repo)
    seal(run, all_shards(run), names, str(card))
    run.drop_leftovers()
    return summary


def _renamed(prepared: Prepared, run: RunDirectory) -> Summary:
    """The summary of a finished run. What the card calls the base model may have been corrected since."""
    summary = read_summary(run.summary)
    if summary.base_model != prepared.base:
        summary = dataclasses.replace(summary, base_model=prepared.base)
        write_json(run.summary, summary.to_json())
        replace_card(run, str(FinishedRun.open(run.root).card(prepared.config.publish.repo)))
        _log.info("its card names %s now", prepared.base.name or "no base model")
    return summary


def _refuse_relative_paths(config: RunConfig) -> None:
    """On a cluster a relative path means another folder on every node."""
    if config.execution.executor == "ray" and config.execution.cluster_address is not None:
        require_absolute_paths(config)


def _make_executor(config: RunConfig) -> Executor:
    if config.execution.executor == "local":
        workers = config.execution.workers if isinstance(config.execution.workers, int) else 1
        return LocalExecutor(workers, on_gpu=config.execution.device == "cuda")
    from astro_dist.execution.ray_executor import RayExecutor  # Ray is slow to import and not needed for validation

    return RayExecutor(config.execution)


def _execute(
    prepared: Prepared,
    folder: Path,
    run: RunDirectory,
    fingerprint: str,
    chunks: Sequence[Chunk],
    schedule: Schedule,
    executor: Executor,
    uploads: BackgroundUpload | None,
) -> dict[int, dict[str, Any]]:
    """Do every unit that is not finished; what the workers say of themselves at the end."""
    config, plan, execution = prepared.config, prepared.plan, prepared.config.execution
    device = "cuda" if executor.has_gpus else "cpu"
    dtype = compute_dtype(config, plan, prepared.checkpoint, device)
    _refuse_other_arithmetic(run, dtype, device)
    cost = CostModel(plan, config, {chunk.name: chunk.tokens.size for chunk in chunks}, dtype.itemsize, device)
    if not schedule.finished:
        require_room(cost.disk_bytes(executor.num_workers), run.root)
    spec = _worker_spec(prepared, folder, run, fingerprint, chunks, dtype, device, cost)
    blocks = len(plan.blocks) * run.rounds
    run.journal.note(
        "started", finished_units=len(schedule.finished), units=len(schedule.units), blocks=blocks,
        workers=executor.num_workers, compute_dtype=str(dtype),
    )  # fmt: skip
    blocks_done = sum(map(is_block_unit, schedule.finished))
    display = ProgressDisplay(len(schedule.units), len(schedule.finished), blocks, blocks_done)
    if uploads:
        uploads.say = display.say

    def on_finished(now: Schedule) -> None:
        settle_widths(run, config.quantization, len(plan.blocks), now.finished)
        if uploads:
            uploads.offer(now.finished)

    driver = Driver(
        executor, run, display,
        Limits(execution.max_retries, _deadlines(config, cost, device), execution.worker_timeout_s),
        lambda: make_schedule(config, plan, run, chunks), on_finished,
    )  # fmt: skip
    executor.start(spec)
    with display:
        begun = f"going on: {blocks_done} of {blocks} blocks are finished" if schedule.finished else f"{blocks} blocks"
        display.say(f"{begun}; workers are starting")
        driver.run(schedule)
    return executor.describe()


def _worker_spec(
    prepared: Prepared,
    folder: Path,
    run: RunDirectory,
    fingerprint: str,
    chunks: Sequence[Chunk],
    dtype: torch.dtype,
    device: str,
    cost: CostModel,
) -> WorkerSpec:
    config = prepared.config
    return WorkerSpec(
        checkpoint=prepared.checkpoint,
        folder=folder,
        fingerprint=fingerprint,
        trust_remote_code=config.model.trust_remote_code,
        run=run,
        plan=prepared.plan,
        chunks=tuple(chunk.name for chunk in chunks),
        shares=config.execution.hessian_shares,
        quantization=config.quantization,
        regularization=config.regularizer,
        experts=config.experts,
        compute_dtype=dtype,
        device=device,
        threads=config.execution.threads_per_worker,
        compiles=config.execution.compiles(device),
        needed_bytes=cost.worker_bytes(),
    )


def _deadlines(config: RunConfig, cost: CostModel, device: str) -> Callable[[Call], float]:
    """After how many seconds a call is taken to hang: many times what a slow device would need."""
    timeout_s = config.execution.call_timeout_s
    rate = _SLOWEST_GPU if device == "cuda" else _SLOWEST_CORE * config.execution.threads_per_worker

    def at_worst(call: Call) -> float:
        work = cost.work(call)
        return _CALL_PATIENCE_S + _SLACK * (work.compute + work.exact) / rate + work.moved_bytes / _CRAWL

    return at_worst if timeout_s == "auto" else lambda call: timeout_s


def _refuse_other_arithmetic(run: RunDirectory, dtype: torch.dtype, device: str) -> None:
    """What was begun in one dtype on one kind of device would become a mixture."""
    record = run.finished(EMBED)
    if record is None:
        return
    begun = record.result
    assert isinstance(begun, EmbedResult)
    before, kind = begun.compute_dtype, begun.device
    if before != str(dtype):
        raise ConfigError(
            f"{run.root}: this run was begun in {before} and would go on in {dtype} on this hardware; "
            f"set execution.compute_dtype: {before.removeprefix('torch.')}, or choose another output.dir"
        )
    if kind != device:
        raise ConfigError(
            f"{run.root}: this run was begun on {kind} and would go on on {device}; set execution.device: {kind}, wait "
            "for such workers, or choose another output.dir"
        )
