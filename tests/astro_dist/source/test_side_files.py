"""Every file of a repository that is no weights is copied; the list says what is left out."""

import pytest

from astro_dist import pipeline
from astro_dist.planning.validate import prepare
from astro_dist.source.side_files import large_files, list_folder, side_files

COPIED = [
    "configuration_deepseek.py",
    "modeling_deepseek.py",
    "tokenization_kimi.py",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tekken.json",
    "params.json",
    "SYSTEM_PROMPT.txt",
    "hy.tiktoken",
    "tokenizer.tok.json",
    "configuration.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "LICENSE",
    "NOTICE",
    "special_tokens_map.json",
    "generation_config.json",
    "USE_POLICY.md",
    "nano_v3_reasoning_parser.py",
    "chat_templates.json",
    "media_utils.py",
    "sentencepiece.bpe.model",
    "additional_chat_templates/tool_use.jinja",
    "encoding/encoding_dsv32.py",
]
LEFT_OUT = [
    "config.json",
    "README.md",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "spk_dict.pt",
    "model.gguf",
    ".gitattributes",
    ".cache/huggingface/x.json",
    "figures/chart.png",
    "paper.pdf",
    "hf_quant_config.json",
    "__pycache__/a.py",
    "../outside.txt",
    "adapter_config.json",
    "onnx/model.onnx",
    "onnx/tokenizer.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "run/run.json",
    "run/model/vocab.json",
    "metal/model.bin",
    "metal/README.txt",
    "flax_model.msgpack",
    "texts.parquet",
    "train.log",
    "runs/a/events.out.tfevents.1700.host.1.0",
]


def test_what_is_copied_and_what_is_left_out():
    assert side_files(dict.fromkeys(COPIED + LEFT_OUT, 10)) == sorted(COPIED)


def test_a_large_file_is_left_out_and_named(llama, run_config):
    sizes = {"corpus.jsonl": 900_000_000, "a.json": 5, "model.bin": 900_000_000}
    assert (side_files(sizes), large_files(sizes)) == (["a.json"], ["corpus.jsonl"])
    with (llama / "corpus.jsonl").open("wb") as file:
        file.truncate(900_000_000)  # a hole: it takes no room on the disk
    (note,) = [note for note in prepare(run_config()).notes if "corpus.jsonl" in note]
    assert "not copied into the result" in note


def test_the_calibration_text_is_not_published_with_the_model(llama, run_config, tmp_path):
    (llama / "text.txt").write_text("A private text, which stays where it is. " * 400)
    (llama / "SYSTEM_PROMPT.txt").write_text("Be kind.")
    pipeline.quantize(run_config(calibration__source=str(llama / "text.txt")))
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "SYSTEM_PROMPT.txt" in names
    assert "text.txt" not in names


def test_folders_are_listed_by_path_without_hidden_ones_links_and_those_to_avoid(tmp_path):
    for name in ("a.txt", "b/c/d.txt", ".git/x", "run/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("abc")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked.txt").symlink_to(tmp_path / "a.txt")
    listed = list_folder(tmp_path, without=[tmp_path / "run"])
    assert listed == {"a.txt": 3, "b/c/d.txt": 3, "linked.txt": 3}


@pytest.mark.parametrize("name", ["a\\\\b.txt", "/etc/passwd", "x/../../y.txt"])
def test_paths_that_leave_the_folder_are_left_out(name):
    assert side_files({name: 1}) == []
