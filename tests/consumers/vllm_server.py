"""vLLM's OpenAI-compatible server on the CPU, as a process of another environment, on a loopback port."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

_PATIENCE_S = 300.0
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}  # fmt: skip


@contextlib.contextmanager
def serve(python: str, model: Path, dtype: str, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """Start the server, wait until it is healthy, end it; its address.

    Args:
        python: of an environment with vLLM.
        model: folder.
        dtype: of activations.
        log: file for what it says.
        options: more of the command line.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", "4",
        "--enforce-eager", *options,
    ]  # fmt: skip
    with log.open("wb") as out:
        environment = {**os.environ, **_ENVIRONMENT}
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(server, address, log)
        yield address
    finally:
        # A session of its own: the server's engine is another process.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def ask(address: str, path: str, content: dict | None = None) -> dict:
    """What the server answers to a GET, or to a POST of some content."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
        return json.loads(answer.read() or "{}")


def _wait_until_healthy(server: subprocess.Popen, address: str, log: Path) -> None:
    since = time.monotonic()
    while time.monotonic() - since < _PATIENCE_S and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            ask(address, "/health")
            return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM does not serve; the end of {log}:\n{log.read_text()[-4000:]}")
