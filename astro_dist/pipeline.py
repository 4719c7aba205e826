"""A whole run: validate, plan, execute, assemble, summarize."""

import dataclasses
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import astro
from astro.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    read_header,
    read_json,
    require_finite,
    save_tensors,
    write_atomic,
    write_json,
)
from astro.errors import CheckpointError, ConfigError
from astro.formats import compressed_tensors
from astro.skeleton import Skeleton
from astro_dist.actors import WorkerSpec, configure_process, peak_rss_bytes
from astro_dist.calibration import TokenChunks, read_documents, tokenize
from astro_dist.config import RunConfig, run_key
from astro_dist.executor import Executor, LocalExecutor
from astro_dist.manifest import RunDirectory
from astro_dist.plan import Plan, make_plan
from astro_dist.progress import ProgressDisplay
from astro_dist.schedule import Call, Schedule, unit_names
from astro_dist.source import resolve_source

__all__ = ["Prepared", "prepare", "quantize"]

_COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that was found sound; nothing has been started or written.

    Attributes:
        config: of the run.
        source: folder of the source checkpoint.
        checkpoint: the source, opened.
        plan: every unit.
        notes: what the user should know before it starts.
    """

    config: RunConfig
    source: Path
    checkpoint: Checkpoint
    plan: Plan
    notes: tuple[str, ...]


def prepare(config: RunConfig) -> Prepared:
    """Check the configuration against the checkpoint's headers and plan the work.

    Raises:
        InputError: anything that is wrong with what the user gave.
    """
    configure_process(config.execution.threads_per_worker)
    source = resolve_source(config.model.source)
    checkpoint = Checkpoint.open(source)
    if "quantization_config" in read_json(source / "config.json"):
        raise CheckpointError(f"{source / 'config.json'}: the model is quantized already; give the original checkpoint")
    skeleton = Skeleton(source, torch.float32, config.model.trust_remote_code)
    plan = make_plan(checkpoint, skeleton, config.quantization)
    return Prepared(config, source, checkpoint, plan, tuple(compressed_tensors.server_notes(config.quantization)))


def quantize(config: RunConfig) -> dict[str, Any]:
    """Do a run, or go on with it, and return its summary.

    Raises:
        InputError: something the user gave is wrong; nothing was started.
        AstroError: the run failed; what is finished is kept.
    """
    begin = time.perf_counter()
    prepared = prepare(config)
    chunks = _tokenize(config, prepared.source)
    fingerprint = prepared.checkpoint.fingerprint()
    run = RunDirectory(config.output.dir.expanduser().absolute(), run_key(config, fingerprint, astro.__version__))
    identity = {"source_sha256": fingerprint, "tokens_sha256": chunks.sha256, "version": astro.__version__}
    if not run.begun(config, identity):
        if config.model.check_weights:
            require_finite(prepared.checkpoint)
        run.begin(config, identity)
        save_tensors(run.tokens, {chunk.name: torch.from_numpy(chunk.tokens) for chunk in chunks.chunks})
    executor = _make_executor(config)
    try:
        workers = _execute(prepared, run, [chunk.name for chunk in chunks.chunks], executor)
    finally:
        executor.close()
    _assemble(prepared, run)
    summary = _summarize(prepared, run, workers, time.perf_counter() - begin)
    write_json(run.summary, summary)
    run.drop_activations()
    return summary


def _tokenize(config: RunConfig, source: Path) -> TokenChunks:
    documents = read_documents(config.calibration)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{source}: its tokenizer cannot be loaded: {error}") from error
    return tokenize(documents, tokenizer, config.calibration)


def _make_executor(config: RunConfig) -> Executor:
    if config.execution.executor == "local":
        return LocalExecutor(config.execution.workers if isinstance(config.execution.workers, int) else 1)
    from astro_dist.ray_executor import RayExecutor  # Ray is slow to import and not needed for validation

    return RayExecutor(config.execution)


def _compute_dtype(config: RunConfig, plan: Plan, checkpoint: Checkpoint, device: str) -> torch.dtype:
    if config.execution.compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.execution.compute_dtype)
        return dtype
    key = next(linear.key for unit in plan.blocks for linear in unit.linears)
    stored = checkpoint.entries[key].float_dtype or torch.float32
    # CPUs have no float16 arithmetic worth the name: float32 is exact for such weights, and faster.
    return torch.float32 if stored == torch.float16 and device == "cpu" else stored


def _execute(prepared: Prepared, run: RunDirectory, chunks: list[str], executor: Executor) -> list[dict[str, Any]]:
    """Do every unit that is not finished; what the workers say of themselves at the end."""
    config, plan = prepared.config, prepared.plan
    device = "cuda" if executor.has_gpus else "cpu"
    dtype = _compute_dtype(config, plan, prepared.checkpoint, device)
    schedule = _schedule(plan, run, chunks)
    _refuse_other_dtype(run, dtype)
    run.note("started", finished_units=len(schedule.finished), workers=executor.num_workers, compute_dtype=str(dtype))
    if schedule.complete:
        return []
    executor.start(
        WorkerSpec(
            source=prepared.source,
            trust_remote_code=config.model.trust_remote_code,
            run=run,
            plan=plan,
            chunks=tuple(chunks),
            quantization=config.quantization,
            regularization=config.regularizer,
            compute_dtype=dtype,
            device=device,
            threads=config.execution.threads_per_worker,
        )
    )
    blocks_done = sum(unit.name in schedule.finished for unit in plan.blocks)
    display = ProgressDisplay(
        schedule.total, len(schedule.finished), len(plan.blocks), blocks_done, executor.num_workers
    )
    with display:
        if blocks_done:
            display.say(f"going on: {blocks_done} of {len(plan.blocks)} blocks are finished")
        _drive(schedule, executor, display, run)
    return executor.describe()


def _drive(schedule: Schedule, executor: Executor, display: ProgressDisplay, run: RunDirectory) -> None:
    running: dict[int, Call] = {}
    while not schedule.complete:
        for worker in range(executor.num_workers):
            call = schedule.next_call(worker) if worker not in running else None
            if call is not None:
                running[worker] = call
                executor.submit(worker, call)
                display.started(worker, call)
        assert running, "the schedule waits for itself"
        worker, result = executor.wait()
        call = running.pop(worker)
        schedule.done(worker, call)
        display.ended(worker, call, call.unit in schedule.finished)
        if isinstance(result, dict):
            run.note("finished", unit=call.unit, worker=worker, seconds=result["result"].get("seconds", {}))


def _schedule(plan: Plan, run: RunDirectory, chunks: list[str]) -> Schedule:
    evaluated = any(chunk.startswith("h") for chunk in chunks)
    units = unit_names(len(plan.blocks), len(plan.copies), evaluated)
    finished = [unit for unit in units if run.finished(unit) is not None]
    present = {
        stream: {
            block: [chunk for chunk in chunks if run.hidden(stream, block, chunk).is_file()]
            for block in range(len(plan.blocks) + 1)
        }
        for stream in ("original", "quantized")
    }
    return Schedule(len(plan.blocks), len(plan.copies), chunks, finished, present["original"], present["quantized"])


def _refuse_other_dtype(run: RunDirectory, dtype: torch.dtype) -> None:
    record = run.finished("embed")
    before = record["result"]["compute_dtype"] if record else str(dtype)
    if before != str(dtype):
        raise ConfigError(
            f"{run.root}: this run was begun in {before} and would go on in {dtype} on this hardware; "
            f"set execution.compute_dtype: {before.removeprefix('torch.')}, or choose another output.dir"
        )


def _assemble(prepared: Prepared, run: RunDirectory) -> None:
    """Write what makes the shards a model: index, config, tokenizer."""
    plan, source = prepared.plan, prepared.source
    weight_map: dict[str, str] = {}
    total = 0
    for file in plan.files:
        for entry in read_header(run.model, file):
            weight_map[entry.name] = file
            total += entry.size_bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(run.model / INDEX_NAME, index)
    for name in _COPIED_FILES:
        if (source / name).is_file():
            _copy(source / name, run.model / name)
    content = read_json(source / "config.json")
    content["quantization_config"] = compressed_tensors.quantization_config(prepared.config.quantization, plan.ignore)
    write_json(run.model / "config.json", content)


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, lambda partial: _copy_bytes(source, partial))


def _copy_bytes(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _summarize(prepared: Prepared, run: RunDirectory, workers: list[dict[str, Any]], wall_s: float) -> dict[str, Any]:
    plan = prepared.plan
    records = [run.read(unit.name) for unit in plan.blocks]
    layers = [layer for record in records for layer in record["layers"]]
    phases: dict[str, float] = {}
    for unit in [*(unit.name for unit in plan.blocks), *(f"quantized-{unit.index:04d}" for unit in plan.blocks)]:
        for phase, seconds in run.read(unit).get("seconds", {}).items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    raised = [layer["name"] for layer in layers if layer["factorizations"] > 1]
    return {
        "perplexity": {stream: _perplexity(run.read(f"head-{stream}")) for stream in ("original", "quantized")},
        "mean_relative_error": sum(layer["relative_error"] for layer in layers) / len(layers),
        "wall_s": round(wall_s, 2),
        "phases_s": {phase: round(seconds, 2) for phase, seconds in phases.items()},
        "peak_rss_bytes": {
            "driver": peak_rss_bytes(),
            **{f"worker-{index}": worker["peak_rss_bytes"] for index, worker in enumerate(workers)},
        },
        "bytes_read": plan.read_bytes,
        "bytes_written": plan.written_bytes,
        "fallbacks": {"damping_raised": raised},
        "notes": list(prepared.notes),
        "units": {"blocks": len(plan.blocks), "copies": len(plan.copies)},
        "model": str(run.model),
    }


def _perplexity(result: Mapping[str, Any]) -> float | None:
    return math.exp(result["negative_log_likelihood"] / result["tokens"]) if result else None
