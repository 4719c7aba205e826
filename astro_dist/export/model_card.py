"""The card of a finished model: metadata that the Hub reads, and what was done, from the run's records alone."""

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import huggingface_hub
import yaml

from astro.formats import LAYOUTS
from astro_dist.config.schema import RunConfig
from astro_dist.console import in_words
from astro_dist.source.model_info import BaseModel

__all__ = ["metadata", "model_card", "planned_card"]

_HUB = "https://huggingface.co"
_SERVED_BITS = (4, 8)
_METHODS = {
    "astro": "Astro regularization", "magr": "MagR regularization", "none": "", "gptq": "GPTQ",
    "rtn": "rounding to nearest",
}  # fmt: skip
_SCALES = {
    "hessian": "searched under the error that GPTQ will pay for", "mse": "searched by mean square error",
    "minmax": "cover the whole range",
}  # fmt: skip
_CITATIONS = """\
```bibtex
@article{chen2026astro,
  title   = {Astro: Activation-guided Structured Regularization for Outlier-Robust LLM Post-Training Quantization},
  author  = {Chen, Xi and Li, Ming and Li, Junxi and Li, Changsheng and Wang, Peisong and Ding, Lizhong and Yuan, Ye and
             Wang, Guoren},
  journal = {arXiv preprint arXiv:2602.07596},
  year    = {2026}
}
@article{frantar2022gptq,
  title   = {{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers},
  author  = {Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan},
  journal = {arXiv preprint arXiv:2210.17323},
  year    = {2022}
}
```"""


def metadata(
    config: RunConfig, base: BaseModel, widths: Collection[int], repository: str | None
) -> huggingface_hub.ModelCardData:
    """What the Hub reads of a card.

    Args:
        config: of the run.
        base: what was quantized.
        widths: of quantized layers, in bits; those that are possible, where a run is yet to choose.
        repository: ORG/NAME that the model goes to, if any.
    """
    regularizer, quantization = config.regularizer.name, config.quantization
    methods = [quantization.method, *([regularizer] if regularizer != "none" else [])]
    return huggingface_hub.ModelCardData(
        base_model=base.name,
        base_model_relation="quantized" if base.name else None,
        library_name="transformers",
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=list(base.language) or None,
        pipeline_tag="text-generation",
        quantized_by=repository.partition("/")[0] if repository else "astro-dist",
        tags=[
            "quantized",
            f"{next(iter(widths))}-bit" if len(widths) == 1 else "mixed-precision",
            quantization.format,
            *methods,
            "astro-dist",
            *(["vllm"] if _are_served(widths) else []),
        ],
    )


def planned_card(config: RunConfig, base: BaseModel) -> huggingface_hub.ModelCard:
    """The metadata that the card of a run will have, as far as it is known before."""
    q = config.quantization
    data = metadata(config, base, q.bit_choices if q.bits == "auto" else {q.bits}, config.publish.repo)
    return huggingface_hub.ModelCard(f"---\n{data}\n---\n")


def model_card(
    config: RunConfig,
    summary: Mapping[str, Any],
    base: BaseModel,
    blocks: Sequence[Mapping[str, Any]],
    identity: Mapping[str, Any],
    repository: str | None,
) -> huggingface_hub.ModelCard:
    """The card of a finished run.

    Args:
        config: of the run.
        summary: its figures.
        base: what was quantized.
        blocks: records of its blocks, of the last round.
        identity: of the run: version, commit and hashes.
        repository: ORG/NAME that the model goes to, if any.
    """
    layers = [layer for block in blocks for layer in block["layers"]]
    widths = {layer["bits"] for layer in layers}
    place = repository or "FOLDER"
    data = metadata(config, base, widths, repository)
    sections = {
        "Accuracy": _accuracy(config, summary),
        "How it was quantized": _method(config, summary) + "\n\n" + _by_kind(layers),
        "Calibration data": _calibration(config, summary, identity),
        "What was degraded, what to know": _degraded(summary),
        "How to load it": _loading(config, widths, place),
        "Hardware and time": _effort(blocks, summary),
        "How to reproduce it": _reproduction(config, base, identity),
        "Citations": _CITATIONS,
    }
    text = "\n\n".join(f"## {title}\n\n{section}" for title, section in sections.items())
    name = repository.partition("/")[2] if repository else PurePath(config.output.dir).name
    opening = _opening(config, summary, base, identity)
    return huggingface_hub.ModelCard(f"---\n{data}\n---\n\n# {name}\n\n{opening}\n\n{text}\n")


