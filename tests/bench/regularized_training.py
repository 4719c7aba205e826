"""What activation regularization does to a small model: section Regularized training of README.md here.

    python tests/bench/regularized_training.py --text TEXT.parquet --out DIR

It trains a Llama of about 6 million parameters four ways: plainly, with rounded inputs, with the kurtosis of outputs in
the loss, and with both. On the way it counts outlier channels. Then it quantizes the weights per output channel, by
rounding to nearest and by Astro + GPTQ, and measures perplexity on held-out text. Inputs are as they are, rounded to 4
bits with a scale for each token, and rounded between the learned clips; Astro + GPTQ solves the weights for just these
inputs. It prints tables in Markdown. A way whose figures are in DIR is not repeated.

The tokenizer is made of the text.
"""

import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro.model.clipped_rounding import round_clipped
from astro.model.clips_file import CLIPS_FILE
from astro_dist import pipeline
from astro_dist.config.schema import RunConfig, TextSource
from astro_dist.config.training import TrainConfig
from astro_dist.evaluation.inspection import InspectRequest, inspect_model
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.source.whole_text import read_rows
from astro_dist.training.loop import Outlet, Trainer
from astro_dist.training.parallel import Place
from astro_dist.training.token_file import write_tokens
from tests.support.dequantized import write_dequantized

WAYS = {"plain": (None, 0.0), "inputs": (4, 0.0), "outputs": (None, 1.0), "both": (4, 1.0)}
"""Bits of inputs, and the share of λ, by name of the way."""
METHODS = {
    "RTN": {
        "quantization": {"method": "rtn", "scale_search": "minmax", "refine_passes": 0, "compensation": 0},
        "regularizer": {"name": "none"},
        "calibration": {"token_weights": "none"},
    },
    "Astro + GPTQ": {},
}
INPUTS = {"A16": {}, "A4": {"bits": 4}, "A4 clips": {"bits": 4, "clips": "from-checkpoint"}}
"""The section `activations` by how inputs are rounded."""
HELD_OUT_EVERY = 10
CPU = torch.device("cpu")


def split_text(path: str, out: Path) -> tuple[Path, Path]:
    """Write the text to train on, and every tenth document, which is held out."""
    if path == "python-docs":
        from pydoc_data import topics

        rows = [text for _, text in sorted(topics.topics.items())]
    else:
        rows = [row for row in read_rows(TextSource(source=path, column="auto", share=1.0), "--text") if row]
    files = out / "train.jsonl", out / "held-out.jsonl"
    parts = ([r for i, r in enumerate(rows) if i % HELD_OUT_EVERY], rows[::HELD_OUT_EVERY])
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in part), encoding="utf-8")
    return files


