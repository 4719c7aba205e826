"""The commands as a user runs them: output, exit codes, one readable paragraph for what is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import astro
from astro.storage.checkpoint import INDEX_NAME
from astro_dist import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(llama, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{source: {llama}}}
quantization: {{group_size: 32}}
regularizer: {{iterations: 3}}
calibration: {{samples: 4, sequence_length: 32, chunk_samples: 4, holdout_samples: 2}}
execution: {{executor: local, device: cpu}}
output: {{dir: {tmp_path / "run"}}}
"""
    )
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["astro-dist", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_quantize_prints_one_json_object(run, config):
    code, out, _ = run("quantize", config, "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["perplexity"]["quantized"] > 0
    assert summary == json.loads((config.parent / "run" / "summary.json").read_text())


def test_quantize_says_what_came_out(run, config):
    code, out, err = run("quantize", config, "--set", "quantization.bits=3")
    assert code == 0
    assert "Hold-out perplexity" in out
    assert "note: 3-bit weights: of the servers, vLLM" in out
    assert "block 3 of 3 done by worker 0; 3 of 3 blocks" in err


@pytest.mark.parametrize("address", ["nonsense", "10.0.0.1:8265", "ray://10.0.0.1:10001"])
def test_submit_refuses_what_is_no_job_server(run, config, address):
    code, _, err = run("submit", config, "--address", address)
    assert code == 2
    assert f"--address {address}: expected the job server's, e.g. http://127.0.0.1:8265" in err


def test_plan_tells_of_widths_that_a_budget_may_choose(run, config):
    changes = ("quantization.bits=auto", "quantization.average_bits=3.5", "execution.rounds=2")
    code, out, _ = run("plan", config, *(part for change in changes for part in ("--set", change)))
    assert code == 0
    assert "note: 2 and 3-bit weights (bits: auto may choose them): of the servers, vLLM" in out


@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_plan_of_a_width_budget_in_either_format(run, config, layout):
    changes = ("bits=auto", "average_bits=3.5", f"format={layout}")
    options = [part for change in changes for part in ("--set", f"quantization.{change}")]
    code, _, err = run("plan", config, *options, "--set", "execution.rounds=2")
    assert (code, len(err.splitlines())) == (0, 1)


def test_plan_writes_nothing(run, config):
    code, out, _ = run("plan", config, "--json")
    content = json.loads(out)
    assert code == 0
    assert [unit["linears"] for unit in content["blocks"]] == [7, 7, 7]
    assert content["ignored"] == ["lm_head"]
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["quantize"],
        ["plan"],
        ["submit", "--address", "x"],
        ["evaluate", "--text", "a.txt"],
        ["try", "x"],
        ["verify"],
        ["inspect"],
        ["train"],
    ],
    ids=str,
)
def test_first_line_comes_before_anything_slow_is_imported(config, command):
    code = (
        "import sys, astro_dist.commands.output as output, astro_dist.cli as cli\n"
        "def say(text): print(text, {'torch', 'transformers', 'ray'} & {*sys.modules}); sys.exit()\n"
        f"output.say, sys.argv = say, ['astro-dist', {command[0]!r}, {str(config)!r}, *{command[1:]}]\n"
        "cli.main()"
    )
    assert printed_by(code) == f"astro-dist {astro.__version__}: {config} set()\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["plan", "/nowhere/model"], "/nowhere/model: no such folder; expected a folder with config.json"),
        (["quantize", "~/no/such/model"], "~/no/such/model: no such folder"),
        (["init", "./nowhere"], "./nowhere: no such folder"),
        (["inspect", "../nowhere"], "../nowhere: no such folder"),
        (["verify", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "org/model", "--text", "a.txt", "--against", "/nowhere"], "/nowhere: no such folder"),
        (["try", "/nowhere@v1", "x"], "/nowhere@v1: no such folder"),
        (["compare", "runs/nothing"], "runs/nothing: no such folder; expected the folder of a run"),
        (["publish", "runs/nothing", "--repo", "a/b"], "runs/nothing: no such folder; expected the folder of a run"),
        (["train", "nothing.yaml"], "nothing.yaml: no such configuration file"),
    ],
    ids=str,
)
def test_a_wrong_path_is_refused_before_anything_slow_is_imported(command, message):
    code = (
        "import sys, astro_dist.cli as cli\n"
        f"sys.argv = ['astro-dist', *{command}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers', 'ray'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "2 set()\n"
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_looking_at_a_run_imports_nothing_very_slow():
    modules = "astro_dist.report.status, astro_dist.report.command_output"
    code = f"import sys, {modules}; print({{'torch', 'transformers', 'ray'}} & {{*sys.modules}})"
    assert printed_by(code) == "set()\n"


def printed_by(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_plan_shows_equal_blocks_in_one_row_below_the_main_settings(run, config):
    out = " ".join(run("plan", config, "--verbose")[1].split())
    assert "4 bits, group size 32, format compressed-tensors; mode blocks, 1 round; calibration 4 × 32 tokens" in out
    assert "blocks 1 to 3" in out
    assert "block 2" not in out


def test_run_that_was_finished_already_says_so(run, config):
    said = [run("quantize", config)[2] for _ in range(2)]
    assert ["finished already; nothing was done" in text for text in said] == [False, True]


def test_verify_measures_against_the_source(run, config, llama):
    run("quantize", config)
    code, out, _ = run("verify", config.parent / "run" / "model", "--against", llama)
    assert code == 0
    assert "‖ŵ − w‖ / ‖w‖" in out
    assert "model.layers.2.mlp.down_proj: 0." in out
    assert "21 packed layers" in out


def edit_config(llama, **changes):
    content = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**content, **changes}))


