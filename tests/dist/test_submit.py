"""The README's `ray job submit` line against a real job server on this machine."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def job_server(tmp_path_factory, address, port):
    """A head node with a job server; its environment."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
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


def test_submitted_job_quantizes_and_passes_its_exit_code_through(run_config, tmp_path_factory, tmp_path):
    head, environment = job_server(tmp_path_factory, "127.0.0.2", 6479)
    try:
        url = "http://127.0.0.1:6480"
        wait_until_it_answers(f"{url}/api/version", "0123456789abcdef" * 4, head)
        config = run_config(execution__executor="ray", execution__workers=2)
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml())
        submit = [
            *RAY, "job", "submit", "--address", url, "--working-dir", ".", "--runtime-env", "cluster/runtime-env.yaml",
            "--", sys.executable, "-m", "astro_dist", "quantize", str(path),
        ]  # fmt: skip
        for _ in range(30):  # the server answers before its agent takes jobs
            done = subprocess.run(submit, env=environment, cwd=ROOT, capture_output=True, text=True)
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 of 3 blocks" in done.stdout
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["units"]["blocks"] == 3
        wrong = subprocess.run([*submit, "--set", "quantization.bits=5"], env=environment, cwd=ROOT, capture_output=True)
        assert wrong.returncode == 1
        assert b"bits: expected 2, 3, 4 or 8" in wrong.stdout
    finally:
        head.terminate()
        head.wait(30)
