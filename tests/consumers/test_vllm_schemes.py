"""vLLM's own reader chooses the scheme that we meant for rounded inputs, and rounds them where we say so.

    python -m pytest -n 0 tests/consumers/test_vllm_schemes.py -m consumers --vllm-python VLLM_ENVIRONMENT/bin/python \
        --humming HUMMING

HUMMING is the folder of `pip install --no-deps --target HUMMING humming-kernels==0.1.20 cuda-bindings cuda-pathfinder`.
Without it vLLM cannot say of which type the inputs of these kernels are. The GPU is pretended (`vllm_schemes.py`).
"""

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme
from astro.formats.compressed_tensors import FP8_CACHE, quantization_config
from astro.formats.rounded_inputs import inputs_notes, inputs_refusal
from astro.model.linear_layer import LinearLayer

pytestmark = [pytest.mark.consumers, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).with_name("vllm_schemes.py")
INT8, INT4, FP8 = ActivationScheme(8, "int"), ActivationScheme(4, "int"), ActivationScheme(8, "float")
MEANT = {
    None: ("CompressedTensorsWNA16", "16 bits"),
    INT8: ("CompressedTensorsWNA8Int", "int8"),
    INT4: ("CompressedTensorsWNA4Int", "int4"),
    FP8: ("CompressedTensorsW4A8Fp8", "float8e4m3"),
}
CAPABILITIES = (75, 80, 89, 90, 100, 120)
DOWN, EXPERTS = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.experts"
ATTENTION = "model.layers.0.self_attn.attn"
GRIDS = [
    LayerScheme(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product((2, 3, 4, 8), (-1, 32, 64, 96, 128, 256), (True, False))
]
COLUMNS = 768  # whole groups of all of these sizes


def question(scheme, inputs, capability=90, backend="auto", **changes):
    config = quantization_config({DOWN: scheme}, ["lm_head"], "static", inputs)
    asked = {"config": config, "name": DOWN, "rows": 512, "columns": COLUMNS}
    return {**asked, "capability": capability, "backend": backend, **changes}


@pytest.fixture(scope="module")
def ask(vllm_python, request):
    """Answers of vLLM to questions, in their order."""
    humming = request.config.getoption("--humming", default=None)

    def run(questions):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": humming} if humming else {})
        lines = "".join(f"{json.dumps(asked)}\n" for asked in questions)
        command = [vllm_python, SCRIPT]
        result = subprocess.run(
            command, input=lines, capture_output=True, text=True, env=environment, timeout=600, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]

    return run


@pytest.fixture(scope="module")
def matrix(ask):
    """What vLLM makes of every grid with every type of inputs, by both and then by GPU and choice of kernels."""
    pairs = list(itertools.product(GRIDS, MEANT))
    places = list(itertools.product(CAPABILITIES, ("auto", "humming")))
    answers = iter(ask([question(scheme, inputs, *place) for scheme, inputs in pairs for place in places]))
    return {pair: {place: next(answers) for place in places} for pair in pairs}


def layer_of(scheme):
    return [LinearLayer.plain(DOWN, f"{DOWN}.weight", 512, COLUMNS)], {DOWN: [scheme]}


def rounding(answers, inputs):
    """Where inputs are rounded as meant; None where this environment cannot know."""
    if any("error" not in answer and answer["inputs"] is None for answer in answers.values()):
        return None
    return {place for place, answer in answers.items() if answer.get("inputs") == MEANT[inputs][1]}


def test_the_scheme_is_the_one_that_we_meant(matrix):
    for (scheme, inputs), answers in matrix.items():
        if inputs_refusal(*layer_of(scheme), inputs) is not None:
            continue
        for (capability, _), answer in answers.items():
            if inputs == FP8 and capability != 90:
                assert "No compressed-tensors compatible scheme" in answer["error"]
            elif "error" in answer:  # such as 8-bit asymmetric weights without Humming
                assert not scheme.symmetric or scheme.bits < 4, (scheme, inputs, answer)
                assert "Failed to find a kernel" in answer["error"]
            else:
                expected = (MEANT[inputs][0], scheme.bits, scheme.group_size)
                assert (answer["scheme"], answer["bits"], answer["group_size"]) == expected, (scheme, inputs, answer)


def test_what_we_refuse_is_rounded_nowhere(matrix):
    refused = 0
    for (scheme, inputs), answers in matrix.items():
        if inputs_refusal(*layer_of(scheme), inputs) is not None:
            refused += 1
            assert not rounding(answers, inputs), (scheme, inputs)
    # All with FP8 but one; with int4 8-bit weights, asymmetric ones of 4 bits, small groups; asymmetric W8A8.
    assert refused == 47 + (12 + 6 + 5) + 6


def test_inputs_are_rounded_where_we_say_so(matrix):
    for (scheme, inputs), answers in matrix.items():
        places = rounding(answers, inputs)
        if inputs is None or places is None or inputs_refusal(*layer_of(scheme), inputs) is not None:
            continue
        notes = " ".join(inputs_notes(*layer_of(scheme), inputs))
        assert ("vLLM 0.32 leaves inputs in 16 bits where weights have groups" in notes) == (not places)
        if not places or inputs == FP8:
            continue
        assert {capability for capability, _ in places} == ({75, 80, 89} if inputs == INT4 else {75, 80, 89, 90, 120})
        by_default = {capability for capability, backend in places if backend == "auto"}
        assert ("--linear-backend humming" in notes) == (by_default < {capability for capability, _ in places})


def test_outputs_that_cutlass_cannot_cut_stay_in_16_bits(ask):
    scheme = LayerScheme(group_size=128)
    answer, ragged = ask([question(scheme, FP8), question(scheme, FP8, rows=448)])
    assert answer["kernel"] == "CutlassW4A8LinearKernel"
    assert (ragged.get("inputs") or "16 bits") == "16 bits"


@pytest.mark.parametrize("inputs", [None, INT8, FP8])
def test_cache_is_held_in_fp8_with_the_scales_of_the_checkpoint(ask, inputs):
    config = quantization_config({DOWN: LayerScheme(group_size=128)}, ["lm_head"], "static", inputs)
    config |= {"kv_cache_scheme": FP8_CACHE}
    (answer,) = ask([question(LayerScheme(), inputs, config=config, name=ATTENTION)])
    assert answer["scheme"] == "CompressedTensorsKVCacheMethod"
    assert {"k_scale", "v_scale"} <= set(answer["scales"])


def test_experts_have_a_class_for_fp8_alone(ask):
    grids = [LayerScheme(bits=bits, group_size=size) for bits in (3, 4, 8) for size in (-1, 128)]
    pairs = list(itertools.product(grids, (INT8, INT4, FP8)))
    config = [question(scheme, inputs, name=EXPERTS) for scheme, inputs in pairs]
    unpacked = {"CompressedTensorsW4A8Int8MoEMethod", "CompressedTensorsW8A8Int8MoEMethod"}
    for (scheme, inputs), answer in zip(pairs, ask(config), strict=True):
        layer = LinearLayer.plain(f"{EXPERTS}.0.up_proj", "m.weight", 512, 512)
        if inputs_refusal([layer], {layer.name: [scheme]}, inputs) is None:
            assert answer["scheme"] == "CompressedTensorsW4A8Fp8MoEMethod"
        elif "scheme" in answer:  # it reads weights that are stored one a byte, which ours are not, or groups of 128
            assert answer["scheme"] in unpacked


def test_inputs_between_learned_clips_have_no_scheme(ask):
    static = [ActivationScheme(bits, "int", is_static=True) for bits in (4, 8)]
    pairs = list(itertools.product(GRIDS, static))
    for (_, inputs), answer in zip(pairs, ask([question(*pair) for pair in pairs]), strict=True):
        assert "No compressed-tensors compatible scheme" in answer["error"]
        assert "vLLM 0.32 refuses the model" in inputs_notes([], {}, inputs)[0]


def test_layers_with_grids_of_their_own_are_found_by_their_fused_names(ask):
    attention = "model.layers.0.self_attn"
    schemes = {f"{attention}.{name}_proj": LayerScheme(bits=3, group_size=-1) for name in "qkv"}
    schemes[f"{attention}.o_proj"] = LayerScheme(bits=4, group_size=-1)
    config = quantization_config(schemes, ["lm_head", DOWN], "static", INT8)
    names = [f"{attention}.qkv_proj", f"{attention}.o_proj", DOWN]
    fused, output, ignored = ask([question(LayerScheme(), INT8, config=config, name=name) for name in names])
    assert {(a["scheme"], a["bits"]) for a in (fused, output)} == {(MEANT[INT8][0], 3), (MEANT[INT8][0], 4)}
    assert ignored == {"scheme": None}
