"""What the bench of launches says of the compiler."""

import importlib.util
import sys

import pytest

from tests.bench import launches

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not there")
def test_kernels_that_were_compiled_before_take_less_time():
    found = launches.compile_times(rounds=1)
    assert 0 < found["warm"][0] < found["cold"][0]


@pytest.mark.skipif(HAS_TRITON, reason="Triton is there")
def test_without_triton_nothing_is_compiled_and_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launches.py", "--compile"])
    with pytest.raises(SystemExit):
        launches.main()
    assert "--compile: Triton is not here; pip install triton" in capsys.readouterr().err
