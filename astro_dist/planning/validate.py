"""Before a run starts, its configuration is checked against the checkpoint's headers, and its needs are estimated."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from astro.config import LayerScheme
from astro.errors import ConfigError, UnsupportedError
from astro.formats import LAYOUTS
from astro.formats.server_limits import adapter_notes, cache_notes
from astro.formats.tensor_parallel import TensorParallelLimit, tensor_parallel_limit
from astro.model.head_counts import head_counts
from astro.model.kv_cache import cache_refusal
from astro.model.linear_layer import LinearLayer
from astro.model.rehearsal import rehearse
from astro.model.skeleton import Skeleton
from astro.model.tied_weights import untied_weights
from astro.process import configure_process
from astro.quantization.bit_allocation import require_affordable
from astro.quantization.compensation import USUAL_SHARE
from astro.storage.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from astro_dist.config.schema import CalibrationConfig, RunConfig
from astro_dist.config.text_place import is_file
from astro_dist.planning.checkpoint_plan import make_plan
from astro_dist.planning.chunk_size import chunk_note, settle_chunks
from astro_dist.planning.correction_cost import CorrectionSize, correction_notes, correction_size, held_channel_notes
from astro_dist.planning.input_clips import settle_compensation, with_clips
from astro_dist.planning.left_out import exact_expert_notes, zero_expert_notes
from astro_dist.planning.source_notes import source_notes
from astro_dist.planning.tile_size import settle_tiles, tile_note
from astro_dist.planning.units import Plan
from astro_dist.source.calibration_text import TokenChunks, read_texts, tokenize
from astro_dist.source.model_info import BaseModel, read_base_model
from astro_dist.source.resolve import Source, resolve_source
from astro_dist.source.text_tokens import require_known
from astro_dist.source.tokenizer import load_tokenizer

__all__ = ["Prepared", "prepare", "require_text", "tokens_of"]

_ENOUGH_TOKENS = 4
"""Calibration tokens for each input of the widest layer below which a note says that they are few."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that has passed all checks; nothing has been started or written.

    Attributes:
        config: Configuration of the run, with everything settled that it left open.
        source: Where the model comes from.
        checkpoint: Opened checkpoint of the model.
        plan: Units of the run.
        base: What the source says about the model.
        notes: Sentences that the user should read before the run starts.
        tensor_parallel: Number of GPUs over which vLLM can cut the result.
        untied: Model's names of weights that config.json calls tied, and that the checkpoint holds with other values.
    """

    config: RunConfig
    source: Source
    checkpoint: Checkpoint
    plan: Plan
    base: BaseModel
    notes: tuple[str, ...]
    tensor_parallel: TensorParallelLimit
    untied: tuple[str, ...] = ()

    @property
    def corrections(self) -> CorrectionSize:
        """How large the corrections of low rank are, or at most are."""
        return correction_size(self.plan.blocks, self.config.reconstruction)


def prepare(config: RunConfig, commit: str | None = None) -> Prepared:
    """Check the configuration against the checkpoint's headers and plan the work.

    Args:
        config: Configuration of the run.
        commit: Commit of the Hub repository with which the run was begun, or None for a new run.

    Returns:
        The run, ready to start.

    Raises:
        InputError: Something that the user gave is wrong.
    """
    if config.publish.repo is None and (config.publish.revision is not None or config.publish.pull_request):
        raise ConfigError("publish.repo: missing; publish.revision and publish.pull_request say how, not where to")
    configure_process(config.execution.cpu_threads)
    source = resolve_source(config.model, commit)
    checkpoint = Checkpoint.open_source(source.store)
    skeleton = Skeleton(source.folder, torch.float32, config.model.trust_remote_code)
    asked, config = config.calibration, _with_length(config, skeleton.limits()[1])
    plan = make_plan(checkpoint, skeleton, config.quantization)
    config = settle_compensation(config)
    plan, clips_notes = with_clips(plan, source.store, config.activations)
    plan = dataclasses.replace(plan, hidden_size=rehearse(skeleton))
    is_open = config.calibration.chunk_samples == "auto"
    asked_tile = config.execution.tile_weights
    config = settle_tiles(settle_chunks(config, plan, checkpoint), plan, checkpoint)
    linears = {linear.name: linear for unit in plan.blocks for linear in unit.linears}
    if config.quantization.bits == "auto":
        require_affordable(config.quantization, {name: c.rows * c.columns for name, c in linears.items()})
    schemes = {name: config.quantization.possible_schemes(name, c.columns) for name, c in linears.items()}
    _require_storable(config, linears, schemes)
    layout = LAYOUTS[config.quantization.format]
    heads = head_counts(skeleton.text_model.config.get_text_config())
    tensor_parallel = tensor_parallel_limit(linears.values(), schemes, heads)
    mixed = layout.fusion_refusal(schemes, plan.ignore)
    if mixed:
        raise ConfigError(
            f"quantization.overrides or ignore: {mixed} in format {config.quantization.format}; write the pattern so "
            "that it names all of them or none"
        )
    inputs = config.activations.scheme
    refusal = layout.inputs_refusal(linears.values(), schemes, inputs)
    if refusal:
        raise UnsupportedError(f"activations: {refusal}")
    if config.activations.rounds_cache:
        _require_cache(skeleton, plan)
    notes = [
        *adapter_notes(config.reconstruction, config.activations, type(skeleton.model).__name__),
        *layout.server_notes(schemes, plan.ignore),
        *layout.inputs_notes(linears.values(), schemes, inputs),
        *cache_notes(config.activations),
        *clips_notes,
        *layout.reader_notes(linears.values()),
        *correction_notes(plan, config.reconstruction),
        *held_channel_notes(config.reconstruction, config.activations),
        *zero_expert_notes(skeleton, plan.left_out),
        *source_notes(checkpoint.encoded, [scheme for possible in schemes.values() for scheme in possible]),
        *_plan_notes(config, plan, type(skeleton.model).__name__),
        *_file_notes(source, checkpoint),
    ]
    if config.calibration.longest_sequence < asked.longest_sequence:
        notes.append(
            f"calibration.sequence_length: auto is {config.calibration.sequence_length}, all positions of the model"
        )
    if is_open:
        notes.append(chunk_note(config, plan, checkpoint))
    if config.execution.tile_weights != asked_tile:
        notes.append(tile_note(config))
    notes[:0] = [f"calibration.source {name} is not there: `quantize` will refuse" for name in _missing_texts(config)]
    untied = untied_weights(skeleton, checkpoint, plan.outside)
    if untied:
        notes.append(
            f"config.json ties {', '.join(untied)} to the embeddings, but the checkpoint holds other values for it; "
            "they are used, as transformers does, and the result's config.json says tie_word_embeddings: false"
        )
    base = read_base_model(source, config.model)
    base = dataclasses.replace(base, auto_class=skeleton.auto_class, parts_beside_text=skeleton.parts_beside_text)
    return Prepared(config, source, checkpoint, plan, base, tuple(notes), tensor_parallel, tuple(untied))


def tokens_of(
    prepared: Prepared, commits: Mapping[tuple[str, str | None], str] | None = None
) -> tuple[Prepared, TokenChunks]:
    """Read and tokenize the calibration text of a run.

    Args:
        prepared: The run.
        commits: Commits of datasets that the run was begun with, by name and revision in the configuration.

    Returns:
        The run, whose configuration says how many sequences there are, and the tokens in chunks.

    Raises:
        InputError: The text, the tokenizer or their settings cannot be used.
    """
    config, source = prepared.config, prepared.source.folder
    tokenizer = load_tokenizer(source, str(source), config.model.trust_remote_code)
    chunks = tokenize(read_texts(config.calibration, tokenizer, commits), tokenizer, config.calibration)
    require_known(max(int(chunk.tokens.max()) for chunk in chunks.chunks), prepared.plan.vocab_size, source)
    return _with_text(prepared, chunks.settled(config.calibration), chunks.notes), chunks


def require_text(prepared: Prepared) -> Prepared:
    """Refuse a calibration text that the run would refuse, if this machine has the text.

    Args:
        prepared: The run.

    Returns:
        The run, whose configuration says how many sequences there are, or would be if the text has enough.

    Raises:
        InputError: The text, the tokenizer or their settings cannot be used.
    """
    if not _missing_texts(prepared.config):
        return tokens_of(prepared)[0]
    calibration = prepared.config.calibration
    counts = {"samples": calibration.most_samples, "holdout_samples": calibration.most_holdout_samples}
    return _with_text(prepared, calibration.model_copy(update=counts), ())


def _with_text(prepared: Prepared, calibration: CalibrationConfig, notes: Sequence[str]) -> Prepared:
    """Return a run whose numbers of sequences are settled."""
    config = prepared.config.model_copy(update={"calibration": calibration})
    all_notes = (*prepared.notes, *notes, *_text_notes(config, prepared.plan))
    return dataclasses.replace(prepared, config=config, notes=all_notes)


def _with_length(config: RunConfig, positions: int | None) -> RunConfig:
    """Return the configuration with a length of sequences that the model has positions for; refuse a longer one."""
    calibration, longest = config.calibration, config.calibration.longest_sequence
    if calibration.sequence_length == "auto":
        length = min(longest, positions or longest)
        return config.model_copy(update={"calibration": calibration.model_copy(update={"sequence_length": length})})
    if positions is not None and longest > positions:
        raise ConfigError(
            f"calibration.sequence_length: {longest} is more than the {positions} positions of this model "
            "(max_position_embeddings); give fewer, or auto"
        )
    return config


def _require_storable(
    config: RunConfig, linears: Mapping[str, LinearLayer], schemes: Mapping[str, Sequence[LayerScheme]]
) -> None:
    """Refuse a layer that the format cannot store with one of the schemes that it may get."""
    layout = LAYOUTS[config.quantization.format]
    for linear in linears.values():
        possible = schemes[linear.name]
        reason = next(filter(None, (layout.refusal(linear.rows, linear.columns, scheme) for scheme in possible)), None)
        if reason:
            is_open = " (bits: auto may choose them)" if len(possible) > 1 else ""
            raise UnsupportedError(
                f"{linear.name}: {reason}{is_open}, as format {config.quantization.format} wants; use "
                "compressed-tensors, or name the layer in quantization.ignore"
            )


def _require_cache(skeleton: Skeleton, plan: Plan) -> None:
    """Refuse scales of an FP8 cache where calibration could not measure them."""
    refusal = cache_refusal(skeleton.model, skeleton.blocks)
    if refusal:
        raise UnsupportedError(f"activations.kv_cache: fp8: {refusal}; take auto")
    empty = [unit.name for unit in plan.blocks if not unit.linears]
    if empty:
        raise UnsupportedError(
            f"activations.kv_cache: fp8: nothing is quantized in {', '.join(empty[:3])}, so no calibration text passes "
            "there; change quantization.ignore, or take auto"
        )


def _plan_notes(config: RunConfig, plan: Plan, class_name: str) -> Iterator[str]:
    """Say what is copied or rounded otherwise than a user may expect."""
    if plan.unknown:
        yield (
            f"{len(plan.unknown)} tensors that {class_name} does not have are copied as they are, "
            f"the first is {plan.unknown[0]}"
        )
    if plan.needless_ignore:
        yield f"quantization.ignore: {', '.join(plan.needless_ignore)}: needless, that is never quantized"
    if plan.indivisible_layers:
        yield (
            f"{len(plan.indivisible_layers)} layers whose input is no multiple of the group size: "
            f"{'kept as they are' if config.quantization.indivisible == 'keep' else 'per channel'}, the first is "
            f"{plan.indivisible_layers[0]}"
        )
    yield from plan.coverage.notes()
    yield from exact_expert_notes(plan.other_matrices)
    if plan.other_matrices:
        yield (
            f"{len(plan.other_matrices)} matrices that are gates, no linear layers, or held in 16 bits by servers, "
            f"stay as they are, the first is {plan.other_matrices[0]}"
        )


def _file_notes(source: Source, checkpoint: Checkpoint) -> Iterator[str]:
    """Say which files of the source are not used."""
    large = source.large_files()
    if large:
        yield (
            f"{', '.join(large)}: not copied into the result, because a file beside the weights of a model has at most "
            "256 MB; copy it yourself if readers need it"
        )
    if {SINGLE_NAME, INDEX_NAME} <= checkpoint.store.sizes().keys():
        yield f"{SINGLE_NAME} is read, as transformers does, and {INDEX_NAME} beside it is not"


def _text_notes(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Say whether there is too little calibration text for the widest layer, or to measure a share by its halves."""
    linears = [linear for unit in plan.blocks for linear in unit.linears]
    widest = max(linears, key=lambda linear: linear.columns)
    tokens = config.calibration.most_samples * config.calibration.longest_sequence
    if tokens < _ENOUGH_TOKENS * widest.columns and config.quantization.method == "gptq":
        what = "its Hessian is singular" if tokens < widest.columns else "its Hessian is a rough estimate"
        yield (
            f"{tokens} calibration tokens are few for {widest.name}, which has {widest.columns} inputs: {what}; give "
            f"at least {_ENOUGH_TOKENS * widest.columns} tokens (calibration.samples × sequence_length)"
        )
    if config.makes_up_for_layers and config.quantization.compensation == "auto" and _num_pieces(config) == 1:
        is_one_share = config.execution.mode == "sequential" and config.execution.hessian_shares == 1
        more = "execution.hessian_shares larger, or " if is_one_share else ""
        yield (
            "the calibration text is in one piece, so that the share of earlier errors that weights make up for cannot "
            f"be measured on halves of it, and is {USUAL_SHARE}; make {more}calibration.chunk_samples smaller"
        )


def _num_pieces(config: RunConfig) -> int:
    """Return the most pieces of the calibration text that are summed apart."""
    chunks = -(-config.calibration.most_samples // config.calibration.settled_chunk_samples)
    return min(chunks, config.execution.hessian_shares) if config.execution.mode == "sequential" else chunks


def _missing_texts(config: RunConfig) -> list[str]:
    """List the calibration texts that are files and not on this machine."""
    files = [text.source for text in config.calibration.texts if is_file(text.source)]
    return [name for name in files if not Path(name).expanduser().is_file()]
