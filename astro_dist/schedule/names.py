"""The name of every unit and stream of a run."""

__all__ = [
    "STREAMS",
    "block_unit",
    "evaluate_unit",
    "head_unit",
    "is_held_out",
    "sequential_units",
    "stream_names",
    "unit_names",
]


def is_held_out(chunk: str) -> bool:
    """Whether a chunk is only measured on, never calibrated on: its name begins with `h`."""
    return chunk.startswith("h")


def stream_names(rounds: int) -> list[str]:
    """Streams of a run, in the order in which they arise."""
    return ["original", *(f"round-{r}" for r in range(rounds))]


def block_unit(round_index: int, block: int) -> str:
    """Unit that quantizes a block in a round."""
    return f"round-{round_index}-block-{block:04d}"


def evaluate_unit(block: int) -> str:
    """Unit that takes the held-out chunks through a block of the result."""
    return f"evaluate-{block:04d}"


def head_unit(stream: str) -> str:
    """Unit that measures a stream's loss."""
    return f"head-{stream}"


def unit_names(num_blocks: int, num_copies: int, rounds: int, evaluated: bool) -> list[str]:
    """Every unit of a run in mode `blocks`."""
    blocks = [block_unit(r, b) for r in range(rounds) for b in range(num_blocks)]
    chain = [evaluate_unit(b) for b in range(num_blocks)] + [head_unit(stream) for stream in stream_names(rounds)]
    return ["embed", *(f"copy-{i:04d}" for i in range(num_copies)), *blocks, *(chain if evaluated else [])]


def sequential_units(num_blocks: int, num_copies: int, evaluated: bool) -> list[str]:
    """Every unit of a run in mode `sequential`."""
    copies, blocks = [f"copy-{i:04d}" for i in range(num_copies)], [block_unit(0, b) for b in range(num_blocks)]
    return ["embed", *copies, *blocks, *([head_unit(stream) for stream in STREAMS] if evaluated else [])]


STREAMS = stream_names(1)