def _opening(config: RunConfig, summary: Mapping[str, Any], base: BaseModel, identity: Mapping[str, Any]) -> str:
    original = f"[{base.name}]({_HUB}/{base.name})" if base.name else PurePath(config.model.source).name
    done = [_METHODS[config.regularizer.name], _METHODS[config.quantization.method]]
    return (
        f"{original}, its linear layers quantized to {summary['average_bits']:.3g} bits a weight by astro-dist "
        f"{identity['version']} ({' and '.join(filter(None, done))}), format `{config.quantization.format}`, "
        f"{_size(summary['bytes_written'])} of {_size(summary['bytes_read'])}. {_terms(base)} {base.remark}"
    ).strip()


def _terms(base: BaseModel) -> str:
    gate = " Access to the original has to be asked for." if base.gated else ""
    if base.license == "unknown":
        return "The original tells no license." + gate
    name = base.license_name or base.license
    return f"License: {f'[{name}]({base.license_link})' if base.license_link else name}, the original's own.{gate}"


def _accuracy(config: RunConfig, summary: Mapping[str, Any]) -> str:
    perplexity, calibration = summary["perplexity"], config.calibration
    if perplexity["original"] is None:
        return "Perplexity was not measured (no held-out sequences). Test the model before you rely on it."
    change = perplexity["quantized"] / perplexity["original"] - 1
    rows = [
        ("original", f"{perplexity['original']:.3f}", ""),
        ("quantized", f"{perplexity['quantized']:.3f}", f"{change:+.1%}"),
    ]
    return _table(("", "perplexity", "change"), rows) + (
        f"\n\nOn {calibration.holdout_samples} sequences of {calibration.sequence_length} tokens of the calibration "
        "text's own kind that the quantization has not seen. It tells what was lost on "
        "such text, and nothing of other tasks."
    )


