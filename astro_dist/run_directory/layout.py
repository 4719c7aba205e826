"""The layout of a run directory: where each file of a run lies. Nothing is read or written here.

config.yaml    the resolved configuration        records/       one record a finished unit
run.json       identity of the run               activations/   only what unfinished blocks need
model/         the checkpoint, shard by shard    tokens.safetensors   every chunk's tokens
summary.json   the figures of the run            journal.jsonl  what happened when
rounds/        shards of earlier rounds          allocation.json  with a width budget: every layer's width
model.json     files of the finished model       uploads.json   what the Hub holds of it
source/        of a remote model: config, tokenizer, code
"""

import dataclasses
from pathlib import Path

__all__ = ["RunLayout"]


@dataclasses.dataclass(frozen=True)
class RunLayout:
    """Paths of the files of one run.

    Attributes:
        root: Folder of the run directory.
        rounds: Number of passes over the model; the shards of the last one are the model.
    """

    root: Path
    rounds: int = dataclasses.field(default=1, kw_only=True)

    @property
    def config(self) -> Path:
        """File of the resolved configuration."""
        return self.root / "config.yaml"

    @property
    def identity(self) -> Path:
        """File that says which run the directory holds."""
        return self.root / "run.json"

    @property
    def model(self) -> Path:
        """Folder of the result."""
        return self.root / "model"

    @property
    def source(self) -> Path:
        """Folder of a remote model's small files, copied so that every node sees them."""
        return self.root / "source"

    @property
    def records(self) -> Path:
        """Folder of the records of finished units."""
        return self.root / "records"

    @property
    def tokens(self) -> Path:
        """File of every chunk's tokens."""
        return self.root / "tokens.safetensors"

    @property
    def summary(self) -> Path:
        """File of the figures of the finished run."""
        return self.root / "summary.json"

    @property
    def inventory(self) -> Path:
        """File that lists every file of the finished model."""
        return self.root / "model.json"

    @property
    def uploads(self) -> Path:
        """File that says what the Hub holds of the model."""
        return self.root / "uploads.json"

    @property
    def journal_file(self) -> Path:
        """File of what happened when."""
        return self.root / "journal.jsonl"

    @property
    def allocation(self) -> Path:
        """File of the width of every layer, where the run chose them."""
        return self.root / "allocation.json"

    @property
    def report(self) -> Path:
        """Folder of the report for people."""
        return self.root / "report"

    @property
    def leftovers(self) -> tuple[Path, Path]:
        """Folders that a complete run does not need any more: inputs of blocks, and shards of earlier rounds."""
        return self.root / "activations", self.root / "rounds"

    def record(self, unit: str) -> Path:
        """The file of a unit's record.

        Args:
            unit: Name of the unit.
        """
        return self.records / f"{unit}.json"

    def shard(self, round_index: int, file: str) -> Path:
        """The shard that a block becomes in a round; the shards of the last round are the model's own files.

        Args:
            round_index: Index of the round.
            file: Name of the shard.
        """
        return (self.model if round_index == self.rounds - 1 else self.root / "rounds" / str(round_index)) / file

    def inputs(self, stream: str, block: int) -> Path:
        """The folder of a block's input chunks; before the first block all streams are the same.

        Args:
            stream: Name of the model that the hidden states pass through.
            block: Index of the block.
        """
        return self.root / "activations" / (stream if block else "embedded") / f"{block:04d}"

    def hidden(self, stream: str, block: int, chunk: str) -> Path:
        """The file of one chunk's hidden states before a block.

        Args:
            stream: Name of the model that the hidden states pass through.
            block: Index of the block.
            chunk: Name of the chunk.
        """
        return self.inputs(stream, block) / f"{chunk}.safetensors"

    def partial(self, round_index: int, block: int, name: str) -> Path:
        """The file of a part of a block's solve that workers hand each other.

        Args:
            round_index: Index of the round.
            block: Index of the block.
            name: Name of the part.
        """
        return self.root / "activations" / "parts" / f"{round_index}-{block:04d}" / f"{name}.safetensors"

    def calls(self, batch: int, length: int) -> Path:
        """The file of every block's arguments for chunks of one shape.

        Args:
            batch: Number of sequences in a chunk.
            length: Tokens in a sequence.
        """
        return self.root / "activations" / f"calls-{batch}x{length}.safetensors"
