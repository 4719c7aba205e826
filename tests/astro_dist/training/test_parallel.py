"""Workers that differ come to one answer, in two real processes of torch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from astro_dist.training.parallel import Place

pytestmark = pytest.mark.timeout(120)


def answer(rank, port, results):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    place = Place(rank, 2, torch.device("cpu"))
    results.put((rank, place.any_rank(rank == 1), place.any_rank(False), place.all_gather(f"of {rank}")))
    dist.destroy_process_group()


def test_workers_that_differ_come_to_one_answer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(answer, (port, results), nprocs=2)
    assert sorted(results.get() for _ in range(2)) == [(rank, True, False, ["of 0", "of 1"]) for rank in range(2)]


def test_worker_without_others_answers_for_itself():
    place = Place(0, 1, torch.device("cpu"))
    assert (place.any_rank(True), place.any_rank(False), place.all_gather("mine")) == (True, False, ["mine"])
