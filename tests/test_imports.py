"""Imports go one way, and what is slow to load is loaded only where it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDERS = {
    "astro": (
        "errors timing process < config activation_config training_config linalg storage < model"
        " < activation_regularization < calibration < quantization < formats"
    ),
    "astro_dist": (
        "console wording < config < schedule < source < planning < run_directory < worker export < evaluation publish"
        " < report < execution < training pipeline < commands < cli < __main__ __init__"
    ),
}
"""Each room may import the rooms that stand left of the sign `<` before it, and itself."""

RAY_DOORS = ("execution/ray_executor.py", "execution/ray_job.py", "training/ray_training.py")
"""Modules that import ray: actors, jobs, and Ray Train, which brings workers and checkpoints of its own."""


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    """The folder, or the module, right below the package."""
    return path.relative_to(ROOT).with_suffix("").parts[1]


@pytest.mark.parametrize("path", [p for package in ORDERS for p in modules(package)], ids=str)
def test_rooms_import_only_rooms_before_them(path):
    package, own = path.relative_to(ROOT).parts[0], room_of(path)
    floors = [floor.split() for floor in ORDERS[package].split("<")]
    number = next((i for i, floor in enumerate(floors) if own in floor), 0)
    allowed = {name for floor in floors[:number] for name in floor} | {own, "__version__"}
    assert {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")} <= allowed


def test_every_room_has_its_place():
    for package, order in ORDERS.items():
        rooms = {room_of(path) for path in modules(package)} - {"__init__"}
        assert rooms == set(order.replace("<", " ").split()) - {"__init__"}


@pytest.mark.parametrize("path", modules("astro"), ids=str)
def test_astro_imports_neither_the_cluster_nor_the_hub(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"ray", "astro_dist", "huggingface_hub"}


@pytest.mark.parametrize("path", modules("astro_dist"), ids=str)
def test_ray_and_the_hub_have_their_doors(path):
    libraries = {name.split(".")[0] for name in imported(path)}
    name = str(path.relative_to(ROOT / "astro_dist"))
    assert "ray" not in libraries or name in RAY_DOORS
    assert "huggingface_hub" not in libraries or name.startswith(("source/hub_", "export/", "publish/"))


def loaded_with(module):
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(result.stdout.split())


def test_schedules_load_no_torch():
    assert "torch" not in loaded_with("astro_dist.schedule.factory")


def test_formats_do_not_load_the_solver():
    assert not {"astro.quantization.gptq", "astro.quantization.row_solver"} & loaded_with("astro.formats")
