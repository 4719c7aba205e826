"""Where a model comes from: a local or shared folder, or a demo."""

from pathlib import Path

from astro_dist.demo import resolve_demo

__all__ = ["resolve_source"]


def resolve_source(source: str) -> Path:
    """Folder of the checkpoint that `model.source` names.

    Raises:
        ConfigError: a demo that does not exist.
    """
    return resolve_demo(source) if source.startswith("demo:") else Path(source).expanduser().absolute()
