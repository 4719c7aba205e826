"""The names of a run: every unit, stream, chunk and hand-over file is written and parsed here and nowhere else.

    embed  copy-0000  round-0-block-0003  evaluate-0003  head-original    units
    weights-0003  loss-gradient                                           units, where the loss weighs tokens
    smoothing-0003                                                        units, where inputs are smoothed
    original  round-0  round-1  gradient  energy  channels                streams
    c0000  h0000                                                          chunks: calibrated on, and held out
    0-sum  0-share-1  0-decision  0-sample-2  0-tile-3  0-corrections     parts of a batch that workers hand each other

A *stream* is the hidden states of every chunk on their way through one model: `original` through the source, `round-r`
through what round r wrote. Three streams are no hidden states. `gradient` is that of the loss with respect to the
hidden states of `original`. The others are kept where a block's output is: `energy` is what the gradient measured at
the block's layers on its way back, and `channels` is what a chunk of `original` measured at their inputs.
"""

import re

__all__ = [
    "CHANNELS",
    "CORRECTIONS",
    "DECISION",
    "EMBED",
    "ENERGY",
    "GRADIENT",
    "LOSS_GRADIENT",
    "ORIGINAL",
    "SINGLE",
    "STREAMS",
    "SUM",
    "any_share",
    "block_name",
    "block_of_unit",
    "block_unit",
    "chunk_name",
    "copy_index",
    "copy_unit",
    "evaluate_unit",
    "head_unit",
    "is_block_unit",
    "is_evaluation_unit",
    "is_held_out",
    "part_file",
    "round_of_stream",
    "round_stream",
    "sample_part",
    "sequential_units",
    "share_part",
    "smoothing_unit",
    "stream_names",
    "tile_part",
    "unit_names",
    "weights_unit",
]

EMBED = "embed"
"""The unit that makes the hidden states before the first block."""
ORIGINAL = "original"
"""The stream through the source."""
GRADIENT = "gradient"
"""The stream of the loss's gradient on its way back through the source."""
ENERGY = "energy"
"""The stream of what the gradient measured in each block."""
CHANNELS = "channels"
"""The stream of what chunks measured at the inputs of each block's layers."""
LOSS_GRADIENT = "loss-gradient"
"""The unit that the gradient begins with; it leaves no record."""
SUM = "sum"
"""The part that holds a batch's Hessians, added up over all shares."""
DECISION = "decision"
"""The part that holds what was decided for all rows of a batch."""
CORRECTIONS = "corrections"
"""The part that holds the corrections of low rank of a batch's layers."""

_BLOCK_UNIT = re.compile(r"round-(\d+)-block-(\d+)")
_COPY_UNIT = re.compile(r"copy-(\d+)")
_ROUND_STREAM = re.compile(r"round-(\d+)")


def chunk_name(number: int, held_out: bool) -> str:
    """Return the name of a chunk of the calibration text. A chunk that is held out is only measured on."""
    return f"{'h' if held_out else 'c'}{number:04d}"


def is_held_out(chunk: str) -> bool:
    """Tell whether a chunk is only measured on, never calibrated on: its name begins with `h`."""
    return chunk.startswith("h")


def round_stream(round_index: int) -> str:
    """Return the name of the stream through what a round wrote."""
    return f"round-{round_index}"


def round_of_stream(stream: str) -> int | None:
    """Return the round that wrote the model which a stream passes through; None for the stream through the source."""
    matched = _ROUND_STREAM.fullmatch(stream)
    return int(matched[1]) if matched else None


def stream_names(rounds: int) -> list[str]:
    """Return the names of the streams of a run, in the order in which they arise."""
    return [ORIGINAL, *(round_stream(r) for r in range(rounds))]


def copy_unit(index: int) -> str:
    """Return the name of the unit that copies tensors from outside the blocks."""
    return f"copy-{index:04d}"


def copy_index(unit: str) -> int | None:
    """Return the index of a unit that copies tensors; None for any other unit."""
    matched = _COPY_UNIT.fullmatch(unit)
    return int(matched[1]) if matched else None


def block_name(block: int) -> str:
    """Return the short name of a block, whatever is done to it."""
    return f"block-{block:04d}"


def block_unit(round_index: int, block: int) -> str:
    """Return the name of the unit that quantizes a block in a round."""
    return f"{round_stream(round_index)}-{block_name(block)}"


def block_of_unit(unit: str) -> tuple[int, int] | None:
    """Return the round and the block of a unit that quantizes a block; None for any other unit."""
    matched = _BLOCK_UNIT.fullmatch(unit)
    return (int(matched[1]), int(matched[2])) if matched else None


def is_block_unit(unit: str) -> bool:
    """Tell whether a unit quantizes a block."""
    return block_of_unit(unit) is not None


def evaluate_unit(block: int) -> str:
    """Return the name of the unit that takes the held-out chunks through a block of the result."""
    return f"evaluate-{block:04d}"


def head_unit(stream: str) -> str:
    """Return the name of the unit that measures the loss at the end of a stream."""
    return f"head-{stream}"


def is_evaluation_unit(unit: str) -> bool:
    """Tell whether a unit measures on the held-out text, at a block of the result or at the end of a stream."""
    return unit.startswith(("evaluate-", "head-"))


def weights_unit(block: int) -> str:
    """Return the name of the unit that weighs the calibration tokens for a block, by the loss."""
    return f"weights-{block:04d}"


def smoothing_unit(block: int) -> str:
    """Return the name of the unit that decides how the inputs of a block's layers are smoothed."""
    return f"smoothing-{block:04d}"


def unit_names(num_blocks: int, num_copies: int, rounds: int, evaluated: bool) -> list[str]:
    """Return the name of every unit of a run in mode `blocks`."""
    copies = [copy_unit(i) for i in range(num_copies)]
    blocks = [block_unit(r, b) for r in range(rounds) for b in range(num_blocks)]
    chain = [evaluate_unit(b) for b in range(num_blocks)] + [head_unit(stream) for stream in stream_names(rounds)]
    return [EMBED, *copies, *blocks, *(chain if evaluated else [])]


def sequential_units(num_blocks: int, num_copies: int, evaluated: bool) -> list[str]:
    """Return the name of every unit of a run in mode `sequential`."""
    copies, blocks = [copy_unit(i) for i in range(num_copies)], [block_unit(0, b) for b in range(num_blocks)]
    return [EMBED, *copies, *blocks, *([head_unit(stream) for stream in STREAMS] if evaluated else [])]


def share_part(share: int) -> str:
    """Return the name of the part that holds what one share of the calibration chunks adds to a batch's Hessians."""
    return f"share-{share}"


def sample_part(tile: int) -> str:
    """Return the name of the part that holds the errors of one tile of a batch's sampled rows under every β."""
    return f"sample-{tile}"


def tile_part(tile: int) -> str:
    """Return the name of the part that holds one solved tile of a batch's rows."""
    return f"tile-{tile}"


def part_file(batch: int, part: str) -> str:
    """Return the name of the file of a part of a batch, without its suffix."""
    return f"{batch}-{part}"


def any_share(batch: int) -> str:
    """Return the pattern of the names of the files of all shares of a batch."""
    return part_file(batch, "share-*")


SINGLE = ("single-0", "single-1")
"""Names under which it is recorded what blocks are called with for one sequence alone, and for another one."""
STREAMS = stream_names(1)
"""The streams of a run of one round."""
