"""Whether a run was calibrated on the very text that its result is judged by."""

import shlex
from pathlib import Path, PurePath

from astro_dist.config.schema import RunConfig, TextSource
from astro_dist.config.text_place import is_file
from astro_dist.config.yaml_file import load_recorded_config
from astro_dist.run_directory.layout import RunLayout

__all__ = ["calibration_note"]


def calibration_note(name: str, text: TextSource) -> str | None:
    """Say that a text flatters a model, because the run that made the model was calibrated on it.

    Args:
        name: Name of the model; only the result of a run on this machine tells what it was calibrated on.
        text: Text that the model is judged by.

    Returns:
        A sentence for the user; None where the run was calibrated on other texts, or where there is no run.

    Raises:
        ConfigError: The recorded configuration of the run cannot be read.
    """
    layout = RunLayout.around(Path(name).expanduser().resolve())
    if not (layout.identity.is_file() and layout.config.is_file()):
        return None
    config = load_recorded_config(layout.config)
    texts = config.calibration.texts
    if any(_is_same(text, calibrated) for calibrated in texts):
        return f"the run was calibrated on this text, so this flatters it; {_fairer_figure(config, layout.root)}"
    if any(_may_be_same(text, calibrated) for calibrated in texts):
        return (
            f"the run was calibrated on a file of this name, {PurePath(text.source).name}; if it is this text, this "
            f"flatters it; {_fairer_figure(config, layout.root)}"
        )
    return None


def _fairer_figure(config: RunConfig, root: Path) -> str:
    if config.calibration.holdout_samples == 0:
        return "it held nothing out (calibration.holdout_samples: 0), so take another text"
    return f"its hold-out figure is what `astro-dist status {shlex.quote(str(root))}` shows"


def _is_same(text: TextSource, other: TextSource) -> bool:
    """Tell whether two texts are one file, or one split of a dataset; a subset that is not named may be any."""
    if is_file(text.source) or is_file(other.source):
        recorded = Path(other.source).expanduser()
        # Nobody knows from which folder a relative path was meant.
        return recorded.is_absolute() and recorded.resolve() == Path(text.source).expanduser().resolve()
    subsets = {text.subset, other.subset} - {None}
    return (text.source, text.split) == (other.source, other.split) and len(subsets) <= 1


def _may_be_same(text: TextSource, calibrated: TextSource) -> bool:
    """Tell whether a run may have read a text, because it read a file of that name by a path from an unknown folder."""
    path = Path(calibrated.source).expanduser()
    return is_file(calibrated.source) and not path.is_absolute() and path.name == PurePath(text.source).name
