"""Write the card of a finished model: metadata for the Hub, and what was done, from the run's records alone."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import PurePath
from typing import Any

import huggingface_hub
import jinja2
import yaml
from rich.filesize import decimal

from astro.config import PER_CHANNEL
from astro.formats import LAYOUTS
from astro.formats.peft_adapter import FOLDER
from astro.formats.rounded_inputs import HUMMING_OPTION
from astro.formats.server_limits import FUSED_EXPERTS, TRANSPOSED
from astro.quantization.layer_record import LayerRecord, predicted_nats
from astro_dist.config.schema import RunConfig
from astro_dist.config.text_place import PYTHON_DOCS, name_elsewhere
from astro_dist.console import in_words
from astro_dist.export.input_scales import INPUT_SCALES_NAME
from astro_dist.run_directory.identity import Identity
from astro_dist.run_directory.summary import Summary
from astro_dist.run_directory.unit_record import BlockResult
from astro_dist.source.model_info import BaseModel
from astro_dist.wording import counted, percent

__all__ = ["metadata", "model_card", "planned_card"]

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's option `--max-lora-rank` can have."""
_HUB = "https://huggingface.co"
_CACHE = "FP8 (E4M3) in the server's cache, one scale for those of each attention, from the largest of calibration"
_SERVED_BITS = {"compressed-tensors": range(2, 9), "gptq": (4, 8)}
"""Widths that vLLM has kernels for, by format; in compressed-tensors below 4 bits by its source alone."""
_TRIED_BITS = 4
"""Smallest width that was tried with a server."""
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
}  # fmt: skip
"""The Hub's name of what a model does, by the auto class that loads it."""
_CALIBRATED = {
    "blocks": "",
    "stages": ": the layers of a block are calibrated behind the quantized ones before them in that block",
    "sequential": ": every layer is calibrated behind the quantized ones before it",
}
"""What is said of a mode besides its name."""
_METHODS = {
    "astro": "Astro regularization", "magr": "MagR regularization", "none": "", "gptq": "GPTQ",
    "rtn": "rounding to nearest",
}  # fmt: skip
_SCALES = {
    "hessian": "searched under the error that GPTQ will pay for", "mse": "searched by mean square error",
    "minmax": "cover the whole range",
}  # fmt: skip
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("astro_dist", "export"),
    autoescape=False,  # the card is Markdown
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def metadata(
    config: RunConfig, base: BaseModel, widths: Collection[int], repository: str | None
) -> huggingface_hub.ModelCardData:
    """Make the metadata of a card, which is what the Hub reads.

    Args:
        config: Configuration of the run.
        base: Description of the model that is quantized.
        widths: Widths of the quantized layers in bits; all possible ones where the run has not chosen yet.
        repository: ORG/NAME of the repository that the model goes to; None where there is none.
    """
    regularizer, quantization, inputs = config.regularizer.name, config.quantization, config.activations.scheme
    methods = [quantization.method, *([regularizer] if regularizer != "none" else [])]
    return huggingface_hub.ModelCardData(
        base_model=base.name,
        base_model_relation="quantized" if base.name else None,
        library_name="transformers",
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=list(base.language) or None,
        pipeline_tag=_PIPELINES[base.auto_class],
        quantized_by=repository.partition("/")[0] if repository else "astro-dist",
        tags=[
            "quantized",
            f"{next(iter(widths))}-bit" if len(widths) == 1 else "mixed-precision",
            *([f"w{next(iter(widths))}{inputs.short_name}"] if inputs is not None and len(widths) == 1 else []),
            quantization.format,
            *methods,
            "astro-dist",
            *(["vllm"] if _is_served(config, widths) else []),
        ],
    )


def planned_card(config: RunConfig, base: BaseModel) -> huggingface_hub.ModelCard:
    """Make a card with the metadata that a run will have, as far as it is known before the run.

    Args:
        config: Configuration of the run.
        base: Description of the model that is quantized.
    """
    q = config.quantization
    data = metadata(config, base, q.bit_choices if q.bits == "auto" else {q.bits}, config.publish.repo)
    return huggingface_hub.ModelCard(f"---\n{data}\n---\n")


