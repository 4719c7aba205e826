"""Imports go one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = {
    "errors": 0, "config": 1, "files": 1, "store": 1, "linear": 1, "tiling": 1, "triangle": 1, "fusion": 1, "batch": 2,
    "packing": 2, "checkpoint": 2, "parts": 3, "report": 2, "half": 1, "inverse": 3, "grid": 2, "hessian": 2,
    "experts": 2, "observation": 2, "expert_policy": 3, "statistics": 4, "skeleton": 3, "recording": 4, "regularizer":
    3, "gptq": 4, "refine": 4, "group": 5, "beta": 6, "layer": 7, "block": 8, "formats.servers": 2,
    "formats.compressed_tensors": 8, "formats.gptq": 8, "formats": 9,
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules("astro"), ids=str)
def test_astro_never_imports_ray_or_the_run(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"ray", "astro_dist", "huggingface_hub"}


@pytest.mark.parametrize("path", modules("astro_dist"), ids=str)
def test_only_the_executor_and_the_job_client_import_ray(path):
    assert path.name in ("ray_executor.py", "submit.py") or "ray" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    "path", [p for p in modules("astro") if p.parent.name != "astro" or p.stem != "__init__"], ids=str
)
def test_layers_of_astro(path):
    own = ".".join(path.relative_to(ROOT / "astro").with_suffix("").parts).removesuffix(".__init__")
    for name in imports(path):
        other = name.removeprefix("astro.")
        if name.startswith("astro.") and other in ORDER and other != own:
            assert ORDER[other] <= ORDER[own], f"{own} imports {other}"
