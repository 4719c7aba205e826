"""What is foretold of a worker's memory, beside what passes take on a CPU and what large models are known to take."""

import copy
import dataclasses

import pytest
import torch
import transformers

from astro.activation_config import ActivationScheme, Reconstruction
from astro.calibration.backward import pass_back
from astro.config import LayerScheme, SolverSettings
from astro.model import perplexity
from astro.model.activations import BlockLayers
from astro.model.block_call import BlockState, forward
from astro.model.call_file import load_call, save_calls
from astro.model.recording import count_outputs, record
from astro.model.skeleton import Skeleton
from astro.quantization.grid import QuantizedLinear, fit_grid
from astro.quantization.scale_tuning import TuningText, tune_scales
from astro.storage.checkpoint import Checkpoint
from astro_dist.config.schema import RunConfig
from astro_dist.planning.checkpoint_plan import make_plan
from astro_dist.planning.forward_memory import ForwardMemory
from astro_dist.planning.predicted_groups import PredictedInputGroup, predicted_input_groups, together
from astro_dist.planning.worker_memory import _LOGITS, WorkerMemory
from tests.support.architectures import DENSE, EXPERTS
from tests.support.device_memory import peak_bytes
from tests.support.models import write_checkpoint
from tests.support.sequential_solve import peaks_of_sequential_solve
from tests.support.sparse_checkpoint import write_sparse_checkpoint
from tests.support.staged_solve import peaks_of_staged_solve

SEQUENCES, LENGTH = 2, 512
ARCHITECTURES = {
    "llama": (DENSE["llama"], 1), "gemma2": (DENSE["gemma2"], 1), "gpt-oss": (EXPERTS["gpt-oss"], 1),
    "llama4": (EXPERTS["llama4"], 8),
}  # fmt: skip
"""Fused attention; eager attention; that with sinks; dense experts, of which there are so many times more."""


@pytest.fixture(params=ARCHITECTURES)
def passes(request, tmp_path):
    """Bytes that passes of the first block take, and those that are foretold: forth, back, and to tune its scales."""
    return passes_of(tmp_path, *ARCHITECTURES[request.param], LENGTH)


def passes_of(tmp_path, config, times, length):
    config = copy.deepcopy(config)
    config.max_position_embeddings = length
    if times > 1:
        config.num_local_experts *= times  # another name of `num_experts`, where that is the name
    folder, cpu = write_checkpoint(tmp_path / "model", config, shard="1GB"), torch.device("cpu")
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    plan = make_plan(checkpoint, skeleton, run(folder).quantization)
    ids = torch.arange(SEQUENCES * length).reshape(SEQUENCES, length) % 250
    with torch.no_grad():
        skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), cpu)
        skeleton.model.tie_weights()
        num_outputs = count_outputs(skeleton, ids[:1, :4])
        hidden, calls = record(skeleton, ids, num_outputs)
        save_calls(tmp_path / "calls", calls, num_outputs)
        single = record(skeleton, ids[:1], num_outputs)[1][0]
    block, call = skeleton.blocks[0], load_call(tmp_path / "calls", 0, cpu)
    state = BlockState(hidden)
    with torch.no_grad():
        forth = peak_bytes(lambda: forward(block, state, call))
    layers, gradient = BlockLayers(skeleton.model, plan.blocks[0].linears), BlockState(torch.ones_like(hidden))
    back = peak_bytes(lambda: pass_back(layers, lambda before: forward(block, before, call), state, gradient))
    batches = together(predicted_input_groups(plan.blocks[0].linears, plan.expert_share), 1 << 20)
    memory = ForwardMemory(plan, length, torch.float32, "cpu")
    solved = {name: on_grid(layers.weight(name)) for name in layers.by_name}

    def tune():
        texts = [tuning_text(block, BlockState(hidden[i : i + 1].clone()), single) for i in (0, 1)]
        with torch.no_grad():
            tune_scales(layers, solved, texts, 2, torch.float32)

    is_dense = bool(plan.forward_shape.dense_experts)
    weights = [skeleton.model.get_parameter(operand.parameter) for operand in layers.operands]
    largest = max((each if is_dense or each.ndim < 3 else each[0]).numel() for each in weights)
    integers = sum(layer.Q.numel() + 8 * layer.grid.scale.numel() for layer in solved.values())
    tuned = peak_bytes(tune, weights) + integers
    return {
        "forth": (forth, memory.forth(batches, SEQUENCES, 1)),
        "back": (back, memory.back(batches, SEQUENCES)),
        "tuned": (tuned, memory.tuned(batches, 2, 16, largest)),
    }


