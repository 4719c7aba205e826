"""Whole runs whose layers have corrections of low rank: the adapter, what is measured, who reads it."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
import transformers
from rich.filesize import decimal
from safetensors.torch import load_file, save_file

from astro.activation_config import Reconstruction
from astro.errors import CheckpointError, ConfigError
from astro.quantization.unrounded_inputs import UnroundedInputs
from astro_dist import pipeline
from astro_dist.config.schema import PublishConfig
from astro_dist.evaluation.block_weights import BlockWeights
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.export.adapter_file import AdapterFile
from astro_dist.export.named_model import find_model
from astro_dist.export.verify import verify_model
from astro_dist.planning.correction_cost import correction_size
from astro_dist.planning.validate import prepare
from astro_dist.publish.publication import publish_run
from astro_dist.report.command_output import summary_lines, verification_lines
from astro_dist.report.findings import Findings
from astro_dist.report.forecast import plan
from astro_dist.report.html import write_report
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import read_summary
from tests.astro_dist.test_modes import SEQUENTIAL
from tests.astro_dist.test_pipeline import perplexity
from tests.astro_dist.test_smoothing import with_outliers
from tests.support.models import LLAMA, files_of, write_checkpoint
from tests.support.publish_faults import published

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
RANK = {"reconstruction__rank": 8, "quantization__bits": 3}
MODES = {"blocks": {}, "rounds": {"execution__rounds": 2}, "sequential": SEQUENTIAL}


def with_adapter(folder):
    # PEFT looks at a layer's weight, which a layer has once it is decompressed.
    settings = transformers.CompressedTensorsConfig(run_compressed=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    return peft.PeftModel.from_pretrained(model, folder, subfolder="adapter").eval()


@pytest.fixture
def finished(run_config, tmp_path):
    """Copies of the folders of a finished run: of the run, and of its model alone. It is done once."""
    if "run" not in FINISHED:
        FINISHED["model"] = pipeline.quantize(run_config(**RANK)).model
        FINISHED["run"] = tmp_path / "run"
    else:
        shutil.copytree(FINISHED["run"], tmp_path / "run")
    alone = shutil.copytree(FINISHED["model"], tmp_path / "alone")
    return tmp_path / "run", alone


FINISHED = {}


def tokens_of(run):
    return load_file(run / "tokens.safetensors")["h0000"]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_peft_computes_what_was_measured(run_config, tmp_path, mode):
    summary = pipeline.quantize(run_config(**RANK, **MODES[mode]))
    folder, tokens = Path(summary.model), tokens_of(tmp_path / "run")
    assert perplexity(with_adapter(folder), tokens) == pytest.approx(summary.perplexity.quantized, rel=1e-5)
    bare = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert perplexity(bare, tokens) != pytest.approx(summary.perplexity.quantized, rel=1e-4)


@torch.no_grad()
def test_our_evaluation_computes_what_peft_does(finished):
    run, folder = finished
    tokens = tokens_of(run)[:2]
    model = StreamedModel(find_model(str(run)), JudgeSettings(device="cpu", dtype="float32"))
    expected = with_adapter(folder)(tokens).logits
    for _ in range(2):  # a second reading corrects no layer twice
        (hidden,) = model.last_hidden([tokens])
        with model.head_loaded():
            assert torch.allclose(model.logits(tokens, hidden), expected, atol=1e-5)
    assert model.keep_if_it_fits()
    (hidden,) = model.last_hidden([tokens])
    with model.head_loaded():
        assert torch.allclose(model.logits(tokens, hidden), expected, atol=1e-5)


@torch.no_grad()
def test_ranks_that_differ_are_read_by_peft(run_config, tmp_path):
    changes = {"reconstruction__rank": "auto", "reconstruction__energy": 0.6, "quantization__bits": 3}
    summary = pipeline.quantize(run_config(**changes))
    assert summary.corrections.least_rank < summary.corrections.largest_rank
    content = json.loads((Path(summary.model) / "adapter" / "adapter_config.json").read_text())
    assert content["r"] == content["lora_alpha"] == summary.corrections.largest_rank
    assert content["rank_pattern"] == content["alpha_pattern"] != {}
    measured = perplexity(with_adapter(Path(summary.model)), tokens_of(tmp_path / "run"))
    assert measured == pytest.approx(summary.perplexity.quantized, rel=1e-5)


def test_corrections_lower_errors_and_divergence_and_cost_what_is_said(run_config, tmp_path):
    plain = pipeline.quantize(run_config(output__dir=str(tmp_path / "plain"), quantization__bits=3))
    summary = pipeline.quantize(run_config(**RANK))
    figures, folder = summary.corrections, Path(summary.model)
    assert summary.mean_relative_error < 0.8 * plain.mean_relative_error
    assert summary.perplexity.divergence < plain.perplexity.divergence
    assert figures.error_before == pytest.approx(plain.mean_relative_error, rel=1e-6)
    assert figures.error_after == pytest.approx(summary.mean_relative_error)
    # Of each of 3 blocks: q and o 64 × 64, k and v 64 × 32, gate and up 64 × 128, down 128 × 64.
    assert figures.weights == 3 * 8 * (2 * 128 + 2 * 96 + 3 * 192)
    assert (figures.layers, figures.least_rank, figures.largest_rank) == (21, 8, 8)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == figures.weights
    assert figures.size_bytes == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert plain.corrections is None
    assert not (tmp_path / "plain" / "model" / "adapter").exists()
    assert read_summary(tmp_path / "run" / "summary.json") == summary
    blocks = RunDirectory(tmp_path / "run", "").blocks().values()
    assert all(layer.relative_error < layer.solved_error for block in blocks for layer in block.layers)


@pytest.mark.parametrize("mode", MODES)
def test_corrections_know_how_inputs_of_four_bits_round(run_config, llama, tmp_path, monkeypatch, mode):
    """As far as sums over shares, files of parts and rounds carry it."""
    with_outliers(llama)
    changes = {"reconstruction__rank": 8, "activations__bits": 4, "quantization__group_size": 64, **MODES[mode]}
    errors = []
    for name, workers in (("known", 3), ("unknown", 1)):
        if name == "unknown":
            monkeypatch.setattr(UnroundedInputs, "of", lambda input_groups: None)
        config = run_config(output__dir=str(tmp_path / name), execution__workers=workers, **changes)
        errors.append(pipeline.quantize(config).corrections)
    known, unknown = errors
    assert known.error_before == pytest.approx(unknown.error_before, rel=0.1 if mode != "blocks" else 1e-6)
    assert known.error_after < 0.9 * unknown.error_after


def test_factors_have_sixteen_bits_whatever_the_source_has(run_config, tmp_path):
    for dtype, stored in ((torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        source = write_checkpoint(tmp_path / str(dtype), transformers.LlamaConfig(**LLAMA), dtype)
        config = run_config(**RANK, model__source=str(source), output__dir=str(tmp_path / f"run-{dtype}"))
        summary = pipeline.quantize(config)
        path = Path(summary.model) / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        assert {tensor.dtype for tensor in tensors.values()} == {stored}
        foretold = correction_size(prepare(config).plan.blocks, config.reconstruction).size_bytes
        assert sum(tensor.nbytes for tensor in tensors.values()) == foretold
        assert summary.corrections.error_after < 0.8 * summary.corrections.error_before


@torch.no_grad()
def test_card_says_what_transformers_leaves_unrounded(run_config, tmp_path, monkeypatch):
    config = run_config(**RANK, activations__bits=8, activations__smoothing="smoothquant", activations__kv_cache="fp8")
    folder, tokens = Path(pipeline.quantize(config).model), tokens_of(tmp_path / "run")[:2]
    card = (folder / "README.md").read_text()
    assert "which leaves inputs as they are where weights are decompressed, as the adapter wants it; it rounds" in card
    expected = with_adapter(folder)(tokens).logits
    model = StreamedModel(find_model(str(tmp_path / "run")), JudgeSettings(device="cpu", dtype="float32"))
    results = []
    for is_rounded in (True, False):
        if not is_rounded:
            monkeypatch.setattr(BlockWeights, "rounding", lambda self, index: nullcontext())
        (hidden,) = model.last_hidden([tokens])
        with model.head_loaded():
            results.append(model.logits(tokens, hidden))
    assert not torch.allclose(results[0], expected, atol=1e-4)
    assert torch.allclose(results[1], expected, atol=1e-5)


def test_corrections_are_shown(run_config, tmp_path):
    config = run_config(**RANK)
    prepared = prepare(config)
    foretold, size = plan(config), prepared.corrections.size_bytes
    line = str(foretold).splitlines()[1]
    assert f"→ {decimal(prepared.plan.written_bytes + size)} (" in line
    assert line.endswith("of the source, corrections included)")
    assert foretold.to_json()["corrections_bytes"] == size
    assert "→ at most " in str(plan(run_config(reconstruction__rank="auto")))
    notes = prepared.notes
    assert any("21 layers get a correction of low rank" in note and "more multiplications" in note for note in notes)
    summary = pipeline.quantize(config)
    words = summary.corrections.in_words
    assert words.startswith("corrections of rank 8 beside 21 layers: ")
    assert any("corrections of rank 8"[1:] in line and "adapter" in line for line in summary_lines(summary, config))
    adapter = summary.corrections.size_bytes
    assert summary.total_bytes == summary.bytes_written + adapter
    assert any(line.startswith(f"{decimal(summary.total_bytes)} written, ") for line in summary_lines(summary, config))
    card = (Path(summary.model) / "README.md").read_text()
    total, read = decimal(summary.total_bytes), decimal(summary.bytes_read)
    assert f"{total} with its adapter ({decimal(adapter)}) of {read}" in card
    for shown in (words, "quantized, with its adapter", 'subfolder="adapter"', "--max-lora-rank 8", "2411.07762"):
        assert shown in card
    page = write_report(Findings.read(tmp_path / "run")).read_text()
    assert words[1:] in page


def test_a_run_without_corrections_says_nothing_of_them(run_config, tmp_path):
    summary = pipeline.quantize(run_config())
    card = (Path(summary.model) / "README.md").read_text()
    assert "adapter" not in card
    assert "2411.07762" not in card
    assert "corrections" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert verify_model(tmp_path / "run").num_corrections == 0


def change_config(folder, **changes):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(folder, change):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: change_config(folder, lora_alpha=16), "expected lora_alpha 8"),
        (lambda folder: change_config(folder, target_modules=["q_proj"]), "expected target_modules"),
        (lambda folder: (folder / "adapter" / "adapter_config.json").unlink(), "adapter_config.json: is missing"),
        (lambda folder: change_tensor(folder, lambda t: t[FIRST].fill_(float("nan"))), "q_proj holds NaN or Inf"),
        (lambda folder: change_tensor(folder, lambda t: t.pop(FIRST)), "only one of its two factors"),
        (
            lambda folder: change_tensor(folder, lambda t: t.update({FIRST: torch.zeros(8, 62, dtype=torch.bfloat16)})),
            r"corrects model.layers.0.self_attn.q_proj as \(64, 62\), it is \(64, 64\)",
        ),
        (
            lambda folder: change_tensor(folder, lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)})),
            "lm_head.weight is no tensor of a LoRA adapter",
        ),
    ],
)
def test_a_damaged_adapter_is_found(finished, damage, message):
    _, folder = finished
    verified = verify_model(folder)
    assert verified.num_corrections == 21
    assert "21 corrections of low rank" in verification_lines(verified, None)[-1]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        verify_model(folder)


def test_an_adapter_that_is_gone_or_changed_is_made_anew(run_config, tmp_path):
    folder = Path(pipeline.quantize(run_config(**RANK)).model)
    path = folder / "adapter" / "adapter_model.safetensors"
    written = path.read_bytes()
    path.write_bytes(written[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: is gone, or is not as the run wrote it"):
        verify_model(folder)
    pipeline.quantize(run_config(**RANK))
    assert path.read_bytes() == written
    sorted((tmp_path / "run" / "adapter").iterdir())[0].write_bytes(b"nothing")
    path.unlink()
    pipeline.quantize(run_config(**RANK))
    assert path.read_bytes() == written


def test_experts_get_no_correction_which_is_said(run_config, tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128,
    )  # fmt: skip
    source = write_checkpoint(tmp_path / "moe", config)
    changes = {"model__source": str(source), "experts__min_tokens": 1, "reconstruction__rank": 4}
    summary = pipeline.quantize(run_config(**changes))
    assert any("24 layers of experts get no correction" in note for note in summary.notes)
    adapter = AdapterFile.of(find_model(str(tmp_path / "run")))
    assert set(adapter.ranks) == {
        f"model.layers.{block}.self_attn.{name}_proj" for block in range(2) for name in "qkvo"
    }
    verify_model(tmp_path / "run")
    with pytest.raises(ConfigError, match="reconstruction.rank: no quantized layer can have a correction"):
        prepare(run_config(quantization__ignore=["*.self_attn.*"], **changes))


def test_the_adapter_is_published_in_the_same_commit(finished, online_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, alone = finished
    commit = publish_run(run, PublishConfig(repo="org/model")).commit
    files = published(online_hub, "org/model")
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files.keys()
    assert files == files_of(run / "model", with_card=True)
    assert len(online_hub.commits) == 1
    name = f"org/model@{commit}"
    assert verify_model(name).num_corrections == verify_model(alone).num_corrections == 21
    there, here = (AdapterFile.of(find_model(str(model))) for model in (name, alone))
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(there.corrections([first])[first].A, here.corrections([first])[first].A)


HELD = {
    "activations__bits": 8, "activations__smoothing": "aser", "activations__outlier_channels": 6,
    "quantization__group_size": -1, "reconstruction__rank": 8,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_corrections_that_hold_outlier_channels_leave_less(run_config, llama, tmp_path, monkeypatch, mode):
    source = {"model__source": str(with_outliers(llama))}
    config = run_config(**source, **HELD, **MODES[mode])
    held = pipeline.quantize(config)
    assert "**The model is of no use without it:**" in (Path(held.model) / "README.md").read_text()
    assert any("corrections alone hold the weights of the 6 outlier channels" in note for note in held.notes)
    alone = shutil.copytree(held.model, tmp_path / "alone", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(CheckpointError, match="alone holds the weights of its outlier channels; the model is of no"):
        verify_model(str(alone))
    monkeypatch.setattr(Reconstruction, "holds_channels", lambda *_: False)
    plain = pipeline.quantize(run_config(**source, **HELD, **MODES[mode], output__dir=str(tmp_path / "plain")))
    assert any("aser without corrections of rank 6 or more" in note for note in plain.notes)
    errors = verify_model(held.model, llama).relative_weight_errors
    assert 0 < max(errors.values()) < 0.3, "they are those of weights with their corrections"
    (alone / "smoothing.json").unlink()
    assert max(verify_model(alone, llama).relative_weight_errors.values()) > 0.5
    assert held.corrections.error_after < plain.corrections.error_after
    assert held.corrections.error_before > 2 * plain.corrections.error_before, "it is of no use without the adapter"
    assert held.corrections.size_bytes == plain.corrections.size_bytes
    assert held.perplexity.divergence < plain.perplexity.divergence


@pytest.mark.parametrize("mode", MODES)
def test_corrections_that_hold_channels_are_the_same_for_any_number_of_workers(run_config, llama, tmp_path, mode):
    source = {"model__source": str(with_outliers(llama))}
    files = []
    for workers in (1, 3):
        config = run_config(
            **source, **HELD, **MODES[mode], execution__workers=workers, output__dir=str(tmp_path / str(workers))
        )
        files.append(files_of(Path(pipeline.quantize(config).model)))
    assert files[0] == files[1]
