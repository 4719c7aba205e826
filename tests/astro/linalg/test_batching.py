"""Groups side by side: which are, and that each gets what it would get alone."""

import dataclasses
import weakref

import pytest
import torch

from astro.calibration.starved_experts import InputStatistics
from astro.config import LayerScheme, Regularizer, SolverSettings
from astro.errors import NumericalError
from astro.linalg.batching import batches, first_of
from astro.quantization.block import apart, quantize_block, side_by_side
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.recipe import InputMoments, Recipe
from tests.support.models import correlated_inputs, random_weights

pytestmark = pytest.mark.usefixtures("device")

SCHEME, AUTO = LayerScheme(group_size=16, bits=3), Regularizer()
RECIPE = Recipe(SolverSettings(), AUTO, torch.float16)
PLAIN = SolverSettings(scale_search="minmax", refine_passes=0)


def problems(count=4, rows=24, columns=64):
    """Groups of two layers with a Hessian each, of inputs more and more correlated."""
    groups = [
        {f"{i}.gate": random_weights(rows, columns, i), f"{i}.up": random_weights(rows, columns, i + 50)}
        for i in range(count)
    ]
    X = [correlated_inputs(300, columns, i).float() * (1 + i) for i in range(count)]
    return groups, torch.stack([x.T @ x / 300 for x in X])


def solve(groups, H, regularizer=AUTO, scheme=SCHEME, solver=RECIPE.solver):
    recipe = Recipe(solver, regularizer, torch.float16)
    return quantize_input_groups(groups, InputMoments(H), [100] * len(groups), scheme, recipe, widths=(2, 8))


@pytest.mark.parametrize(
    ("changes", "search"), [({}, "hessian"), ({"symmetric": False}, "mse"), ({"bits": 4, "group_size": -1}, "hessian")]
)
@pytest.mark.parametrize("regularizer", [Regularizer(), Regularizer(beta=1e-3, solver="pgd"), Regularizer(name="none")])
def test_each_group_gets_what_it_would_get_alone(changes, search, regularizer):
    groups, H = problems()
    settings = (regularizer, dataclasses.replace(SCHEME, **changes), SolverSettings(scale_search=search))
    layers, records = solve(groups, H, *settings)
    for i, group in enumerate(groups):
        alone, (record,) = solve([group], H[i : i + 1], *settings)
        for name in group:
            assert int(layers[name].Q.ne(alone[name].Q).sum()) <= 0.01 * alone[name].Q.numel()  # ties
        assert records[i].relative_error == pytest.approx(record.relative_error, rel=0.01)
        assert (records[i].name, records[i].beta, records[i].damping) == (record.name, record.beta, record.damping)
        assert records[i].width_errors == pytest.approx(record.width_errors, rel=0.02)


def test_each_group_has_a_beta_of_its_own():
    groups, H = problems()
    groups[1] = {name: torch.ones_like(W) for name, W in groups[1].items()}  # a grid holds them as they are
    _, records = solve(groups, H, solver=PLAIN)
    assert records[1].beta == records[1].beta_gain == 0
    assert all(record.beta > 0 < record.beta_gain for record in records if record is not records[1])


def test_damping_is_raised_where_it_must_be_alone():
    groups, H = problems(3)
    H[2].diagonal().add_(-0.5 * H[2].diagonal().mean())
    _, records = solve(groups, H, Regularizer(name="none"))
    assert [record.damping for record in records[:2]] == [0.01, 0.01]
    assert records[2].damping > 0.05
    assert [record.factorizations > 1 for record in records] == [False, False, True]


def test_group_without_statistics_is_rounded_to_nearest_among_others():
    groups, H = problems(3)
    H[1] = torch.eye(64)
    for regularizer in (AUTO, Regularizer(beta=1e-2)):
        recipe = Recipe(PLAIN, regularizer, torch.float16)
        inputs = InputMoments(H, lacks_statistics=[False, True, False])
        layers, records = quantize_input_groups(groups, inputs, [100, 0, 100], SCHEME, recipe)
        for name, W in groups[1].items():
            assert torch.equal(layers[name].Q, layers[name].grid.quantize(W))
        assert [record.beta > 0 for record in records] == [True, False, True]


def test_statistics_come_to_their_end_and_are_let_go():
    last = []

    def statistics():
        H = torch.eye(64)
        last.append(weakref.ref(H))
        yield InputStatistics(("a",), H, 1, 1, "none")

    known = statistics()
    quantize_block({"a": random_weights(8, 64)}, [["a"]], known, {"a": SCHEME}, RECIPE)
    assert last[0]() is None


def test_statistics_that_fail_do_so_without_any_group():
    def unreached():
        raise NumericalError("no token reached a")
        yield

    with pytest.raises(NumericalError, match="no token reached a"):
        quantize_block({}, [], unreached(), {}, RECIPE)
    with pytest.raises(AssertionError, match="belong to no group"):
        quantize_block({}, [], iter([InputStatistics(("a",), torch.eye(2), 1, 1, "none")]), {}, RECIPE)


def test_group_that_cannot_be_solved_is_named():
    groups, H = problems(3)
    H[1] = 0
    with pytest.raises(NumericalError, match=r"1\.gate\+1\.up: every calibration input of this layer is zero"):
        solve(groups, H)
    groups[2]["2.up"][3, 5] = 1e9
    with pytest.raises(NumericalError, match=r"2\.gate\+2\.up: a scale is not finite"):
        solve([groups[0], groups[2]], H[::2])


def test_batches_are_of_neighbours_of_one_shape_and_bounded():
    shapes = [("a", 64, 64), *[("e", 512, 256)] * 9, *[("e", 256, 512)] * 2, ("f", 256, 512), ("w", 4096, 4096)]
    assert batches(shapes, 1 << 20) == [
        range(1), range(1, 5), range(5, 10), range(10, 12), range(12, 13), range(13, 14),
    ]  # fmt: skip
    assert batches(shapes, 1 << 27)[1] == range(1, 10)
    assert batches([], 1 << 20) == []


def test_schemes_part_what_is_side_by_side():
    names = [[f"{i}.gate", f"{i}.up"] for i in range(4)]
    shapes = {name: (8, 16) for group in names for name in group}
    wide = dataclasses.replace(SCHEME, bits=8)
    schemes = {name: wide if name in ("2.gate", "2.up") or name.endswith("up") else SCHEME for name in shapes}
    assert side_by_side(names, shapes, schemes, 1 << 20) == [range(2), range(2, 3), range(3, 4)]
    assert apart(names[:2], schemes) == [(SCHEME, [["0.gate"], ["1.gate"]]), (wide, [["0.up"], ["1.up"]])]


def test_first_of_names_the_first():
    assert first_of(torch.tensor([False, True, True]), "abc") == "b"
    assert first_of(torch.tensor([False, False]), "ab") is None
    assert first_of(torch.tensor(True), ["a"]) == "a"
