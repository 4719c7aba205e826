"""The commands that go on with a trained model. They are tried on it, so that they are taken as they are printed."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from astro.errors import InputError
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
    commands, notes = [f"astro-dist inspect {place}{trust}"], []
    for what, keys in [*([("the learned clips", clips)] if clips else []), ("the model", ())]:
        refusal = _refusal(model, (*trusted, *keys))
        if refusal is None:
            options = "".join(f" --set {key}" for key in (*trusted, *keys))
            commands.append(f"astro-dist quantize {place}{options}")
            break
        loses = "; the model was trained for them and is much worse without" if keys else ""
        notes.append(f"`quantize` does not take {what}: {refusal}{loses}")
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
    except InputError as error:
        return str(error)
    return None