def model_card(
    config: RunConfig, identity: Identity, summary: Summary, blocks: Sequence[BlockResult], repository: str | None
) -> huggingface_hub.ModelCard:
    """Write the card of a finished run.

    Args:
        config: Configuration of the run.
        identity: Version, commit and hashes of the run.
        summary: Figures of the run.
        blocks: Figures of the blocks of the last round.
        repository: ORG/NAME of the repository that the model goes to; None where there is none.
    """
    base = summary.base_model
    layers = [layer for block in blocks for layer in block.layers]
    widths = {layer.bits for layer in layers}
    original, quantized = summary.perplexity.original, summary.perplexity.quantized
    change = quantized / original - 1 if original is not None and quantized is not None else None
    reproduction, shortened = _without_places(config, identity)
    steps = [_METHODS[config.regularizer.name], _METHODS[config.quantization.method]]
    # PEFT looks at the weights of layers, which packed ones have once they are decompressed.
    is_decompressed = bool(summary.corrections) and config.quantization.format == "compressed-tensors"
    text = _TEMPLATES.get_template("model_card.md.j2").render(
        metadata=metadata(config, base, widths, repository),
        name=repository.partition("/")[2] if repository else PurePath(config.output.dir).name,
        place=repository or "FOLDER",
        config=config,
        identity=identity,
        summary=summary,
        base=base,
        original=_linked(base.name, f"{_HUB}/{base.name}") if base.name else PurePath(config.model.source).name,
        steps=" and ".join(filter(None, steps)),
        sizes=_sizes(summary),
        license=_linked(base.license_name or base.license, base.license_link),
        change=change,
        method=[(name, _cell(value)) for name, value in _method(config, summary)],
        kinds=_by_kind(layers),
        text=_texts(config, identity, summary.python),
        is_served=_is_served(config, widths),
        has_served_widths=_are_served(config.quantization.format, widths),
        is_low=min(widths) < _TRIED_BITS,
        inputs=config.activations.in_words,
        needs_humming=any(HUMMING_OPTION in note for note in summary.notes),
        humming=HUMMING_OPTION,
        is_doubtful=bool({FUSED_EXPERTS, TRANSPOSED} & set(summary.notes)),
        reader="AutoProcessor" if base.parts_beside_text else "AutoTokenizer",
        packages=LAYOUTS[config.quantization.format].READER_PACKAGES,
        devices=Counter(f"{block.device}, torch {block.torch}" for block in blocks),
        worked=in_words(sum(summary.phases_s.values())),
        took=in_words(summary.wall_s),
        reproduction=yaml.safe_dump(reproduction, sort_keys=False),
        shortened=shortened,
        adapter=FOLDER,
        holds_channels=config.reconstruction.holds_channels(config.activations),
        is_decompressed=is_decompressed,
        is_float32=config.activations.has_clips and not is_decompressed,
        lora_rank=next((r for r in _LORA_RANKS if summary.corrections and r >= summary.corrections.largest_rank), 0),
        percent=percent,
        counted=counted,
    )
    return huggingface_hub.ModelCard(text)


@dataclasses.dataclass(frozen=True)
class _KindFigures:
    """A row of the table of layers: layers of one kind in all blocks.

    Attributes:
        name: What the layers have in common.
        count: Number of times that such layers were solved.
        bits: Widths of the layers.
        betas: Strengths of the regularization: the least, the median and the most.
        mean_error: Mean relative error.
        largest_error: Largest relative error.
        worst: Name of the first layer that has it.
        nats: Predicted KL divergence in nats a token, of all of them together; None where it is not known.
    """

    name: str
    count: int
    bits: str
    betas: tuple[float, float, float]
    mean_error: float
    largest_error: float
    worst: str
    nats: float | None


def _by_kind(layers: Sequence[LayerRecord]) -> list[_KindFigures]:
    """Make one row for each kind of layer; layers that share an input were solved together."""
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return [_figures(name, members) for name, members in kinds.items()]


def _figures(name: str, layers: Sequence[LayerRecord]) -> _KindFigures:
    betas = [layer.beta for layer in layers]
    worst = max(layers, key=lambda layer: layer.relative_error)
    return _KindFigures(
        name=name,
        count=len(layers),
        bits=", ".join(map(str, sorted({layer.bits for layer in layers}))),
        betas=(min(betas), statistics.median_low(betas), max(betas)),
        mean_error=statistics.mean(layer.relative_error for layer in layers),
        largest_error=worst.relative_error,
        worst=worst.members[0],
        nats=predicted_nats(layers),
    )


