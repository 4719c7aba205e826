"""A plan cuts a checkpoint into units that leave nothing out."""

import pytest

from astro_dist.planning.validate import prepare


@pytest.fixture
def prepared(run_config):
    return prepare(run_config())


def test_every_tensor_is_in_exactly_one_unit(prepared):
    units = (*prepared.plan.blocks, *prepared.plan.copies)
    keys = [key for unit in units for key in unit.keys]
    assert sorted(keys) == sorted(prepared.checkpoint.entries)


def test_bytes_of_the_units_add_up(prepared):
    stored = sum(entry.size_bytes for entry in prepared.checkpoint.entries.values())
    assert prepared.plan.read_bytes == stored
    assert 0 < prepared.plan.written_bytes < stored


def test_files_are_the_shards_in_order(prepared):
    plan = prepared.plan
    total = len(plan.copies) + len(plan.blocks)
    assert plan.files == [f"model-{index + 1:05d}-of-{total:05d}.safetensors" for index in range(total)]
    assert plan.files == [unit.file for unit in (*plan.copies, *plan.blocks)]
