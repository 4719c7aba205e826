"""The result's config asks for the class that the result was made with."""

import json

import transformers

from astro_dist import pipeline
from astro_dist.export.model_code import without_model_code


def test_entries_of_models_go_and_those_of_tokenizers_stay():
    content = {
        "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M", "AutoTokenizer": ["t.T", None]},
        "text_config": {"auto_map": {"AutoModel": "m.M"}, "hidden_size": 8},
    }
    assert without_model_code(content) == {
        "auto_map": {"AutoTokenizer": ["t.T", None]},
        "text_config": {"hidden_size": 8},
    }
    assert "auto_map" in content["text_config"]


def test_result_of_the_native_class_loads_with_and_without_trust(llama, run_config, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyLM"}
    (llama / "config.json").write_text(json.dumps(config))
    for name in ("configuration_my.py", "modeling_my.py"):
        (llama / name).write_text("raise SystemExit('ran')")
    tokens = json.loads((llama / "tokenizer_config.json").read_text()) | {"auto_map": {"AutoTokenizer": ["t.T", None]}}
    (llama / "tokenizer_config.json").write_text(json.dumps(tokens))
    pipeline.quantize(run_config())
    model = tmp_path / "run" / "model"
    assert "auto_map" not in json.loads((model / "config.json").read_text())
    assert "auto_map" in json.loads((model / "tokenizer_config.json").read_text())
    assert (model / "modeling_my.py").is_file()
    for trust in (False, True):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust)
        assert type(loaded).__module__.startswith("transformers.models.")