def on_grid(weight):
    scheme = LayerScheme(bits=4, group_size=16)
    grid = fit_grid(weight.float(), scheme, SolverSettings(scale_search="minmax"), torch.float32)
    return QuantizedLinear(grid.quantize(weight.float()), grid)


@torch.no_grad()
def tuning_text(block, state, call):
    wanted = forward(block, state, call).hidden
    weights = torch.ones(wanted.shape[0] * wanted.shape[1])
    return TuningText(lambda: forward(block, state, call).hidden, wanted, weights)


def run(folder, **changes):
    content = {
        "model": {"source": str(folder)}, "output": {"dir": "none"},
        "quantization": changes.pop("quantization", {"group_size": 16}), "activations": changes.pop("activations", {}),
        "calibration": {"samples": 128, "sequence_length": 2048, "chunk_samples": 2, **changes.pop("calibration", {})},
        "execution": {"device": "cuda", **changes},
    }  # fmt: skip
    return RunConfig.model_validate(content)


def test_passes_take_what_is_foretold(passes):
    ratios = {what: foretold / taken for what, (taken, foretold) in passes.items()}
    assert 1 <= ratios["forth"] <= 1.7
    assert 1 <= ratios["back"] <= 2.5
    assert 1 <= ratios["tuned"] <= 2.5


def test_experts_that_are_run_one_by_one_have_gradients_one_by_one(tmp_path):
    taken, foretold = passes_of(tmp_path, EXPERTS["qwen3-moe"], 32, 8)["tuned"]
    assert 1 <= foretold / taken <= 1.5


def test_tuning_wants_more_than_the_solve_of_a_large_block_only_in_many_steps(tmp_path):
    solved = gigabytes(tmp_path, "70B", 8)
    tuned = {
        steps: gigabytes(tmp_path, "70B", 8, quantization={"tune_steps": steps}, calibration={"samples": 512})
        for steps in (40, 512)
    }
    assert solved == tuned[40] < tuned[512]


_LONG = {"num_hidden_layers": 1, "num_key_value_heads": 8, "max_position_embeddings": 8192}
MODELS = {
    "70B": transformers.LlamaConfig(
        **_LONG, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, vocab_size=128256
    ),
    "405B": transformers.LlamaConfig(
        **_LONG, hidden_size=16384, intermediate_size=53248, num_attention_heads=128, vocab_size=128256
    ),
    "gpt-oss-120b": transformers.GptOssConfig(
        **_LONG, hidden_size=2880, intermediate_size=2880, num_attention_heads=64, head_dim=64, num_local_experts=128,
        num_experts_per_tok=4, vocab_size=201088,
    ),
    "maverick": transformers.Llama4TextConfig(
        **_LONG, hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384, num_attention_heads=40,
        num_local_experts=128, num_experts_per_tok=1, interleave_moe_layer_step=1, vocab_size=202048,
    ),
}  # fmt: skip
"""One block of large models, with their true sizes."""


def planned(folder, name):
    """The plan of one block of a large model, and its checkpoint, of which only headers are there."""
    write_sparse_checkpoint(folder, MODELS[name])
    checkpoint, skeleton = Checkpoint.open(folder), Skeleton(folder, torch.float32)
    return make_plan(checkpoint, skeleton, run(folder).quantization), checkpoint, folder


def gigabytes(tmp_path, name, sequences, **changes):
    """What a worker on a GPU needs with so many sequences in a chunk, in GB."""
    plan, _, folder = planned(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}", name)
    return WorkerMemory(plan, run(folder, **changes), torch.bfloat16, "cuda").bytes(sequences) / 1e9


def test_405b_in_mode_sequential_leaves_room_on_80_gb(tmp_path):
    assert gigabytes(tmp_path, "405B", 2, mode="sequential") < 70
    assert gigabytes(tmp_path, "70B", 8, mode="sequential") < 27


