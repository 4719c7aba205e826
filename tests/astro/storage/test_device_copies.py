"""On a GPU every copy waits for what it reads, and no memory is used again before the copy is done."""

import contextlib

import pytest
import torch

from astro.storage.device_copies import DeviceCopies
from tests.support.devices import here

LARGE = 1 << 20
"""Numbers of a tensor whose copy takes a GPU longer than the host takes to ask for what comes next."""


@pytest.mark.usefixtures("device")
def test_what_reaches_the_host_is_what_was_computed_although_its_memory_is_used_again():
    copies, X, begun = DeviceCopies(here()), torch.ones(LARGE), []
    for number in range(8):
        begun.append(copies.to_host({"x": X * number}))
        torch.full_like(X, -1.0)  # in the memory of what is on its way, if that were free
    for number, copy in enumerate(begun):
        assert torch.equal(copy.wait()["x"], torch.full((LARGE,), float(number), device="cpu"))


@pytest.mark.usefixtures("device")
def test_what_is_computed_at_once_reads_what_was_sent():
    copies, sent = DeviceCopies(here()), []
    for number in range(8):
        sent.append(copies.to_device({"x": torch.full((LARGE,), float(number), device="cpu")}))
    sums = [copy.wait()["x"].sum() for copy in sent]
    assert [x.device.type for x in sums] == [here().type] * 8
    assert [float(x) for x in sums] == [float(number * LARGE) for number in range(8)]


@pytest.mark.usefixtures("device")
def test_memory_is_pinned_for_a_gpu_alone():
    pinned = DeviceCopies(here()).pinned({"x": torch.arange(5, device="cpu")})
    assert pinned["x"].is_pinned() == (here().type == "cuda")
    assert torch.equal(pinned["x"], torch.arange(5, device="cpu"))


def test_nothing_is_copied_on_a_cpu():
    copies, tensors = DeviceCopies(torch.device("cpu")), {"x": torch.ones(3), "y": torch.zeros(2, dtype=torch.int8)}
    for moved in (copies.to_host(tensors).wait(), copies.to_device(tensors).wait(), copies.pinned(tensors)):
        assert {name: tensor.data_ptr() for name, tensor in moved.items()} == {
            name: tensor.data_ptr() for name, tensor in tensors.items()
        }


class Gpu:
    """Streams that do nothing until someone waits for them on the host: the latest that a real GPU may be.

    `log` holds what a real one would have been told about memory. A tensor "on the GPU" is an ordinary one.
    """

    def __init__(self):
        self.log, self.current = [], Stream(self, "compute")
        self.made = 0

    def stream(self, device=None):
        self.made += 1
        return Stream(self, f"copies-{self.made}")

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, gpu, name):
        self.gpu, self.name, self.queue = gpu, name, []

    def wait_event(self, event):
        self.queue.append(event.synchronize)

    def run(self):
        while self.queue:
            self.queue.pop(0)()


class Event:
    gpu: Gpu

    def record(self, stream):
        self.stream, self.until = stream, len(stream.queue)
        self.is_done = False
        stream.queue.append(self.reach)

    def reach(self):
        self.is_done = True

    def synchronize(self):
        while not self.is_done:
            self.stream.queue.pop(0)()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for name, value in {
        "Stream": gpu.stream, "Event": Event, "stream": gpu.on, "current_stream": lambda device=None: gpu.current,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    real_empty, real_copy, real_to = torch.empty, torch.Tensor.copy_, torch.Tensor.to

    def empty(*args, pin_memory=False, **kwargs):
        return real_empty(*args, **kwargs).fill_(77)

    def copy(self, source, non_blocking=False):
        assert non_blocking
        gpu.current.queue.append(lambda: real_copy(self, source))
        return self

    def to(self, device=None, *args, non_blocking=False, **kwargs):
        if device != torch.device("cuda", 0):
            return real_to(self, device, *args, **kwargs)
        return copy(torch.full_like(self, 77), self, non_blocking)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: gpu.log.append((id(self), stream.name)))
    return gpu


def test_copy_to_the_host_waits_for_what_was_computed(gpu):
    copies, result = DeviceCopies(torch.device("cuda", 0)), torch.zeros(3)
    gpu.current.queue.append(lambda: result.fill_(5))  # the device has still to compute it
    copy = copies.to_host({"x": result})
    assert gpu.current.name == "compute"
    assert len(gpu.current.queue) == 2, "the host has not waited for the result"
    assert [name for _, name in gpu.log] == ["copies-1"], "the result's memory is not used again before it is copied"
    assert torch.equal(copy.wait()["x"], torch.full((3,), 5.0))


def test_what_reads_a_tensor_waits_for_its_copy(gpu):
    copies, read, seen = DeviceCopies(torch.device("cuda", 0)), torch.full((3,), 6.0), []
    copy = copies.to_device({"x": read})
    assert not gpu.log
    arrived = copy.wait()["x"]
    assert torch.equal(arrived, torch.full((3,), 77.0)), "the host has not waited"
    gpu.current.queue.append(lambda: seen.append(arrived.clone()))
    gpu.current.run()
    assert torch.equal(seen[0], torch.full((3,), 6.0))
    assert gpu.log == [(id(arrived), "compute")]


def test_directions_do_not_wait_for_each_other(gpu):
    copies = DeviceCopies(torch.device("cuda", 0))
    gpu.current.queue.append(lambda: pytest.fail("the copy to the device waited for computing"))
    copies.to_host({"x": torch.ones(2)})
    before = gpu.current
    gpu.current = Stream(gpu, "idle")
    assert torch.equal(copies.to_device({"x": torch.ones(2)}).wait()["x"], torch.full((2,), 77.0))
    gpu.current.run()
    assert len(before.queue) == 2
