"""The commands that go on with a trained model. They are tried on it, so that they are taken as they are printed."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from astro.errors import AstroError
from astro_dist.config.yaml_file import make_config
from astro_dist.planning.validate import prepare

__all__ = ["NextCommands", "next_commands"]


@dataclasses.dataclass(frozen=True)
class NextCommands:
    """How to go on with a trained model.

    Attributes:
        commands: The commands, quoted for a shell.
        notes: Sentences on what `quantize` refuses of this model.
    """

    commands: tuple[str, ...]
    notes: tuple[str, ...]


def next_commands(model: Path, input_bits: int | None, trust_remote_code: bool) -> NextCommands:
    """Find the commands that a trained model can be given to.

    Args:
        model: Folder of the model.
        input_bits: Width to which inputs were rounded between learned clips; None where they were not.
        trust_remote_code: Whether code that the model ships may run.
    """
    place = shlex.quote(str(model))
    trust = " --trust-remote-code" if trust_remote_code else ""
    trusted = ("model.trust_remote_code=true",) if trust_remote_code else ()
    clips = (f"activations.bits={input_bits}", "activations.clips=from-checkpoint") if input_bits else ()
    commands, refusals = [f"astro-dist inspect {place}{trust}"], []
    for keys in dict.fromkeys((clips, ())):
        refusal = _refusal(model, (*trusted, *keys))
        if refusal is None:
            options = "".join(f" --set {key}" for key in (*trusted, *keys))
            commands.append(f"astro-dist quantize {place}{options}")
            break
        refusals.append(refusal)
    notes = []
    if len(commands) == 1:  # whatever is wrong with the clips besides
        notes.append(f"`quantize` does not take the model: {refusals[-1]}")
    elif refusals:
        notes.append(
            f"`quantize` does not take the learned clips: {refusals[0]}; the model was trained for them and is much "
            "worse without"
        )
    return NextCommands(tuple(commands), tuple(notes))


def _refusal(model: Path, assignments: Sequence[str]) -> str | None:
    """Say why `quantize` would refuse a model with some keys; None where it takes it."""
    # The command finds a group size that fits; here all layers that it does not fit get a scale a row.
    content = {
        "model": {"source": str(model)},
        "quantization": {"indivisible": "per-channel"},
        "output": {"dir": str(model.parent)},
    }
    try:
        prepare(make_config(content, assignments, str(model)))
    except AstroError as error:  # also that a disk is full: the training is done, and its model is there
        return str(error)
    return None