def test_embeddings_and_head_that_are_larger_than_a_block_are_counted(tmp_path):
    """Of the host as they are read, of the device with hidden states on their way to the head and from it."""
    plan, _, folder = planned(tmp_path / "405B", "405B")
    copies = [dataclasses.replace(unit, written_bytes=10 * unit.written_bytes) for unit in plan.copies]
    large = dataclasses.replace(plan, copies=copies, outside_weights=10 * plan.outside_weights)
    usually, outside = (sum(unit.written_bytes for unit in each) for each in (plan.copies, copies))
    held = max(unit.held_bytes for unit in plan.blocks)
    assert outside > held
    usual, more = (WorkerMemory(each, run(folder), torch.bfloat16, "cuda") for each in (plan, large))
    assert more.of_host(2) - usual.of_host(2) == pytest.approx(outside - max(held, usually), abs=2)
    state = 2048 * plan.hidden_size * 2
    assert more.bytes(4) - more.bytes(2) == pytest.approx(5 * 2 * state, abs=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [64, 512, 3072])
@torch.no_grad()
def test_the_head_holds_as_many_logits_as_are_foretold(monkeypatch, length, dtype):
    """Of one sequence, when the result is measured beside the source, and when the loss is differentiated."""
    ids = torch.arange(2 * length).reshape(2, length) % 250
    hidden, head = torch.randn(2, length, 8, dtype=dtype), torch.randn(4096, 8, dtype=dtype)
    monkeypatch.setattr(perplexity, "run_head", lambda skeleton, ids, hidden, num_outputs: hidden @ head.T)
    logits = 4 * length * len(head)
    measured = peak_bytes(lambda: perplexity.measure_sequences(None, ids, hidden, 0, hidden.clone()))
    differentiated = peak_bytes(lambda: perplexity.loss_gradient(None, ids, hidden, 0))
    few = (1 << 17) + 8 * hidden.numel()  # bytes of what is no logits: tokens, and hidden states
    assert 0.5 * _LOGITS * logits < measured < _LOGITS * logits + few
    assert 0.5 * _LOGITS * logits < differentiated < _LOGITS * logits + few


@pytest.mark.parametrize(
    ("name", "gigabytes_each"),
    [
        # Three copies of all scores, 1.6 GB a sequence, and three states of other chunks on their way.
        ("gpt-oss-120b", (64 * 2048**2 * 3 + 3 * 2048 * 2880) * 2 / 1e9),
        ("maverick", 128 * 2048 * (5120 + 4 * 8192) * 2 / 1e9),  # all experts for all tokens: 19.9 GB a sequence
    ],
)
def test_what_transformers_holds_of_large_models_is_foretold(tmp_path, name, gigabytes_each):
    plain = {"calibration": {"token_weights": "norm"}}
    foretold = [gigabytes(tmp_path, name, sequences, **copy.deepcopy(plain)) for sequences in (16, 32)]
    assert (foretold[1] - foretold[0]) / 16 == pytest.approx(gigabytes_each, rel=0.1)
    # With the gradient of the loss a good deal more is held.
    assert gigabytes(tmp_path, name, 32) > foretold[1] * 1.5


def test_rounded_inputs_take_a_drift_for_every_input(tmp_path):
    drifts = 4 * (3 * 8192**2 + 28672**2)
    for mode in ("blocks", "sequential"):
        plain, rounded, lost = (
            gigabytes(tmp_path, "70B", 1, mode=mode, **changes)
            for changes in (
                {},
                {"activations": {"bits": 4}},
                {"activations": {"bits": 4}, "quantization": {"group_size": 16, "compensation": 0.0}},
            )
        )
        # In mode `sequential` the sums of one stage are there at a time, and none while all of it is solved.
        assert rounded - plain > (drifts if mode == "blocks" else 4 * 28672**2) / 1e9
        assert lost < rounded - 4 * 28672**2 / 1e9
        # Nor do weights make up for 8 bits, which gains nothing.
        eight = {"activations": {"bits": 8}, "quantization": {"group_size": 16}}
        assert gigabytes(tmp_path, "70B", 1, mode=mode, **eight) < rounded - 3.9 * 28672**2 / 1e9


def test_columns_that_corrections_hold_are_counted(tmp_path):
    plan, _, folder = planned(tmp_path / "model", "70B")
    config = run(folder, activations={"bits": 8, "smoothing": "aser", "outlier_channels": 512})
    held, none = (
        WorkerMemory(
            plan, config.model_copy(update={"reconstruction": Reconstruction(rank=rank)}), torch.bfloat16, "cuda"
        ).bytes(1)
        for rank in (512, 511)
    )
    per_rank = 2 * sum(linear.rows + linear.columns for linear in plan.blocks[0].linears)
    assert held - none - per_rank == pytest.approx(4 * 8192 * 512, rel=0.01)  # of the widest layer's rows