def edit_index(llama, **changes):
    content = json.loads((llama / INDEX_NAME).read_text())
    content["weight_map"].update(changes)
    (llama / INDEX_NAME).write_text(json.dumps(content))


def drop_from_index(llama, key):
    content = json.loads((llama / INDEX_NAME).read_text())
    del content["weight_map"][key]
    (llama / INDEX_NAME).write_text(json.dumps(content))


def last_shard(llama):
    return sorted(llama.glob("*.safetensors"))[-1]


def shrink(llama):
    """Cut every matrix of 260 tokens to 32."""
    for path in llama.glob("*.safetensors"):
        tensors = {name: t[:32].clone() if t.shape[0] == 260 else t for name, t in load_file(path).items()}
        save_file(tensors, path)


def put_nan(llama):
    tensors = load_file(last_shard(llama))
    name = max(tensors, key=lambda n: tensors[n].ndim)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, last_shard(llama))


def only_pickle(llama):
    for path in llama.glob("*.safetensors*"):
        path.unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def only_gguf(llama):
    for path in llama.glob("*.safetensors*"):
        path.unlink()
    (llama / "model.gguf").write_bytes(b"GGUF")


WRONG = {
    "a missing shard": (lambda m: last_shard(m).unlink(), [], "but it is missing"),
    "a truncated shard": (lambda m: last_shard(m).write_bytes(last_shard(m).read_bytes()[:-4]), [], "cut short"),
    "an index naming a tensor that is not there": (
        lambda m: edit_index(m, ghost=last_shard(m).name), [], "'ghost'"),
    "an index path that leaves the folder": (
        lambda m: edit_index(m, **{"lm_head.weight": "../../x.safetensors"}), [], "leaves the folder"),
    "NaN in a weight": (put_nan, [], "holds NaN or Inf"),
    "a pickle": (only_pickle, [], "such a file is a pickle"),
    "a GGUF file": (only_gguf, [], "Give the original safetensors"),
    "an unknown architecture": (lambda m: edit_config(m, model_type="nonesuch"), [], "model_type 'nonesuch'"),
    "a config of another model": (lambda m: edit_config(m, hidden_size=32), [], "of different models"),
    "a model that is quantized already": (
        lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), [], "quantized already"),
    "a model without tokenizer": (lambda m: (m / "tokenizer.json").unlink(), [], "tokenizer cannot be loaded"),
    "a tokenizer that is damaged": (
        lambda m: (m / "tokenizer.json").write_text("{"), [], "tokenizer cannot be loaded"),
    "a tokenizer of another model": (lambda m: edit_config(m, vocab_size=32) or shrink(m), [], "a vocabulary of 32"),
    "a checkpoint without its last norm": (
        lambda m: drop_from_index(m, "model.norm.weight"), [], "no tensor for model.norm.weight"),
    "sequences longer than the model's positions": (
        lambda m: None, ["calibration.sequence_length=4096"], "more than the 128 positions"),
    "a pattern that matches nothing": (
        lambda m: None, ["quantization.ignore=['*.w1']"], "'*.w1' matches no linear layer"),
    "a relative path on a cluster": (
        lambda m: None, ["execution.executor=ray", "execution.ray_address=1.2.3.4:1", "output.dir=runs/x"],
        "is relative"),
    "a group size that divides nothing": (
        lambda m: None, ["quantization.group_size=48"], "group_size 48 does not divide a layer of 64"),
    "a pattern that ignores everything": (lambda m: None, ["quantization.ignore=['*']"], "no linear layer to quantize"),
    "an unknown key": (lambda m: None, ["quantization.bit=3"], "unknown key quantization.bit"),
    "no such folder": (lambda m: None, ["model.source=nowhere"], "no such folder"),
    "an unknown demo": (lambda m: None, ["model.source=demo:gpt5"], "unknown demo"),
    "too little text": (lambda m: None, ["calibration.samples=1000000"], "use more text"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_paragraph_and_starts_nothing(run, config, llama, case):
    damage, assignments, message = WRONG[case]
    damage(llama)
    flags = [part for assignment in assignments for part in ("--set", assignment)]
    code, out, err = run("quantize", config, *flags)
    assert code == 2
    *before, error = err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert all("note: " in line for line in before[2:])  # what is to be done is said at once
    assert "Traceback" not in err + out
    assert not (config.parent / "run").exists()


def test_output_folder_with_another_run(run, config):
    run("quantize", config)
    code, _, err = run("quantize", config, "--set", "quantization.bits=8")
    assert code == 2
    assert "(quantization.bits: 4 there, 8 here); choose another directory with --output" in err


def test_failed_run_exits_with_one(run, config, monkeypatch):
    monkeypatch.setattr("astro.storage.atomic.os.fsync", lambda h: (_ for _ in ()).throw(OSError(28, "No space left")))
    code, _, err = run("quantize", config)
    assert code == 1
    assert "the disk is full: free space" in err


def test_usage_errors_exit_with_two(run):
    code, _, err = run("quantize")
    assert code == 2
    assert "CONFIG" in err


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_debug_shows_where_an_error_came_from(run, config, flags):
    code, _, err = run(*flags, "quantize", config, "--set", "model.source=nowhere")
    assert code == 2
    assert "no such folder" in err
    assert ("Traceback" in err) == bool(flags)


def test_unexpected_error_is_one_paragraph_too(run, config, monkeypatch):
    monkeypatch.setattr("astro_dist.pipeline.quantize", lambda config: {}["defect"])
    code, _, err = run("quantize", config)
    assert code == 1
    assert err.splitlines()[1] == "error: KeyError: 'defect'. This is unexpected; what is finished is kept. See --debug"
    monkeypatch.setattr("astro_dist.report.forecast.prepare", lambda config: {}["defect"])
    assert run("plan", config)[2].splitlines()[1] == "error: KeyError: 'defect'. This is unexpected. See --debug"


def test_interrupt_is_said_and_exits_with_130(run, config, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("astro_dist.pipeline.quantize", interrupt)
    code, _, err = run("quantize", config)
    assert code == 130
    assert err.endswith("interrupted; what is finished is kept, run the same command to go on\n")


@pytest.mark.parametrize(
    ("command", "place", "advice"),
    [
        (["quantize"], "astro_dist.pipeline.quantize", "what is finished is kept, run the same command to go on"),
        (["plan"], "astro_dist.report.forecast.prepare", "run the same command to begin anew"),
        (["try", "Hello"], "astro_dist.evaluation.beside.continue_beside", "run the same command to begin anew"),
    ],
)
def test_only_commands_that_keep_something_promise_it_when_they_are_stopped(
    run, config, monkeypatch, command, place, advice
):
    def stop(*_):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    monkeypatch.setattr(place, stop)
    code, _, err = run(command[0], config, *command[1:])
    assert (code, err.splitlines()[-1]) == (143, f"stopped by SIGTERM; {advice}")


def test_module_runs_as_a_submitted_job_would_run_it(config):
    command = [sys.executable, "-m", "astro_dist", "plan", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=True)
    assert json.loads(done.stdout)["quantized_weights"] == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)


def test_help_does_not_wait_for_torch():
    code = "import sys, astro_dist.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_quantize_publishes_and_says_where(run, config, online_hub):
    code, out, _ = run("quantize", config, "--set", "publish.repo=org/model")
    assert code == 0
    commit, _ = online_hub.folder("org/model", "main")
    assert f"Published: {online_hub.address}/org/model/tree/main, commit {commit[:12]}, 10 files" in out
    code, out, _ = run("status", config.parent / "run")
    assert f"org/model@main: holds 10 of 10 files, published as commit {commit[:12]}" in out
    written, *_ = run("report", config.parent / "run")[1].splitlines()
    assert f"{online_hub.address}/org/model/tree/main" in Path(written.removeprefix("written: ")).read_text()


def test_publish_prints_one_json_object(run, finished, online_hub):
    code, out, _ = run("publish", finished, "--repo", "org/model", "--revision", "w4", "--public", "--json")
    assert code == 0
    assert json.loads(out)["revision"] == "w4"
    assert not online_hub.private


def test_publish_that_failed_exits_with_one_and_names_the_command_that_goes_on(run, finished, online_hub):
    online_hub.write_faults["commit"] = [403]
    code, _, err = run("publish", finished, "--repo", "org/model", "--revision", "w4", "--public")
    assert code == 1
    assert err.rstrip().endswith(f"To go on: astro-dist publish {finished} --repo org/model --revision w4 --public")
    code, out, _ = run("status", finished)
    assert "org/model@w4: holds 4 of 10 files, not published yet" in out
    assert "upload failed: org/model: making the commit: the Hub answers 403" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--repo", "model"], "publish.repo: expected ORG/NAME"), (["--repo", "org/model"], "holds no run.json")],
)
def test_publish_of_what_cannot_be(run, tmp_path, arguments, message):
    code, _, err = run("publish", tmp_path, *arguments)
    assert code == 2
    assert message in err


