"""The README's `ray job submit` line against a real job server on this machine."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from astro.errors import ConfigError
from astro_dist.execution.ray_job import submit

ROOT = Path(__file__).parents[3]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def on_cluster(test):
    """A test that wants a job server."""
    return pytest.mark.slow(pytest.mark.ray(pytest.mark.timeout(400)(test)))


def job_server(tmp_path_factory, address, port):
    """A head node with a job server; its environment."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        *RAY, "start", "--block", "--head", f"--node-ip-address={address}", f"--port={port}", "--num-cpus=2",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port + 1}",
        f"--dashboard-agent-listen-port={port + 2}",  # another cluster of this machine may hold the default
        "--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return head, environment


def wait_until_it_answers(url, token, head):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    for _ in range(120):
        assert head.poll() is None, "the head node ended"
        try:
            with urllib.request.urlopen(request, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a job server, and the environment of its users."""
    head, environment = job_server(tmp_path_factory, "127.0.0.2", 6479)
    url = "http://127.0.0.1:6480"
    try:
        wait_until_it_answers(f"{url}/api/version", "0123456789abcdef" * 4, head)
        yield url, environment
    finally:
        head.terminate()
        head.wait(30)


def run_until_the_agent_is_up(command, environment):
    for _ in range(30):  # the server answers before its agent takes jobs
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    return done


@pytest.fixture
def config(run_config, tmp_path):
    """A configuration on two Ray workers, as a file."""
    path = tmp_path / "config.yaml"
    path.write_text(run_config(execution__executor="ray", execution__workers=2).to_yaml())
    return path


@on_cluster
def test_plain_ray_job_quantizes_and_passes_a_failure_through(server, config, tmp_path):
    url, environment = server
    submit = [
        *RAY, "job", "submit", "--address", url, "--working-dir", ".", "--runtime-env", "cluster/runtime-env.yaml",
        "--", sys.executable, "-m", "astro_dist", "quantize", str(config),
    ]  # fmt: skip
    done = run_until_the_agent_is_up(submit, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 blocks" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["units"]["blocks"] == 3
    wrong = subprocess.run([*submit, "--set", "quantization.bits=5"], env=environment, cwd=ROOT, capture_output=True)
    assert wrong.returncode == 1
    assert b"bits: expected 2, 3, 4, 8 or auto" in wrong.stdout


@on_cluster
def test_submit_shows_the_log_and_passes_the_exit_code_through(server, config, tmp_path):
    url, environment = server
    submit = [sys.executable, "-m", "astro_dist", "submit", str(config), "--address", url]
    done = run_until_the_agent_is_up(submit, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 blocks" in done.stdout
    assert (tmp_path / "run" / "summary.json").is_file()
    # Only the cluster can see that its own source is missing: the run's own exit code says that the input was wrong.
    gone = subprocess.run([*submit, "--set", "model.source=/nowhere"], env=environment, cwd=ROOT, capture_output=True)
    assert gone.returncode == 2
    assert b"/nowhere: no such folder" in gone.stdout
    assert b"0123456789abcdef" not in done.stdout.encode() + done.stderr.encode() + gone.stdout + gone.stderr


@on_cluster
def test_job_that_is_stopped_goes_on_when_it_is_submitted_again(server, config, tmp_path):
    url, environment = server
    submit = [sys.executable, "-m", "astro_dist", "submit", str(config), "--address", url]
    slow = [*submit, "--no-follow", "--set", "calibration.samples=60", "--set", "calibration.sequence_length=96"]
    started = run_until_the_agent_is_up(slow, environment)
    assert started.returncode == 0, started.stderr
    job = started.stdout.split("submitted as ")[1].split()[0]
    record = tmp_path / "run" / "records" / "round-0-block-0000.json"
    for _ in range(600):
        if record.is_file():
            break
        time.sleep(0.1)
    subprocess.run([*RAY, "job", "stop", "--address", url, job], env=environment, check=True, capture_output=True)
    before = record.stat().st_mtime_ns
    again = subprocess.run(
        [part for part in slow if part != "--no-follow"], env=environment, cwd=ROOT, capture_output=True
    )
    assert again.returncode == 0, again.stdout
    assert record.stat().st_mtime_ns == before
    assert (tmp_path / "run" / "summary.json").is_file()


@on_cluster
def test_server_that_does_not_answer(config):
    command = [sys.executable, "-m", "astro_dist", "submit", str(config), "--address", "http://127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: job server http://127.0.0.1:9: " in done.stderr
    assert "SSH tunnel" in done.stderr


@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.parametrize(
    ("key", "value"), [("output__dir", "run"), ("model__source", "./llama"), ("calibration__source", "text.txt")]
)
def test_relative_paths_are_refused_before_the_server_is_asked(run_config, executor, key, value):
    config = run_config(execution__executor=executor, **{key: value})
    with pytest.raises(ConfigError, match=f"^{key.replace('__', '.')}: .* is relative"):
        submit(config, "http://127.0.0.1:9", print)
