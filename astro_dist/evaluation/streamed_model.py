"""A model whose blocks pass through memory one after the other, so that a machine judges what it could not hold.

All batches of token sequences pass through a block before the next block is read: one reading of the model serves them
all. What waits between blocks are hidden states, in memory; more sequences than it is meant to take are done in several
waves, each of which reads the model once. The blocks are called as they are in a run, see `astro.model.recording`.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

from astro.model.block_call import BlockCall, BlockState, forward
from astro.model.call_file import differing_tensors, with_tensors
from astro.model.linear_layer import LinearLayer
from astro.model.recording import count_outputs, record, run_head
from astro.model.rehearsal import rehearse
from astro.model.skeleton import Skeleton
from astro.process import return_freed_memory
from astro_dist.evaluation.block_weights import BlockWeights
from astro_dist.evaluation.free_memory import available_bytes
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.source.long_wait import LongWait
from astro_dist.source.resolve import Source
from astro_dist.source.tokenizer import load_tokenizer
from astro_dist.wording import counted

__all__ = ["StreamedModel", "result_of"]

_log = logging.getLogger("astro_dist")

_PROBE_TOKENS = 8
"""Tokens with which it is found out what blocks return."""
_KEPT_SHARE = 0.5
"""Share of the memory that is free up to which a model that is read again and again is kept."""

Result = TypeVar("Result")

Watched = Callable[[int], AbstractContextManager[object]]
"""A function that returns the context in which a block of an index runs."""


def result_of(steps: Generator[object, None, Result]) -> Result:
    """Go all steps, and return what comes of them.

    Args:
        steps: Generator that yields after each step.
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


