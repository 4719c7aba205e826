"""Passes of chunks through a whole block, whose outputs are the inputs of the next one."""

from collections.abc import Sequence

from astro.model.block_call import BlockState
from astro.timing import host_clock_s
from astro_dist.schedule.calls import Forward, ForwardChunk
from astro_dist.schedule.names import is_held_out, stream_names
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.chunk_pipeline import ChunkPipeline, Passage
from astro_dist.worker.fed_block import FedBlock

__all__ = ["feed_chunk", "forward_chunk"]


def feed_chunk(runner: BlockRunner, pipeline: ChunkPipeline, fed_block: FedBlock, call: Forward) -> None:
    """Pass one chunk through an open block and keep the output; a calibration chunk adds to its statistics, if any.

    Args:
        runner: Runner of the worker's blocks.
        pipeline: Passes chunks through these blocks.
        fed_block: The open block.
        call: Call that names the chunk.
    """
    # The call ends when its output is on disk. A clock that waits for the device would wait for the next chunk too.
    start, stream, block = host_clock_s(), stream_names(runner.spec.run.rounds)[call.round_index], call.block
    is_last = block + 1 == len(runner.spec.plan.blocks)

    def compute(chunk: str, states: Sequence[BlockState]) -> BlockState:
        with runner.serving(stream, fed_block.unit):
            if is_held_out(chunk) or fed_block.statistics is None:
                return runner.forward(block, states[0], chunk)
            with runner.cache.watching(block, fed_block.largest):
                return fed_block.statistics.run(lambda: runner.forward(block, states[0], chunk), chunk)

    def save(chunk: str, output: BlockState) -> None:
        if not is_last or is_held_out(chunk):
            runner.states.save(stream, block + 1, chunk, output)

    place = (Forward, *call.place)
    pipeline.run(Passage(place, lambda chunk: [(stream, block, chunk)], compute, save), call.chunk, True)
    fed_block.seconds["forward"] += host_clock_s() - start


def forward_chunk(runner: BlockRunner, pipeline: ChunkPipeline, call: ForwardChunk) -> float:
    """Pass one chunk through a block of a stream.

    Args:
        runner: Runner of the worker's blocks.
        pipeline: Passes chunks through these blocks.
        call: Call that names the stream, the block and the chunk.

    Returns:
        The seconds that it took.
    """
    start, stream, block = host_clock_s(), call.stream, call.block
    unit = runner.load(stream, block)
    runner.expect_following(call)

    def compute(chunk: str, states: Sequence[BlockState]) -> BlockState:
        with runner.serving(stream, unit):
            return runner.forward(block, states[0], chunk)

    passage = Passage(
        (ForwardChunk, stream, block),
        lambda chunk: [(stream, block, chunk)],
        compute,
        lambda chunk, output: runner.states.save(stream, block + 1, chunk, output),
    )
    pipeline.run(passage, call.chunk)
    return host_clock_s() - start