def write_source(options: argparse.Namespace, text: Path, folder: Path) -> None:
    """Write the config of the model, and a tokenizer that is made of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rows = (json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator(rows, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder)
    transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        max_position_embeddings=options.sequence_length, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    ).save_pretrained(folder)  # fmt: skip


def training_config(options: argparse.Namespace, way: str, text: Path) -> TrainConfig:
    """Return the configuration of one way."""
    bits, share = WAYS[way]
    return TrainConfig.model_validate(
        {
            "model": {"source": str(options.out / "source")},
            "text": {"source": str(text), "sequence_length": options.sequence_length},
            "regularization": {"input_bits": bits, "kurtosis": share * options.kurtosis, "outputs": options.outputs},
            "optimization": {
                "steps": options.steps, "batch_sequences": options.batch, "micro_batch_sequences": options.micro_batch,
                "learning_rate": options.learning_rate, "warmup_steps": max(options.steps // 20, 1),
                "precision": options.precision,
            },
            "execution": {"executor": "local", "device": "cpu", "threads_per_worker": options.threads},
            "output": {
                "dir": str(options.out / way), "checkpoint_every": max(options.steps // options.looks, 1),
                "report_every": max(options.steps // 50, 1),
            },
        }
    )  # fmt: skip


def look_at(model: Path, text: Path, options: argparse.Namespace) -> dict:
    """Count the outlier channels of a model, and average the kurtosis of its outputs."""
    request = InspectRequest(
        text=TextSource(source=str(text), column="text", share=1.0), window=options.sequence_length,
        limit=options.windows,
    )  # fmt: skip
    layers = inspect_model(str(model), request, JudgeSettings(device="cpu", dtype="float32")).now.layers
    return {
        "outlier_channels": sum(len(layer.outlier_channels) for layer in layers),
        "largest_ratio": max(layer.input_ratio for layer in layers),
        "input_kurtosis": sum(layer.input_kurtosis for layer in layers) / len(layers),
        "output_kurtosis": sum(layer.output_kurtosis for layer in layers) / len(layers),
        "weight_ratio": max(layer.weight_ratio for layer in layers),
    }


def train_one_way(options: argparse.Namespace, way: str, text: Path, held_out: Path) -> dict:
    """Train, look at the model on the way, and return what was seen and the seconds that training itself took."""
    config = training_config(options, way, text)
    folder = options.out / way
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.out / "source")
    tokens = write_tokens(config.text, tokenizer, len(tokenizer), options.out / "tokens.bin")
    trainer = Trainer(config, tokens, Place(0, 1, CPU))
    looks, looking_s = [], 0.0

    def look(step: int, _: object = None) -> None:
        nonlocal looking_s
        begin = time.perf_counter()
        shutil.rmtree(folder / "now", ignore_errors=True)
        trainer.write(folder / "now")
        looks.append({"step": step, **look_at(folder / "now", held_out, options)})
        looking_s += time.perf_counter() - begin

    def say(kind: str, event: dict) -> None:
        if kind == "step":
            losses.append(event["loss"])
            print(f"{way}: step {event['step']}, loss {event['loss']:.4f}", file=sys.stderr, flush=True)

    losses: list[float] = []
    begin = time.perf_counter()
    trainer.run(Outlet(say, look))
    seconds = time.perf_counter() - begin - looking_s
    look(options.steps)
    (folder / "now").rename(folder / "model")
    trainer.regularizer.detach()
    return {"loss": losses[-1], "looks": looks, "seconds": seconds, "parameters": trainer.num_parameters}


def round_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round the inputs of a layer to a symmetric grid whose scale is the token's largest magnitude."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
    return (x / scale).round().clamp(-most - 1, most) * scale


@contextlib.contextmanager
def rounded_inputs(model: torch.nn.Module, clips: dict[str, torch.Tensor] | None):
    """Round the inputs of all linear layers of blocks to 4 bits: per token, or between learned clips."""
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            pair = clips[f"{name}.input_clips"] if clips else None

            def hook(_, args, pair=pair):
                return (round_token(args[0], 4) if pair is None else round_clipped(args[0], pair, 4), *args[1:])

            hooks.append(module.register_forward_pre_hook(hook))
    yield
    for handle in hooks:
        handle.remove()


@torch.no_grad()
def perplexity_of(model: torch.nn.Module, sequences: torch.Tensor) -> float:
    """Measure the perplexity of a model on held-out sequences."""
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in sequences]
    return math.exp(sum(losses) / len(losses))


def perplexity_with(folder: Path, sequences: torch.Tensor, inputs: str, clips: dict[str, torch.Tensor] | None) -> float:
    """Measure a model with inputs as they are, rounded per token, or rounded between learned clips."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if inputs == "A16":
        return perplexity_of(model, sequences)
    with rounded_inputs(model, clips if inputs == "A4 clips" else None):
        return perplexity_of(model, sequences)