class StreamedModel:
    """Runs token sequences through a model block by block.

    Attributes:
        source: Where its files are.
        name: What messages call the model: its folder or repository.
        skeleton: The model, on the meta device but for what is loaded.
        dtype: Dtype of forward passes.
        device: Device of forward passes.
        tokenizer: The model's own tokenizer.
        num_readings: Number of times that the blocks were read so far.
    """

    def __init__(self, source: Source, settings: JudgeSettings, option: str = "") -> None:
        """Read the headers and the tokenizer of a model.

        Args:
            source: Where the files of the model are.
            settings: Device, dtype and limits.
            option: Option that names the model, such as "--against", for lines that say how far it is; empty for the
                model that a command is about.

        Raises:
            InputError: The model cannot be read, or its blocks cannot be run one by one.
        """
        self.source, self.name, self.device = source, str(source.store), settings.torch_device
        trusted = settings.trust_remote_code
        skeleton = Skeleton(source.folder, torch.float32, trusted)
        self._weights = BlockWeights(source, skeleton)
        self.dtype = settings.compute_dtype(self._weights.dtype)
        if self.dtype != torch.float32:
            skeleton = Skeleton(source.folder, self.dtype, trusted)
            self._weights = BlockWeights(source, skeleton)
        self.skeleton = skeleton
        self.tokenizer = load_tokenizer(source.folder, str(source.folder), trusted)
        if self._weights.correction_ranks:
            ranks = self._weights.correction_ranks.values()
            _log.info("%s: its adapter corrects %d layers, with ranks up to %d", self.name, len(ranks), max(ranks))
        self.num_readings = 0
        self._settings, self._option = settings, option
        self._token_bytes = rehearse(skeleton) * self.dtype.itemsize
        self._num_outputs: int | None = None
        self._is_kept = False

    @property
    def longest(self) -> int | None:
        """Number of tokens of the longest sequence that the model has positions for; None where it does not say."""
        return self.skeleton.limits()[1]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the files, 64 hexadecimal digits."""
        return self._weights.fingerprint

    @property
    def held_bytes(self) -> int:
        """Memory that the whole model would take, in bytes."""
        return int(self._weights.num_weights * self.dtype.itemsize)

    def waves(self, batches: Sequence[torch.Tensor], copies: int = 1) -> list[Sequence[torch.Tensor]]:
        """Cut batches into waves whose hidden states fit into the memory that they may take.

        Args:
            batches: Tokens, each int64 [B, T].
            copies: Number of models whose hidden states are in memory together.

        Returns:
            The waves; at least one batch is in each.
        """
        limit, waves, size = self._settings.hidden_bytes, list[list[torch.Tensor]](), 0
        for batch in batches:
            num_bytes = batch.numel() * self._token_bytes * copies
            if not waves or size + num_bytes > limit:
                waves.append([])
                size = 0
            waves[-1].append(batch)
            size += num_bytes
        if len(waves) > 1:
            _log.info(
                "the hidden states would take %.1f GB at once; for at most %.1f GB (--hidden-gb) the model is read %d "
                "times", sum(batch.numel() for batch in batches) * self._token_bytes * copies / 1e9, limit / 1e9,
                len(waves),
            )  # fmt: skip
        return [*waves]

    def keep_if_it_fits(self) -> bool:
        """Load all of the model and keep it, if there is room, because it will be read again and again.

        Returns:
            Whether the whole model is in memory now.
        """
        if not self._is_kept and self.held_bytes <= _KEPT_SHARE * available_bytes(self.device):
            self.skeleton.load(self.skeleton.model, self._weights.outside(), self.device)
            self.skeleton.tie()
            wait = LongWait(f"{self.name}: read", len(self.skeleton.blocks), "blocks")
            for index in range(len(self.skeleton.blocks)):
                self._weights.fill_block(index, self.device)
                wait.reached(index + 1)
            self._is_kept = True
            self.num_readings += 1
        return self._is_kept

    def release(self) -> None:
        """Take everything out of memory that was kept."""
        self._is_kept = False
        for index in range(len(self.skeleton.blocks)):
            self._weights.empty_block(index)
        self.skeleton.model.to("meta")
        self.skeleton.model.tie_weights()
        return_freed_memory()

    def rounding(self) -> AbstractContextManager[None]:
        """Let the whole model, which is kept, round as servers do while the body of a `with` statement runs."""
        return self._weights.rounding(*range(len(self.skeleton.blocks)))

    def linear_layers(self, index: int) -> list[LinearLayer]:
        """Return the linear layers of a block, without gates, whether its files hold them packed or not.

        Args:
            index: Index of the block.
        """
        return self._weights.linear_layers(index)

    def last_hidden(self, batches: Sequence[torch.Tensor], watched: Watched | None = None) -> list[torch.Tensor]:
        """Run batches through all blocks, and return what the last one makes of each; see `pass_blocks`."""
        return result_of(self.pass_blocks(batches, watched))

    @torch.no_grad()
    def pass_blocks(
        self, batches: Sequence[torch.Tensor], watched: Watched | None = None
    ) -> Generator[int, None, list[torch.Tensor]]:
        """Run batches through all blocks, and yield after each.

        Args:
            batches: Tokens, each int64 [B, T]. Shorter sequences are filled up behind their end with any tokens: no
                token looks at those behind it.
            watched: Function that returns the context in which a block runs while it is loaded, by its index; None
                where nothing watches.

        Yields:
            The number of blocks that all batches have passed.

        Returns:
            What the last block makes of each batch, on the CPU [B, T, ...].
        """
        states, calls = self._embedded(batches)
        name, batch_count = f"{self._option} {self.name}".strip(), counted(len(batches), "batch", "batches")
        wait = LongWait(f"{name}: through", len(self.skeleton.blocks), f"blocks with {batch_count}")
        self.num_readings += not self._is_kept
        for index, block in enumerate(self.skeleton.blocks):
            if not self._is_kept:
                self._weights.fill_block(index, self.device)
            # What watches stands inside: it sees inputs before they are rounded.
            with self._weights.rounding(index), watched(index) if watched else nullcontext():
                for number, state in enumerate(states):
                    call = calls.call(number, index)
                    output = forward(block, state.to(self.device), call)
                    states[number] = output.to(torch.device("cpu"))
            if not self._is_kept:
                self._weights.empty_block(index)
                return_freed_memory()
            wait.reached(index + 1)
            yield index + 1
        return [state.hidden for state in states]

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Hold embeddings, norm and head on the device while the body of a `with` statement runs."""
        if self._is_kept:
            yield
            return
        self.skeleton.load(self.skeleton.model, self._weights.outside(), self.device)
        self.skeleton.tie()
        try:
            yield
        finally:
            self.release()

    @property
    def num_outputs(self) -> int:
        """Number of values that blocks return as a tuple; known once something was run."""
        assert self._num_outputs is not None
        return self._num_outputs

    def logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits that follow from the last block's output, float32 [B, T, V]; the head is loaded.

        Args:
            input_ids: Tokens, int64 [B, T]. A part of a sequence is enough, because each token has its own logits.
            hidden: Output of the last block for these tokens, [B, T, ...].
        """
        ids, hidden = input_ids.to(self.device), hidden.to(self.device)
        return run_head(self.skeleton, ids, hidden, self.num_outputs).float()

    def _embedded(self, batches: Sequence[torch.Tensor]) -> "tuple[list[BlockState], _Calls]":
        """Return the hidden states of batches before the first block, and what blocks are called with for each."""
        states, calls = list[BlockState](), _Calls()
        with self.head_loaded():
            if self._num_outputs is None:
                self._weights.fill_block(0, self.device)
                probe = batches[0][:1, :_PROBE_TOKENS].to(self.device)
                self._num_outputs = count_outputs(self.skeleton, probe)
                if not self._is_kept:
                    self._weights.empty_block(0)
            for batch in batches:
                hidden, made = record(self.skeleton, batch.to(self.device), self._num_outputs)
                states.append(BlockState(hidden.cpu()))
                calls.add(batch.shape, made)
        return states, calls


class _Calls:
    """What blocks are called with for each batch. What batches of one shape share is held once."""

    def __init__(self) -> None:
        self._first: dict[torch.Size, list[BlockCall]] = {}
        self._batches: list[tuple[torch.Size, list[dict[str, torch.Tensor]]]] = []

    def add(self, shape: torch.Size, calls: list[BlockCall]) -> None:
        """Take the calls of the next batch, one for each block."""
        first = self._first.setdefault(shape, calls)
        different = [differing_tensors(call, known) for call, known in zip(calls, first, strict=True)]
        self._batches.append((shape, different))

    def call(self, batch: int, block: int) -> BlockCall:
        """Return the call of a block for a batch, by their numbers."""
        shape, different = self._batches[batch]
        call = self._first[shape][block]
        return with_tensors(call, different[block]) if different[block] else call
