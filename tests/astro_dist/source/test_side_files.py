"""Every file of a repository that is no weights is copied; the list says what is left out."""

import pytest

from astro_dist.source.side_files import list_folder, side_files

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
]


def test_what_is_copied_and_what_is_left_out():
    assert side_files(dict.fromkeys(COPIED + LEFT_OUT, 10)) == sorted(COPIED)


def test_a_large_file_is_left_out_and_named(caplog):
    assert side_files({"corpus.jsonl": 900_000_000, "a.json": 5}) == ["a.json"]
    assert "corpus.jsonl has 900 MB and is not copied" in caplog.text


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