def quantized(options: argparse.Namespace, way: str, method: str, bits: int, inputs: str, text: Path) -> Path:
    """Quantize the weights of a trained model per output channel, and return a folder with dequantized weights."""
    if method == "RTN":
        inputs = "A16"  # the weights are the same whatever the inputs
    model = options.out / way / "model"
    folder = options.out / way / f"{method} {bits} {inputs}".replace(" + ", "-").replace(" ", "-")
    target = folder / "dequantized"
    if not target.exists():
        content = {
            "model": {"source": str(model)},
            "calibration": {
                "source": str(text), "samples": options.samples, "sequence_length": options.sequence_length,
                "holdout_samples": 0,
            },
            "execution": {"executor": "local", "device": "cpu", "threads_per_worker": options.threads},
            "output": {"dir": str(folder)},
            "quantization": {"bits": bits, "group_size": -1},
            "activations": INPUTS[inputs],
        }  # fmt: skip
        for section, keys in METHODS[method].items():
            content[section] = {**content.get(section, {}), **keys}
        pipeline.quantize(RunConfig.model_validate(content))
        write_dequantized(model, folder / "model", target)
    return target


def measure_way(options: argparse.Namespace, way: str, text: Path, held_out: Path) -> dict:
    """Train a model one way, quantize it, and return all figures; those that are there already are read."""
    path = options.out / f"{way}.json"
    if path.exists():
        return json.loads(path.read_text())
    figures = train_one_way(options, way, text, held_out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.out / "source")
    rows = (json.loads(line)["text"] for line in held_out.read_text(encoding="utf-8").splitlines())
    ids = [token for row in rows for token in [*tokenizer(row, verbose=False)["input_ids"], tokenizer.eos_token_id]]
    count = min(len(ids) // options.sequence_length, options.windows)
    sequences = torch.tensor(ids[: count * options.sequence_length]).view(count, -1)
    model, clips = options.out / way / "model", None
    if (model / CLIPS_FILE).exists():
        with safe_open(model / CLIPS_FILE, "pt") as file:
            clips = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kinds = [inputs for inputs in INPUTS if clips or inputs != "A4 clips"]
    figures["perplexity"] = {"W16": {inputs: perplexity_with(model, sequences, inputs, clips) for inputs in kinds}}
    for bits in options.bits:
        for method in METHODS:
            figures["perplexity"][f"W{bits} {method}"] = {
                inputs: perplexity_with(quantized(options, way, method, bits, inputs, text), sequences, inputs, clips)
                for inputs in kinds
            }
    path.write_text(json.dumps(figures, indent=1))
    return figures


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Write a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_tables(results: dict[str, dict]) -> None:
    """Print the perplexities of every way, and what was seen along training."""
    first = next(iter(results.values()))
    print(f"{first['parameters'] / 1e6:.1f}M parameters; seconds of training: "
          + ", ".join(f"{way} {result['seconds']:.0f}" for way, result in results.items()), end="\n\n")  # fmt: skip
    rows = [
        [f"{weights}, {inputs}", *(f"{r['perplexity'][weights].get(inputs, math.nan):.2f}" for r in results.values())]
        for weights in first["perplexity"]
        for inputs in INPUTS
    ]
    print(table(["perplexity", *results], [[row[0], *(c.replace("nan", "-") for c in row[1:])] for row in rows]))
    print()
    figures = ["outlier_channels", "largest_ratio", "input_kurtosis", "output_kurtosis", "weight_ratio"]
    rows = [
        [way, str(look["step"]), str(look["outlier_channels"]), *(f"{look[name]:.1f}" for name in figures[1:])]
        for way, result in results.items()
        for look in result["looks"]
    ]
    print(table(["trained", "step", *(name.replace("_", " ") for name in figures)], rows))


def main() -> None:
    """Train, quantize, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--kurtosis", type=float, default=5e-4, help="λ of the ways that have it")
    parser.add_argument("--outputs", choices=["all", "residual"], default="all")
    parser.add_argument("--looks", type=int, default=6, help="how often outlier channels are counted")
    parser.add_argument("--windows", type=int, default=64, help="most sequences of held-out text")
    parser.add_argument("--samples", type=int, default=64, help="sequences to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    text, held_out = split_text(options.text, options.out)
    if not (options.out / "source" / "config.json").exists():
        write_source(options, text, options.out / "source")
    print_tables({way: measure_way(options, way, text, held_out) for way in options.ways})


if __name__ == "__main__":
    main()
