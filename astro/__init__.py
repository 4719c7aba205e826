"""Arithmetic and files of one process: Hessians, Astro regularization, GPTQ, packing, checkpoints."""

import importlib.metadata
import tomllib
from pathlib import Path

__all__ = ["__version__"]


def _version() -> str:
    """The version that pyproject.toml names: of the clone that this is, else of the package that is installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        content = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if content.get("name") == "astro-dist":
            return str(content["version"])
    return importlib.metadata.version("astro-dist")


__version__ = _version()
