"""The curve of the hidden states has gaps where nothing was measured."""

from astro_dist.report.hidden_curve import hidden_curves


def test_curve_has_gaps():
    curves = hidden_curves({0: (0.02, None, 0.04, 0.08)})
    (curve,) = curves.curves
    assert [[round(point.y, 3) for point in piece] for piece in curve.pieces] == [[0.8], [0.6, 0.2]]
    assert [point.x for piece in curve.pieces for point in piece] == [0.125, 0.625, 0.875]
    assert (curves.top, curves.half, curves.end) == ("10 %", "5 %", "8.0 %")


def test_the_last_round_is_marked():
    curves = hidden_curves({0: (0.2, 0.3), 1: (0.1, 0.1)})
    assert [curve.is_last for curve in curves.curves] == [False, True]
    assert curves.curves[1].pieces[0][0].title == "round 1, behind block 0: 10.0 %"


def test_errors_that_are_no_numbers_are_left_out():
    assert hidden_curves({0: (float("nan"), None)}) is None
    assert hidden_curves({}) is None
    assert len(hidden_curves({0: (9.0, float("inf"))}).curves[0].pieces) == 1
