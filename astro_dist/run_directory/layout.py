"""The layout of a run directory: where each file of a run lies. This module reads and writes nothing.

config.yaml    the resolved configuration        records/       one record a finished unit
run.json       identity of the run               activations/   only what unfinished blocks need
model/         the checkpoint, shard by shard    tokens.safetensors   every chunk's tokens
summary.json   the figures of the run            journal.jsonl  what happened when
rounds/        shards of earlier rounds          allocation.json  with a width budget: every layer's width
model.json     files of the finished model       uploads.json   what the Hub holds of it
source/        of a remote model: config, tokenizer, code
adapter/       corrections of low rank, block by block
"""

import dataclasses
from pathlib import Path
from typing import Self

__all__ = ["TRAINING_FILE", "RunLayout"]

TRAINING_FILE = "train.yaml"
"""Name of the file by which the folder of a training is known, which is no run directory."""


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """Paths of the files of one run.

    Attributes:
        root: Folder of the run directory.
        rounds: Number of passes over the model; the shards of the last one are the model.
        local: Folder outside of `root` with the activations; None where they are in `root`.
    """

    root: Path
    rounds: int = dataclasses.field(default=1, kw_only=True)
    local: Path | None = dataclasses.field(default=None, kw_only=True)

    @property
    def activations(self) -> Path:
        """Return the path of the folder of the activations, and of parts of blocks that workers hand each other."""
        return self.root / "activations" if self.local is None else self.local

    @classmethod
    def around(cls, folder: Path) -> Self:
        """Return the layout of the run that a folder belongs to, be it the run directory or the model in it.

        Args:
            folder: Folder of a run, of its model, or any other, which is then taken for the run directory.
        """
        inside = cls(folder.absolute().parent)
        return inside if folder.absolute() == inside.model and inside.identity.is_file() else cls(folder)

    @property
    def config(self) -> Path:
        """Return the path of the resolved configuration."""
        return self.root / "config.yaml"

    @property
    def identity(self) -> Path:
        """Return the path of the file that says which run the directory holds."""
        return self.root / "run.json"

    @property
    def model(self) -> Path:
        """Return the path of the folder of the finished model."""
        return self.root / "model"

    @property
    def source(self) -> Path:
        """Return the path of the folder where every node finds the small files of a remote model."""
        return self.root / "source"

    @property
    def records(self) -> Path:
        """Return the path of the folder of the records."""
        return self.root / "records"

    @property
    def tokens(self) -> Path:
        """Return the path of the file with the tokens of every chunk."""
        return self.root / "tokens.safetensors"

    @property
    def summary(self) -> Path:
        """Return the path of the summary of the finished run."""
        return self.root / "summary.json"

    @property
    def inventory(self) -> Path:
        """Return the path of the file that lists every file of the finished model."""
        return self.root / "model.json"

    @property
    def uploads(self) -> Path:
        """Return the path of the file that says what the Hub holds of the model."""
        return self.root / "uploads.json"

    @property
    def journal_file(self) -> Path:
        """Return the path of the journal."""
        return self.root / "journal.jsonl"

    @property
    def allocation(self) -> Path:
        """Return the path of the file with the width of every layer, which a run with `bits: auto` has."""
        return self.root / "allocation.json"

    @property
    def report(self) -> Path:
        """Return the path of the folder of the report for people."""
        return self.root / "report"

    @property
    def leftovers(self) -> tuple[Path, ...]:
        """Return the folders that a complete run does not need: inputs of blocks, and shards of earlier rounds."""
        return self.root / "activations", self.root / "rounds", self.activations

    def record(self, unit: str) -> Path:
        """Return the path of the record of a unit.

        Args:
            unit: Name of the unit.
        """
        return self.records / f"{unit}.json"

    def shard(self, round_index: int, file: str) -> Path:
        """Return the path of a shard that a round writes. The shards of the last round are files of the model.

        Args:
            round_index: Index of the round.
            file: Name of the shard.
        """
        return (self.model if round_index == self.rounds - 1 else self.root / "rounds" / str(round_index)) / file

    def corrections(self, round_index: int, file: str) -> Path:
        """Return the path of the corrections of low rank that a round writes for a block.

        Args:
            round_index: Index of the round.
            file: Name of the block's shard.
        """
        is_last = round_index == self.rounds - 1
        return (self.root if is_last else self.root / "rounds" / str(round_index)) / "adapter" / file

    def inputs(self, stream: str, block: int) -> Path:
        """Return the path of the folder with the inputs of a block. All streams share those of the first block.

        Args:
            stream: Name of the stream.
            block: Index of the block.
        """
        return self.activations / (stream if block else "embedded") / f"{block:04d}"

    def hidden(self, stream: str, block: int, chunk: str) -> Path:
        """Return the path of the hidden states of one chunk before a block.

        Args:
            stream: Name of the stream.
            block: Index of the block.
            chunk: Name of the chunk.
        """
        return self.inputs(stream, block) / f"{chunk}.safetensors"

    def sample(self, stream: str, block: int, chunk: str) -> Path:
        """Return the path of a few tokens of the hidden states of one chunk before a block.

        Args:
            stream: Name of the stream.
            block: Index of the block.
            chunk: Name of the chunk.
        """
        return self.root / "activations" / "samples" / stream / f"{block:04d}" / f"{chunk}.safetensors"

    def partial(self, round_index: int, block: int, name: str) -> Path:
        """Return the path of a file that workers hand each other while they solve a block.

        Args:
            round_index: Index of the round.
            block: Index of the block.
            name: Name of the file without its suffix; see `part_file`.
        """
        return self.activations / "parts" / f"{round_index}-{block:04d}" / f"{name}.safetensors"

    def token_weights(self, block: int) -> Path:
        """Return the file of the weights that the loss gives the calibration tokens at a block's layers.

        Args:
            block: Index of the block.
        """
        return self.root / "activations" / "token-weights" / f"{block:04d}.safetensors"

    def calls(self, batch: int, length: int) -> Path:
        """Return the path of the file with the arguments of every block for chunks of one shape.

        Args:
            batch: Number of sequences in a chunk.
            length: Number of tokens in a sequence.
        """
        return self.activations / f"calls-{batch}x{length}.safetensors"

    def chunk_call(self, chunk: str, block: int) -> Path:
        """Return the path of the file with those arguments of a block that are others for a chunk than `calls` holds.

        Args:
            chunk: Name of the chunk.
            block: Index of the block.
        """
        return self.activations / "calls" / f"{chunk}-{block:04d}.safetensors"