def _method(config: RunConfig, summary: Summary) -> list[tuple[str, str]]:
    """List the settings that matter, as rows of a table."""
    q, regularizer, execution = config.quantization, config.regularizer, config.execution
    columns = "a whole row" if q.group_size == PER_CHANNEL else f"{q.group_size} input columns"
    grid = "symmetric" if q.symmetric else "asymmetric"
    static = "by falling activation energy, stored unpermuted"
    inputs, has_clips = config.activations.in_words, config.activations.has_clips
    before = ", before scales were tuned" if summary.has_tuned else ""
    how = f"a pair for each layer, in {INPUT_SCALES_NAME}" if has_clips else "rounded by the server as they come"
    return [
        ("method", _METHODS[q.method]),
        ("bits a weight", f"{summary.average_bits:.3g}{_spent_by(summary)}"),
        ("one scale for", f"{columns}, {grid}, {_SCALES[q.scale_search]}"),
        *([("inputs of these layers", f"{inputs}, {how}")] if inputs else []),
        *([("keys and values", _CACHE)] if config.activations.rounds_cache else []),
        ("order of columns", static if q.act_order == "static" else "as stored"),
        ("regularizer", f"{regularizer.name}, solver {regularizer.solver}" if regularizer.name != "none" else "none"),
        ("its strength β (layers solved together)", ", ".join(f"{b} ({count})" for b, count in summary.betas.items())),
        ("refinement passes after GPTQ", f"at most {q.refine_passes}"),
        *([("tuning", summary.tuning.in_words)] if summary.tuning is not None and summary.has_tuned else []),
        ("blocks", f"mode {execution.mode}, {counted(execution.rounds, 'round')}{_CALIBRATED[execution.mode]}"),
        *(("smoothed inputs", kind.in_words) for kind in summary.smoothing),
        *_coverage(summary),
        ("left as they are by configuration", ", ".join(q.ignore) or "nothing"),
        ("other settings for", ", ".join(q.overrides) or "nothing"),
        *([("corrections of low rank (ASER)", summary.corrections.in_words)] if summary.corrections else []),
        (f"mean relative layer error{before}", f"{summary.mean_relative_error:.3g}"),
    ]


def _coverage(summary: Summary) -> list[tuple[str, str]]:
    """Return the row about how much is quantized; none for runs of versions that did not count it."""
    if summary.coverage is None:
        return []
    return [("weights", "; ".join(filter(None, [summary.coverage.in_words, summary.coverage.copied_in_words])))]


def _sizes(summary: Summary) -> str:
    """Say how large the result is, of how much."""
    adapter = summary.corrections
    included = f" with its adapter ({decimal(adapter.size_bytes)})" if adapter is not None else ""
    return f"{decimal(summary.total_bytes)}{included} of {decimal(summary.bytes_read)}"


def _spent_by(summary: Summary) -> str:
    """Say by what an average of bits was spent; empty where widths are configured."""
    measures = {"nats": "the nats that each layer is predicted to cost", "relative error": "relative layer errors"}
    return f" on average, spent by {measures[summary.widths_by]}" if summary.widths_by else ""


def _are_served(layout: str, widths: Collection[int]) -> bool:
    """Tell whether servers have kernels for all of these widths."""
    return set(widths) <= set(_SERVED_BITS[layout])


def _is_served(config: RunConfig, widths: Collection[int]) -> bool:
    """Tell whether a server takes a model of these widths with its inputs."""
    return _are_served(config.quantization.format, widths) and not config.activations.has_clips


def _without_places(config: RunConfig, identity: Identity) -> tuple[dict[str, Any], bool]:
    """Return the resolved configuration with commits of datasets, without what depends on the place where it ran.

    The second value tells whether paths were shortened.
    """
    plain = config.plain()
    del plain["publish"], plain["model"]["cache_dir"], plain["execution"]["ray_address"]
    del plain["output"]["activations_dir"], plain["output"]["track"]
    texts = plain["calibration"]["sources"] or [plain["calibration"]]
    names = {("output", "dir"): _last_part(plain["output"]["dir"])}
    if identity.commit is None and ":" not in plain["model"]["source"]:  # it is a folder here, and no place elsewhere
        names["model", "source"] = _last_part(plain["model"]["source"])
    shortened = False
    for (section, key), name in names.items():
        shortened |= plain[section][key] != name
        plain[section][key] = name
    for number, text in enumerate(texts):
        name = name_elsewhere(text["source"])
        shortened |= text["source"] != name
        text["source"] = name
        text["revision"] = (identity.texts or {}).get(str(number), {}).get("commit", text["revision"])
    return plain, shortened


def _last_part(path: str) -> str:
    """Return the name of a folder without the path to it, which a reader elsewhere does not have."""
    return PurePath(path).name or path


def _texts(config: RunConfig, identity: Identity, python: str) -> str:
    """Say in words which texts the sequences are of."""
    recorded = identity.texts or {}
    parts = []
    for number, text in enumerate(config.calibration.texts):
        taken = recorded.get(str(number), {})
        name = f"`{name_elsewhere(text.source)}`"
        if text.source == PYTHON_DOCS:
            name = f"the Python language reference of CPython {python} (`pydoc_data.topics`)"
        elif "commit" in taken:
            subset = f"subset `{text.subset}`, " if text.subset else ""
            link = f"[{text.source}](https://huggingface.co/datasets/{text.source})"
            name = f"{link} ({subset}split `{text.split}`, commit `{taken['commit']}`)"
        parts.append(f"{name}, {taken['samples']} of them" if config.calibration.sources and taken else name)
    return "; ".join(parts)


def _linked(text: str, target: str | None) -> str:
    return f"[{text}]({target})" if target else text


def _cell(text: str) -> str:
    """Escape the text of a table's cell, which the sign | would end."""
    return text.replace("|", "\\|")
