"""How a model is spread over workers: each holds all of it (DDP), or its share of every parameter (FSDP2)."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from astro.model.model_class import find_blocks

__all__ = ["ParallelModel", "Place"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker is among all.

    Attributes:
        rank: Number of the worker, from 0.
        world_size: Number of workers.
        device: Device that it computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    def all_gather(self, value: str) -> list[str]:
        """Return what all workers give, in the order of their ranks. All must call it.

        Args:
            value: What this one gives.
        """
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def any_rank(self, answer: bool) -> bool:
        """Return whether any worker says yes, without waiting for a GPU. All must call it.

        Args:
            answer: What this one says.
        """
        if self.world_size == 1:
            return answer
        said = torch.tensor(int(answer))
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)


class ParallelModel:
    """A model on all workers.

    Attributes:
        model: The model itself, with the names of its parameters.
        place: Where this worker is.
    """

    def __init__(
        self, model: Any, place: Place, strategy: Literal["ddp", "fsdp"], precision: Literal["float32", "bfloat16"]
    ) -> None:
        """Put a model on the device of this worker.

        Args:
            model: The model on the CPU, the same on every worker.
            place: Where this worker is.
            strategy: Whether each worker holds all parameters, or its share of them.
            precision: Dtype of passes; weights stay in float32.
        """
        self.model, self.place, self._strategy = model, place, strategy
        self._casts = precision == "bfloat16" and strategy == "ddp"
        self._called = model
        if strategy == "fsdp":
            dtype = torch.bfloat16 if precision == "bfloat16" else None
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            mesh = init_device_mesh(place.device.type, (place.world_size,))
            for block in find_blocks(model)[1]:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        else:
            model.to(place.device)
            if place.world_size > 1:
                ids = [place.device.index] if place.device.type == "cuda" else None
                self._called = DistributedDataParallel(model, device_ids=ids)

    def loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the next tokens of some sequences, in float32.

        Args:
            input_ids: Tokens, int64 [B, T].
        """
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self._casts):
            loss: torch.Tensor = self._called(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss.float()

    @contextlib.contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Accumulate gradients, which are exchanged between workers only in the last of several backward passes.

        Args:
            is_last: Whether the pass inside of the context is the last one.
        """
        if self._strategy == "fsdp":
            self.model.set_requires_gradient_sync(is_last)
        waits = not is_last and isinstance(self._called, DistributedDataParallel)
        with self._called.no_sync() if waits else contextlib.nullcontext():
            yield

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over all workers, the same on each.

        Args:
            value: Tensor of this worker.
        """
        if self.place.world_size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.place.world_size

    def clip_gradient(self, norm: float) -> torch.Tensor:
        """Clip the gradient of all parameters, and return the norm that it had, without dimensions.

        Args:
            norm: Largest norm; 0 leaves the gradient as it is.
        """
        total = torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm or float("inf"))
        return total.full_tensor() if isinstance(total, DTensor) else total

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return all weights by name, on the CPU of worker 0; empty on others. All workers must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        if self._strategy == "fsdp":
            state: dict[str, Any] = get_model_state_dict(self.model, options=options)
            return state
        return {k: v.cpu() for k, v in self.model.state_dict().items()} if self.place.rank == 0 else {}
