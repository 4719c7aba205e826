"""What vLLM refuses of rounded inputs, and leaves in 16 bits; `tests/consumers` asks vLLM itself."""

import pytest

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme
from astro.formats.rounded_inputs import inputs_notes, inputs_refusal
from astro.model.linear_layer import LinearLayer

STATIC = ActivationScheme(4, "int", is_static=True)
INT8, INT4, FP8 = ActivationScheme(8, "int"), ActivationScheme(4, "int"), ActivationScheme(8, "float")


def asked(function, scheme, inputs, name="m.o_proj", rows=256, columns=512):
    layer = LinearLayer.plain(name, f"{name}.weight", rows, columns)
    return function([layer], {name: [LayerScheme(**scheme)]}, inputs)


@pytest.mark.parametrize(
    ("scheme", "inputs", "message"),
    [
        ({}, INT8, None),
        ({}, INT4, None),
        ({}, FP8, None),
        ({"bits": 3, "group_size": -1, "symmetric": False}, INT8, None),
        ({"bits": 2, "symmetric": False}, INT4, None),
        ({"bits": 4, "symmetric": False}, INT8, None),
        (
            {"bits": 3},
            FP8,
            "m.o_proj with symmetric 3-bit weights, groups of 128: .* int4 weights in groups of 128 alone",
        ),
        ({"group_size": 64}, FP8, "groups of 64: .* quantization.ignore, or take activations.type: int"),
        ({"group_size": -1}, FP8, "one scale a row: .* in groups of 128"),
        ({"symmetric": False}, FP8, "asymmetric 4-bit weights, groups of 128: vLLM multiplies FP8"),
        ({"bits": 8}, INT4, "vLLM rounds inputs of such weights to 8 bits, not to 4; take activations.bits: 8"),
        ({"bits": 3, "group_size": 32}, INT4, "of such small groups to 8 bits, not to 4; take groups of at least 64"),
        ({"bits": 3, "group_size": 64}, INT4, None),
        ({"symmetric": False}, INT4, r"int4 per token \(Humming\) refuses asymmetric weights of the same width"),
        ({"bits": 8, "symmetric": False}, INT8, r"int8 per token \(Humming\) refuses asymmetric"),
    ],
)
def test_combinations_that_no_server_takes_are_refused(scheme, inputs, message, match):
    match(asked(inputs_refusal, scheme, inputs), message)


@pytest.mark.parametrize("group_size", [64, -1])
def test_layers_that_no_groups_of_128_divide_are_told_to_be_kept(match, group_size):
    message = "in groups of 128 alone, which do not divide its 576 inputs; take such weights and .*indivisible: keep"
    match(asked(inputs_refusal, {"group_size": group_size}, FP8, columns=576), message)


@pytest.mark.parametrize(
    ("inputs", "columns", "message"),
    [
        (FP8, 512, None),
        (FP8, 384, "has 384 inputs: experts with FP8 per token want a multiple of 256"),
        (INT8, 512, "no kernel for packed experts with integer inputs; .* activations.type: float"),
        (INT4, 512, "m.experts.3.up_proj with int4 per token"),
    ],
)
def test_experts_take_fp8_alone(inputs, columns, message, match):
    match(asked(inputs_refusal, {}, inputs, name="m.experts.3.up_proj", columns=columns), message)


@pytest.fixture
def match():
    def check(text, message):
        if message is None:
            assert text is None
        else:
            with pytest.raises(ValueError, match=message):
                raise ValueError(text)

    return check


def test_every_width_that_may_be_chosen_is_judged():
    layer = LinearLayer.plain("m.q", "m.q.weight", 256, 512)
    possible = {"m.q": [LayerScheme(bits=bits) for bits in (2, 3, 4, 8)]}
    assert "8-bit weights" in inputs_refusal([layer], possible, INT4)
    assert inputs_refusal([layer], possible, INT8) is None
    assert inputs_refusal([layer], possible, None) is None
    assert inputs_notes([layer], possible, None) == []


@pytest.mark.parametrize(
    ("scheme", "inputs", "phrases"),
    [
        ({}, INT8, ["leaves inputs in 16 bits where weights have groups"]),
        ({"bits": 3, "group_size": -1}, INT8, ["7.5 to 9.0 and 12.0"]),
        ({"group_size": -1}, INT8, ["7.5 to 9.0 and 12.0", "--linear-backend humming"]),
        ({}, INT4, ["on 9.0 and 12.0 it takes int8", "--linear-backend humming"]),
        ({"bits": 2}, INT4, ["on 9.0 and 12.0 it takes int8"]),
        ({}, FP8, ["capability 9.0"]),
        ({}, STATIC, ["vLLM 0.32 refuses the model"]),
    ],
)
def test_inputs_that_stay_in_16_bits_are_said(scheme, inputs, phrases):
    notes = asked(inputs_notes, scheme, inputs)
    assert len(notes) == len(phrases)
    assert all(phrase in note for phrase, note in zip(phrases, notes, strict=True))


@pytest.mark.parametrize("scheme", [{}, {"symmetric": False}, {"bits": 8}, {"group_size": 32}])
def test_learned_clips_are_a_note_and_no_refusal_because_they_are_for_measuring(scheme):
    assert asked(inputs_refusal, scheme, STATIC) is None
    (note,) = asked(inputs_notes, scheme, STATIC)
    assert note.startswith("int4 between learned clips: no server that we know of takes such inputs")


def test_outputs_of_fused_layers_count_together():
    rows = {"m.q_proj": 192, "m.k_proj": 32, "m.v_proj": 32, "m.o_proj": 192}
    layers = [LinearLayer.plain(name, f"{name}.weight", n, 256) for name, n in rows.items()]
    notes = inputs_notes(layers, {}, FP8)
    assert "1 layers whose outputs are no multiple of 128" in notes[1]
    assert notes[1].endswith("the first is m.o_proj")
