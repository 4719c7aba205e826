"""A thousand damaged indexes, headers and configurations: each is a clear error or is read as what it says."""

import json
import struct

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astro.errors import CheckpointError, ConfigError
from astro.storage.atomic import save_tensors, write_json
from astro.storage.checkpoint import INDEX_NAME, Checkpoint
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_config

FUZZ = settings(
    max_examples=350, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int32), "c": torch.ones(5).bfloat16()}
FILES = {"one.safetensors": "ab", "two.safetensors": "c"}

numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, 8, 24, 40, 2**31, 2**63, -1]))
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "../x.safetensors",
            "/etc/passwd",
            "one.safetensors/..",
            "a\\b.safetensors",
            "",
            ".",
            "F32",
            "NaN",
            "auto",
            "~",
        ]
    ),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def paths(content, prefix=()):
    """Every place in nested dictionaries and lists."""
    yield prefix
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*prefix, key))


@st.composite
def damaged(draw, content):
    """JSON content with something else, nothing, or something more at one place."""
    content = json.loads(json.dumps(content))
    path = draw(st.sampled_from(list(paths(content))))
    if not path:
        return draw(values)
    *way, last = path
    inner = content
    for key in way:
        inner = inner[key]
    action = draw(st.sampled_from(["replace", "drop", "add"]))
    if action == "replace":
        inner[last] = draw(values)
    elif action == "drop":
        del inner[last]
    elif isinstance(inner, dict):
        inner[draw(texts)] = draw(values)
    else:
        inner.append(draw(values))
    return content


@pytest.fixture
def folder(tmp_path):
    for file, names in FILES.items():
        save_tensors(tmp_path / file, {name: TENSORS[name] for name in names})
    weight_map = {name: file for file, names in FILES.items() for name in names}
    write_json(tmp_path / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    return tmp_path


def opens_or_explains(folder, changed):
    """Read everything, or the reason; every other file of the folder is as it was."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    reason, tensors = "", {}
    try:
        checkpoint = Checkpoint.open(folder)
        tensors = checkpoint.read(checkpoint.entries)
    except CheckpointError as error:
        reason = str(error)
    assert not reason or (changed in reason and "\n" not in reason)
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == checkpoint.entries[name].shape
        assert folder / checkpoint.entries[name].file in before
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@FUZZ
@given(data=st.data())
def test_damaged_index(folder, data):
    path = folder / INDEX_NAME
    whole = path.read_bytes()
    try:
        path.write_text(json.dumps(data.draw(damaged(json.loads(whole)))), encoding="utf-8", errors="surrogatepass")
        opens_or_explains(folder, str(folder))
    finally:
        path.write_bytes(whole)


@FUZZ
@given(data=st.data())
def test_damaged_header(folder, data):
    path = folder / "one.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    kind = data.draw(st.sampled_from(["json", "bytes", "length", "cut", "longer"]))
    if kind == "json":
        header = json.dumps(data.draw(damaged(json.loads(whole[8 : 8 + length])))).encode("utf-8", "surrogatepass")
        content = struct.pack("<Q", len(header)) + header + whole[8 + length :]
    elif kind == "bytes":
        place = data.draw(st.integers(0, 8 + length - 1))
        content = whole[:place] + data.draw(st.binary(min_size=1, max_size=3)) + whole[place + 1 :]
    elif kind == "length":
        content = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + whole[8:]
    elif kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        content = whole + data.draw(st.binary(min_size=1, max_size=9))
    try:
        path.write_bytes(content)
        opens_or_explains(folder, path.name)
    finally:
        path.write_bytes(whole)


@FUZZ
@given(data=st.data())
def test_damaged_configuration(tmp_path, data):
    whole = RunConfig.model_validate({"model": {"source": "m"}, "output": {"dir": "r"}}).plain()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data.draw(damaged(whole))), encoding="utf-8", errors="surrogatepass")
    reason, config = "", None
    try:
        config = load_config(path)
    except ConfigError as error:
        reason = str(error)
    if config is None:
        assert str(path) in reason
    else:
        assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config
