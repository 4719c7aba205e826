"""What a training says of itself: events in its journal, which worker 0 writes and the driver reads as they come.

The kinds are `compiling`, `not_compiled`, `begun`, `step`, `checkpoint` and `failed`. Events of a run are classes,
because much is made of them; these are shown, line by line, and forgotten.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from astro_dist.console import in_words
from astro_dist.wording import counted

__all__ = ["EventReader", "in_line"]


class EventReader:
    """Reads the events that were added since it looked last."""

    def __init__(self, path: Path) -> None:
        """Begin behind what is there already.

        Args:
            path: Path of the file.
        """
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0

    def new_events(self) -> Iterator[dict[str, Any]]:
        """Yield the new events; a line that is still being written comes next time, one that was cut short never."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:  # the worker was killed while it wrote
                    continue
                yield event


def in_line(event: Mapping[str, Any]) -> str | None:
    """Say an event in one line; None for those that nobody needs to see.

    Args:
        event: Event of the file.
    """
    kind = event["event"]
    if kind == "compiling":
        return "compiling the regularization, which takes up to a minute"
    if kind == "not_compiled":
        return f"the regularization runs without a compiler, which is slower: {event['reason']}"
    if kind == "begun":
        begin = f"going on behind step {event['step']:,}" if event["step"] else "training begins"
        parts = [begin, f"{event['parameters'] / 1e6:,.1f}M parameters", counted(event["workers"], "worker")]
        if event["layers"]:
            how = "compiled" if event["is_compiled"] else "not compiled"
            parts.append(f"{counted(event['layers'], 'layer')} regularized ({how})")
        if event["left_out"]:
            parts.append(f"but not {counted(len(event['left_out']), 'set')} of experts ({event['left_out'][0]}, ...)")
        return f"{', '.join(parts)}, {event['precision']} on {event['device']}"
    if kind == "step":
        extra = f" + {event['penalty']:.4f} for kurtosis" if event["penalty"] else ""
        return (
            f"step {event['step']:,} of {event['steps']:,}: loss {event['loss']:.4f}{extra}, rate {event['rate']:.2e}, "
            f"{event['tokens_per_s']:,.0f} tokens/s, about {in_words(event['left_s'])} left"
        )
    if kind == "checkpoint":
        return f"checkpoint behind step {event['step']:,}"
    return None