def _method(config: RunConfig, summary: Mapping[str, Any]) -> str:
    q, regularizer, execution = config.quantization, config.regularizer, config.execution
    group = "a whole row" if q.group_size == -1 else f"{q.group_size} input columns"
    grid = "symmetric" if q.symmetric else "asymmetric"
    betas = ", ".join(f"{beta} ({count})" for beta, count in summary["betas"].items())
    rows = [
        ("method", _METHODS[q.method]),
        ("bits a weight", f"{summary['average_bits']:.3g}" + (" on average" if q.bits == "auto" else "")),
        ("one scale for", f"{group}, {grid}, {_SCALES[q.scale_search]}"),
        (
            "order of columns",
            "by falling activation energy, stored unpermuted" if q.act_order == "static" else "as stored",
        ),
        ("regularizer", f"{regularizer.name}, solver {regularizer.solver}" if regularizer.name != "none" else "none"),
        ("its strength β (groups of layers)", betas),
        ("refinement passes after GPTQ", f"at most {q.refine_passes}"),
        ("blocks", f"mode {execution.mode}, {execution.rounds} round(s)"),
        ("left as they are", ", ".join(["embeddings, norms, head, gates", *q.ignore])),
        ("other settings for", ", ".join(q.overrides) or "nothing"),
        ("mean relative layer error", f"{summary['mean_relative_error']:.3g}"),
    ]
    return _table(("", ""), rows)


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> str:
    """One row for each kind of layer: layers that share an input were solved together."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer["name"]), []).append(layer)
    rows = []
    for kind, own in kinds.items():
        betas, errors = [layer["beta"] for layer in own], [layer["relative_error"] for layer in own]
        worst = max(own, key=lambda layer: float(layer["relative_error"]))
        rows.append(
            (
                f"`{kind}`", str(len(own)), _span(layer["bits"] for layer in own),
                f"{min(betas):.3g} / {statistics.median_low(betas):.3g} / {max(betas):.3g}",
                f"{statistics.mean(errors):.3g}", f"{max(errors):.3g} (`{worst['name'].partition('+')[0]}`)",
            )
        )  # fmt: skip
    header = ("layers", "groups", "bits", "β least / median / most", "relative error, mean", "largest")
    return _table(header, rows) + "\n\nThe relative error is ‖(Ŵ − W)X‖² / ‖WX‖² on the calibration tokens."


def _calibration(config: RunConfig, summary: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    c = config.calibration
    source = f"`{PurePath(c.source).name}`"
    if c.source == "python-docs":
        source = f"the Python language reference of CPython {summary['python']} (`pydoc_data.topics`)"
    return (
        f"{c.samples} sequences of {c.sequence_length} tokens of {source}, seed {c.seed}. SHA-256 of all tokens, "
        f"those held out among them: `{identity['tokens_sha256']}`."
    )


def _degraded(summary: Mapping[str, Any]) -> str:
    """Every fallback; what was retried came to the same bytes and is only counted."""
    found, lines = summary["fallbacks"], []
    lines += [f"- `{name}`: its damping had to be raised" for name in found["damping_raised"]]
    for policy, names in found["experts"].items():
        lines += [f"- `{name}`: too few tokens reached it, {policy} instead" for name in names]
    lines += [f"- {note}" for note in summary["notes"]]
    lines = lines or ["Nothing: no damping was raised, no layer was rounded for want of data."]
    retries = len(summary["retries"])
    return "\n".join(lines) + (f"\n\n{retries} calls failed and were done again." if retries else "")


def _are_served(widths: Collection[int]) -> bool:
    """Whether servers have kernels for all of these widths."""
    return set(widths) <= set(_SERVED_BITS)


def _loading(config: RunConfig, widths: Collection[int], place: str) -> str:
    packages = LAYOUTS[config.quantization.format].READER_PACKAGES
    servers = f"```\nvllm serve {place}\npython -m sglang.launch_server --model-path {place}\n```"
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    return (
        (
            f"vLLM or SGLang:\n\n{servers}\n\n"
            if _are_served(widths)
            else "No server has kernels for all of these widths.\n\n"
        )
        + f"transformers (`pip install transformers accelerate {packages}`):\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}", device_map="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n```'
    )


def _effort(blocks: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    devices = Counter(f"{block['device']}, torch {block['torch']}" for block in blocks)
    spent = sum(summary["phases_s"].values())
    resumed = summary["resumed_units"]
    return (
        f"Blocks by device: {'; '.join(f'{count} on {name}' for name, count in devices.items())}. "
        f"{in_words(spent)} of all workers together, {in_words(summary['wall_s'])} from start to end"
        + (f" of the last session, before which {resumed} units were finished." if resumed else ".")
    )


def _reproduction(config: RunConfig, base: BaseModel, identity: Mapping[str, Any]) -> str:
    """The resolved configuration without what is a matter of the place it ran at."""
    plain = config.plain()
    del plain["publish"], plain["model"]["cache_dir"], plain["execution"]["ray_address"]
    for section, key in (("model", "source"), ("calibration", "source"), ("output", "dir")):
        if PurePath(plain[section][key]).is_absolute():
            plain[section][key] = PurePath(plain[section][key]).name
    at = f", commit `{base.commit}` of the original" if base.commit else ""
    return (
        f"astro-dist {identity['version']}{at}, fingerprint of the source `{identity['source_sha256']}`. "
        "`astro-dist quantize` with this file, its paths shortened here to their last part, writes the same bytes on "
        f"the same kind of device:\n\n```yaml\n{yaml.safe_dump(plain, sort_keys=False)}```"
    )


def _kind(name: str) -> str:
    """What layers of every block have in common: their last names, and whether they are an expert's."""
    last = "+".join(member.rpartition(".")[2] for member in name.split("+"))
    return f"experts: {last}" if ".experts." in name else last


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _span(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
