"""What makes finished shards a model: index, config, tokenizer. Nothing that is a shard is touched."""

import shutil
from pathlib import Path

from astro.config import LayerScheme, Quantization
from astro.formats import LAYOUTS
from astro.formats.compressed_tensors import FP8_CACHE
from astro.model.smoothed_tensors import SmoothedInput
from astro.model.tied_weights import without_tying
from astro.storage.atomic import read_json, write_atomic, write_json
from astro.storage.checkpoint import INDEX_NAME
from astro.storage.shard_header import read_header
from astro.storage.source_quantization import without_quantization
from astro_dist.config.schema import RunConfig
from astro_dist.export.adapter_file import write_adapter
from astro_dist.export.cache_scales import CACHE_SCALES_NAME, write_cache_scales
from astro_dist.export.input_scales import INPUT_SCALES_NAME, write_input_scales
from astro_dist.export.model_code import without_model_code
from astro_dist.export.smoothing_file import SMOOTHING_NAME, write_smoothing
from astro_dist.planning.units import Plan
from astro_dist.run_directory.layer_widths import layer_schemes
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.unit_record import SmoothingResult
from astro_dist.schedule.names import smoothing_unit
from astro_dist.source.side_files import list_folder, side_files

__all__ = ["assemble", "final_schemes", "smoothed_inputs"]


def assemble(source: Path, plan: Plan, run: RunDirectory, config: RunConfig, is_untied: bool = False) -> list[str]:
    """Write what is missing beside the shards, all but the card.

    Args:
        source: Folder with config.json and the tokenizer of the source.
        plan: Units of the run, all of them finished.
        run: Run directory.
        config: Configuration of the run.
        is_untied: Whether the model has a head of its own although the source's config ties it to the embeddings.

    Returns:
        Names of the files that were written.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file in plan.files:
        for entry in read_header(run.model, file):
            weight_map[entry.name] = file
            total += entry.size_bytes
    rounds_cache = config.activations.rounds_cache
    if rounds_cache:
        scales = write_cache_scales(plan, run)
        weight_map |= dict.fromkeys(scales, CACHE_SCALES_NAME)
        total += 4 * len(scales)
    if config.activations.has_clips:
        grids = write_input_scales(plan, run)
        weight_map |= dict.fromkeys(grids, INPUT_SCALES_NAME)
        total += 4 * len(grids)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(run.model / INDEX_NAME, index)
    texts = {Path(text.source).expanduser().resolve() for text in config.calibration.texts}
    listed = list_folder(source, without=[run.root] if source != run.source else [])
    beside = [name for name in side_files(listed) if (source / name).resolve() not in texts]
    for name in beside:
        _copy(source / name, run.model / name)
    content = without_quantization(read_json(source / "config.json"))
    if not config.model.trust_remote_code:  # then the class is transformers' own
        content = without_model_code(content)
    if is_untied:
        content = without_tying(content)
    layout, final = LAYOUTS[config.quantization.format], final_schemes(config.quantization, plan, run)
    linears = (linear for unit in plan.blocks for linear in unit.linears)
    schemes = {name: final[linear.name] for linear in linears for name in linear.config_names}
    packing = layout.quantization_config(schemes, plan.ignore, config.quantization.act_order, config.activations.scheme)
    content["quantization_config"] = packing | ({"kv_cache_scheme": FP8_CACHE} if rounds_cache else {})
    write_json(run.model / "config.json", content)
    smoothed = smoothed_inputs(run, len(plan.blocks))
    if smoothed:
        write_smoothing(run.model, smoothed, config.reconstruction.holds_channels(config.activations))
    adapter = write_adapter(run, plan, config.publish.repo) if config.reconstruction.is_on else []
    written = [SMOOTHING_NAME] if smoothed else []
    written += [CACHE_SCALES_NAME] if rounds_cache else []
    written += [INPUT_SCALES_NAME] if config.activations.has_clips else []
    return [INDEX_NAME, "config.json", *written, *adapter, *beside]


def smoothed_inputs(run: RunDirectory, num_blocks: int) -> list[SmoothedInput]:
    """Return the inputs of all blocks, smoothed or not; empty where the run smooths none.

    Args:
        run: Run directory.
        num_blocks: Number of blocks of the model.

    Raises:
        DamagedError: A record cannot be read.
    """
    results = (run.read_if_there(smoothing_unit(block), SmoothingResult) for block in range(num_blocks))
    return [smoothed for result in results if result is not None for smoothed in result.smoothed_inputs]


def final_schemes(quantization: Quantization, plan: Plan, run: RunDirectory) -> dict[str, LayerScheme]:
    """Return the scheme of every quantized layer in the last round, by name.

    Args:
        quantization: Settings of the run.
        plan: Units of the run.
        run: Run directory.

    Raises:
        DamagedError: The file of the chosen widths is missing or damaged.
    """
    schemes: dict[str, LayerScheme] = {}
    for unit in plan.blocks:
        schemes |= layer_schemes(run, quantization, unit, run.rounds - 1)
    return schemes


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, lambda partial: _copy_bytes(source, partial))


def _copy_bytes(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