def test_verify_reads_from_the_hub(run, finished, online_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    online_hub.publish("org/model", finished / "model")
    code, out, _ = run("verify", "org/model")
    assert code == 0
    assert "21 packed layers" in out
    code, _, err = run("verify", "org/model@v2")
    assert code == 2
    assert "it has no branch, tag or commit 'v2'" in err


def test_plan_of_a_run_on_gpus_asks_which(run, config):
    code, _, error = run("plan", config, "--set", "execution.device=cuda")
    assert (code, "say which GPUs with --device, one of" in " ".join(error.split())) == (2, True)
    assert run("plan", config, "--set", "execution.device=cuda", "--device", "H100")[0] == 0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("publish.pull_request=true", "publish.repo: missing; publish.revision and publish.pull_request say how"),
        ("publish.revision=w4", "publish.repo: missing"),
        ("calibration.samples=100000", "calibration.samples: 100000 sequences of 32 tokens"),
        ("calibration.sequence_length=4096", "is more than the 128 positions of this model"),
        ("calibration.source={folder}/text.csv", "text.csv: expected python-docs, a file (*.txt, *.parquet, *.jsonl"),
    ],
)
def test_plan_refuses_what_a_run_would_refuse(run, config, tmp_path, assignment, message):
    (tmp_path / "text.csv").write_text("a,b")
    code, _, error = run("plan", config, "--set", assignment.format(folder=tmp_path))
    assert code == 2
    assert message in error


