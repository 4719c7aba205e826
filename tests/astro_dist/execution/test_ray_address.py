"""An address where no cluster answers is told within seconds, and what to do about it."""

import socket
import time

import pytest

from astro.errors import RunError
from astro_dist.config.schema import ExecutionConfig
from astro_dist.execution import ray_address
from astro_dist.execution.ray_address import require_answer, start_advice
from astro_dist.execution.ray_executor import RayExecutor


@pytest.fixture
def port():
    """A port at which nothing listens, because this test holds it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_leftover_address_of_the_environment_is_told_at_once(monkeypatch, port, form):
    monkeypatch.setenv("RAY_ADDRESS", form.format(port))
    begin = time.monotonic()
    with pytest.raises(RunError, match=f"{port}: nothing answers there .*: unset RAY_ADDRESS"):
        RayExecutor(ExecutionConfig())
    assert time.monotonic() - begin < 5


def test_address_of_the_configuration_is_to_be_corrected(monkeypatch, port):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError, match="nothing answers there .*; correct execution.ray_address"):
        require_answer(ExecutionConfig(ray_address=f"127.0.0.1:{port}"))


def test_a_host_that_takes_no_connection_costs_seconds(monkeypatch):
    monkeypatch.setattr(ray_address, "_PATIENCE_S", 0.2)
    with socket.socket() as full:  # a backlog that is full: further connections are left unanswered
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        with pytest.raises(RunError, match="nothing answers there"):
            require_answer(ExecutionConfig(ray_address=f"127.0.0.1:{full.getsockname()[1]}"))
        for client in waiting:
            client.close()


def test_what_answers_and_what_has_no_port_is_left_to_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_answer(ExecutionConfig(ray_address=f"127.0.0.1:{server.getsockname()[1]}"))
    for address in ("auto", "local", "nonsense", "host:port"):
        require_answer(ExecutionConfig(ray_address=address))


def test_a_folder_that_is_too_long_for_sockets_is_named(monkeypatch):
    error = OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /x")
    monkeypatch.setenv("RAY_TMPDIR", "/long")
    assert "RAY_TMPDIR /long is too long for the sockets" in start_advice(None, error)
    assert start_advice(None, OSError("no space")) == ""
    monkeypatch.delenv("RAY_TMPDIR")
    assert start_advice(None, error) == ""


@pytest.mark.parametrize("address", ["auto", "6379"])
def test_an_address_that_ray_itself_refuses_gets_the_same_advice(monkeypatch, address):
    def refuse(**options):
        raise ConnectionError("no running instance")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=f"Ray cluster {address}: .*no running instance; .*unset RAY_ADDRESS"):
        RayExecutor(ExecutionConfig())


@pytest.mark.ray
def test_a_long_ray_tmpdir_is_an_error_of_one_line(monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 70)
    folder.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    with pytest.raises(RunError, match="cannot exceed 107 bytes.*; RAY_TMPDIR .* unset it, or shorten it"):
        RayExecutor(ExecutionConfig())