def test_window_is_a_mask_for_which_a_backward_pass_on_a_gpu_holds_all_scores(tmp_path):
    plan, _, folder = planned(tmp_path / "model", "70B")
    windowed = dataclasses.replace(plan, forward_shape=dataclasses.replace(plan.forward_shape, window=1024))
    without, held = (WorkerMemory(p, run(folder), torch.bfloat16, "cuda").bytes(32) for p in (plan, windowed))
    assert held - without > 12 * 32 * 64 * 2048**2
    on_cpu = [WorkerMemory(p, run(folder), torch.bfloat16, "cpu").bytes(32) for p in (plan, windowed)]
    assert on_cpu[0] == on_cpu[1]


def test_calls_of_mode_sequential_hold_what_is_foretold():
    """At sizes where matrices of columns × columns are nearly all of it."""
    square, rows = 4 * 2048**2, 16
    int4 = ActivationScheme(4, "int")
    for compensation, scheme, least, foretold in (
        ("auto", None, 4.4, 4.5), (0.0, None, 3.2, 3.5), ("auto", int4, 5.1, 5.5), (0.0, int4, 3.2, 3.5)
    ):  # fmt: skip
        peaks = peaks_of_sequential_solve(rows, 2048, compensation, scheme=scheme)
        largest = max(peaks.values()) / square
        assert least < largest < foretold + 0.15, peaks


@pytest.mark.parametrize(("compensation", "drifts"), [("auto", 1), (0.0, 0)])
def test_stages_hold_what_is_foretold(tmp_path, compensation, drifts):
    """At sizes where matrices of columns × columns are nearly all of it: H, drifts, and what is made from them."""
    square, group = 4 * 2048**2, PredictedInputGroup(16, 2048, 1.0, "a")
    summing, solving = peaks_of_staged_solve(group.rows, group.columns, compensation)
    assert 1 + 3 * drifts <= summing / square < 1.6 + 3 * drifts  # H is added up half by half
    plan, _, folder = planned(tmp_path / "model", "70B")
    config = run(folder, mode="stages", quantization={"group_size": 16, "compensation": compensation})
    memory = WorkerMemory(plan, config, torch.bfloat16, "cuda")
    foretold = memory._staged_bytes(plan.blocks[0], [group], 0.0, memory._solving_bytes(group))
    assert solving < foretold < 1.1 * solving


def test_70b_in_mode_stages_leaves_room_on_40_gb(tmp_path):
    uncompensated, staged = (
        gigabytes(tmp_path, "70B", 8, mode="stages", quantization={"group_size": 16, "compensation": compensation})
        for compensation in (0.0, "auto")
    )
    assert uncompensated < staged < 30


@pytest.mark.parametrize(("compensation", "squares"), [("auto", 8), (0.0, 7)])
def test_a_correction_that_reads_unrounded_inputs_holds_what_is_foretold(tmp_path, compensation, squares):
    plan, _, folder = planned(tmp_path / "model", "70B")
    changes = {"activations": {"bits": 4}, "quantization": {"group_size": 16, "compensation": compensation}}
    config = run(folder, mode="sequential", **changes)
    group, int4 = PredictedInputGroup(16, 2048, 1.0, "a"), ActivationScheme(4, "int")
    settings = config.model_copy(update={"reconstruction": Reconstruction(rank=4)})
    foretold = WorkerMemory(plan, settings, torch.bfloat16, "cuda")._solving_bytes(group)
    peak = peaks_of_sequential_solve(group.rows, group.columns, compensation, rank=4, scheme=int4)["reconstruct"]
    assert squares * 4 * 2048**2 < peak < 1.01 * foretold < 1.03 * peak


def test_a_correction_holds_what_is_foretold(tmp_path):
    """At the sizes of the gate and up projections of a 405B model, of which E alone is more than tiles of rows are."""
    plan, _, folder = planned(tmp_path / "model", "405B")
    config = run(folder, mode="sequential")
    group, foretold = PredictedInputGroup(53248, 16384, 1.0, "a"), {}
    for rank in (0, 64):
        settings = config.model_copy(update={"reconstruction": Reconstruction(rank=rank)})
        foretold[rank] = WorkerMemory(plan, settings, torch.bfloat16, "cuda")._solving_bytes(group)
    peak = peaks_of_sequential_solve(group.rows, group.columns, rank=64)["reconstruct"]
    assert foretold[0] < peak < foretold[64] < 1.1 * peak
