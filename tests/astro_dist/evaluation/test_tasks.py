"""Tasks: what is asked of lm-evaluation-harness, and that a streamed model scores as the harness's own model does."""

import importlib.util
import json

import pytest

from astro.errors import CheckpointError, ConfigError
from astro_dist.evaluation.tasks import PAPER_TASKS, require_harness, run_tasks, tasks_of

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed; pip install lm_eval"
)
LETTERS = ["A", "B", "C", "D"]


def test_names_tell_examples():
    assert tasks_of("arc_easy:5, piqa") == {"arc_easy": 5, "piqa": None}
    assert tasks_of("paper,piqa:2") == {**PAPER_TASKS, "piqa": 2}
    assert tasks_of("mmlu") == {"mmlu": 5}
    for text, message in (("mmlu:five", "expected NAME or NAME:EXAMPLES"), (" ,", "names no task")):
        with pytest.raises(ConfigError, match=message):
            tasks_of(text)


def test_missing_harness_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run pip install lm_eval"):
        require_harness()


def write_task(folder, name, **content):
    rows = [{"question": f"What comes after {i}?", "choices": [str(i + 1), "none", f"{i} {i}", "x"], "answer": i % 4}
            for i in range(12)]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    common = {"task": name, "test_split": "test", "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    (folder / f"{name}.yaml").write_text(json.dumps({**common, **data, **content}))  # JSON is YAML


@needs_harness
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_kept", [True, False])
def test_scores_are_those_of_the_harness(llama, tmp_path, monkeypatch, is_kept):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from astro_dist.evaluation.judge_settings import JudgeSettings
    from astro_dist.evaluation.streamed_model import StreamedModel
    from astro_dist.export.named_model import find_model

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    accuracy = [{"metric": "acc"}, {"metric": "acc_norm"}]
    choice = {"output_type": "multiple_choice", "doc_to_target": "answer", "metric_list": accuracy}
    text = "Q: {{question}}\nA:"
    write_task(folder, "tiny_choice", doc_to_text=text, doc_to_choice="choices", **choice)
    write_task(folder, "tiny_letters", doc_to_text=text, doc_to_choice=LETTERS, **choice)
    stops = {"until": ["\n", "e"], "do_sample": False, "max_gen_toks": 5}
    write_task(
        folder, "tiny_answer", doc_to_text=text, doc_to_target="{{answer}}", output_type="generate_until",
        generation_kwargs=stops, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    rolling = [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]
    write_task(
        folder, "tiny_text", doc_to_text="", doc_to_target="{{question}} {{choices}}" * 4,
        output_type="loglikelihood_rolling", metric_list=rolling,
    )  # fmt: skip
    if not is_kept:
        monkeypatch.setattr("astro_dist.evaluation.streamed_model._KEPT_SHARE", 0.0)
    model = StreamedModel(find_model(str(llama)), JudgeSettings(device="cpu", dtype="float32"))
    names = {"tiny_choice": 0, "tiny_letters": 1, "tiny_answer": 1, "tiny_text": None}
    scores = run_tasks(model, names, 256, limit=8, include=folder)
    assert {(score.task, score.shots, score.samples) for score in scores} >= {("tiny_letters", 1, 8)}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for name, shots in names.items():
        results = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(llama), "dtype": "float32"}, tasks=[name], num_fewshot=shots,
            limit=8, device="cpu", task_manager=manager, bootstrap_iters=0,
        )  # fmt: skip
        found = {score.metric: score.value for score in scores if score.task == name}
        expected = {key.split(",")[0]: value for key, value in results["results"][name].items() if "," in key}
        assert found
        assert found == {metric: pytest.approx(expected[metric], rel=1e-5) for metric in found}


@needs_harness
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_unknown_task_is_refused(llama):
    from astro_dist.evaluation.judge_settings import JudgeSettings
    from astro_dist.evaluation.streamed_model import StreamedModel
    from astro_dist.export.named_model import find_model

    model = StreamedModel(find_model(str(llama)), JudgeSettings(device="cpu"))
    with pytest.raises(ConfigError, match="knows no such task"):
        run_tasks(model, {"no_such_task_at_all": None}, 256)


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_ends_no_text_is_refused(llama):
    from astro_dist.evaluation.harness_model import HarnessModel
    from astro_dist.evaluation.judge_settings import JudgeSettings
    from astro_dist.evaluation.streamed_model import StreamedModel
    from astro_dist.export.named_model import find_model

    model = StreamedModel(find_model(str(llama)), JudgeSettings(device="cpu"))
    model.tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="names no token that ends a text"):
        _ = HarnessModel(model, 256).eot_token_id
