"""Every architecture goes through a whole run, and transformers reads what it wrote."""

import pytest

from tests.support.architectures import DENSE, EXPERTS, UNREADABLE, examine


@pytest.mark.slow
@pytest.mark.parametrize("name", {**DENSE, **EXPERTS})
def test_result_is_what_transformers_makes_of_it(name, tmp_path):
    found = examine(name, tmp_path)
    assert found.streamed == 0
    assert found.layers
    assert found.reloaded == (name not in UNREADABLE)
    if found.reloaded:
        assert found.difference < 1e-5