def test_help_wraps_paragraphs_at_the_width_and_says_defaults(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = run("plan", "--help")[1]
    assert "a note says where the calibration text is not on this machine." in out
    for words in ("such as calibration.samples=32; `astro-dist config` lists them", "python-docs", "It is blocks if"):
        assert words in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("key", ["execution.mode", "quantization"])
def test_a_key_may_be_asked_for_with_an_option(run, key):
    assert run("config", "--explain", key) == run("config", key)
    assert "--explain" not in run("config", "--help")[1]


def test_help_shows_how_to_name_a_revision(run):
    assert "ORG/NAME[@REVISION]" in run("verify", "--help")[1]


def test_version(run):
    assert run("--version")[:2] == (0, f"{astro.__version__}\n")


def test_plan_tells_of_a_text_that_is_not_there(run, config, tmp_path):
    _, out, err = run("plan", config, "--set", f"calibration.source={tmp_path}/no.parquet")
    assert "no.parquet is not there: `quantize` will refuse" in " ".join((out + err).split()).replace("- ", "-")


def test_characters_that_the_terminal_lacks_do_not_end_a_run_that_is_done(first_run):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "astro_dist", "quantize", str(first_run / "config.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Hold-out perplexity" in done.stdout, "\\u2192" in done.stdout) == (0, True, True)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_ends_with_examples_and_the_documentation(run, monkeypatch, flag):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(flag)
    shown = "\n".join(line.rstrip() for line in out.splitlines()).strip()
    assert code == 0
    assert "astro-dist quantize Qwen/Qwen3-8B --bits 4 --calibration texts.parquet\n" in shown
    assert "configs/README.md" in out
    assert "\n\n\n" not in shown


def test_a_model_is_quantized_in_one_line(run, llama, tmp_path):
    options = ("calibration.samples=4", "calibration.sequence_length=32", "execution.executor=local")
    flags = [part for option in options for part in ("--set", option)]
    code, out, err = run("quantize", llama, "--bits", 3, "--output", tmp_path / "r", "--json", *flags)
    assert code == 0, err
    assert json.loads(out)["average_bits"] == 3
    assert "group size 64, because 128 does not divide layers of 64 inputs" in err
    assert "bits: 3" in (tmp_path / "r" / "config.yaml").read_text()


def test_init_writes_a_file_that_plan_takes(run, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("init", llama)
    assert (code, out.splitlines()[0]) == (0, "written: llama-w4g64.yaml")
    assert run("plan", "llama-w4g64.yaml", "--set", "calibration.samples=4")[0] == 0
    code, _, err = run("init", llama)
    assert (code, "llama-w4g64.yaml: is there already" in err) == (2, True)
    code, _, err = run("init", llama, "none/a.yaml")
    assert (code, "none/a.yaml: there is no folder none; make it" in err) == (2, True)


def test_config_explains_keys_and_prints_a_schema(run):
    assert "Width of one weight" in run("config", "quantization.bits")[1]
    assert "  damping: 0.01" in run("config")[1]
    assert json.loads(run("config", "--schema")[1])["required"] == ["model", "output"]
    assert "did you mean bits?" in run("config", "quantization.bit")[2]


def test_env_tells_what_is_installed(run):
    assert f"astro-dist: {astro.__version__}, in {ROOT}" in run("env")[1]
    assert json.loads(run("env", "--json")[1])["torch"] == torch.__version__


def test_run_and_model_are_both_found(run, finished, llama):
    assert "3 of 3 blocks" in run("status", finished / "model")[1]
    assert "3 of 3 blocks" in run("status", finished, "--watch")[1]
    assert "21 packed layers" in run("verify", finished)[1]
    assert str(finished / "report" / "index.html") in run("report", finished / "model")[1]


def test_verify_shows_the_largest_weight_errors_or_all(run, finished, first_run):
    source = first_run.parent / "llama"
    lines = run("verify", finished, "--against", source)[1].splitlines()
    assert "the 10 largest of 21 (--all shows all)" in lines[0]
    errors = [float(line.rpartition(" ")[2]) for line in lines[1:11]]
    assert errors == sorted(errors, reverse=True)
    assert len(run("verify", finished, "--against", source, "--all")[1].splitlines()) == len(lines) + 11


def test_what_is_missing_is_named_by_its_key(run, tmp_path):
    (tmp_path / "empty.yaml").write_text("{}")
    err = run("plan", tmp_path / "empty.yaml")[2]
    assert "model.source: missing; output.dir: missing" in " ".join(err.split())
