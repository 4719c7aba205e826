"""What is no Python of the packages is installed with them."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATTERNS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]


@pytest.mark.parametrize("package", ["astro", "astro_dist"])
def test_every_file_beside_the_code_is_package_data(package):
    files = {path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    data = {path for path in files if path.suffix not in (".py", ".pyc") and path.name != "README.md"}
    assert data == {path for pattern in PATTERNS[package] for path in (ROOT / package).glob(pattern)}
