"""How checkpoint tensors become the parameters of a model, where transformers converts them while it loads.

Many tensors may become one parameter (experts one by one), one tensor may become several parameters (fused queries,
keys and values), and one may be turned. The conversions are those that transformers declares for the model's class.
Their patterns are regular expressions, in which `*.` stands for any text before a dot.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import torch
from transformers.core_model_loading import (
    Chunk,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    rename_source_key,
)

from astro.model.linear_layer import LinearLayer

__all__ = ["Conversions", "Targets"]


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the checkpoint tensors of a part of the model become.

    Attributes:
        plain: Checkpoint tensors by the model's name for what they hold, as they are, turned, or as some rows of them.
        converted: Checkpoint tensors that are converted in another way, by the model's name for what they become, and
            by expert and number of the layer in the parameter.
        turned: Checkpoint tensors whose last two dimensions are exchanged.
        first_rows: First row in the checkpoint tensor of each parameter that is made of some rows of it.
    """

    plain: Mapping[str, str]
    converted: Mapping[str, Mapping[tuple[int, int], str]]
    turned: frozenset[str]
    first_rows: Mapping[str, int]

    def as_stored(self, layer: LinearLayer) -> LinearLayer:
        """Return a layer that also knows how its weight lies in the checkpoint tensor.

        Args:
            layer: A layer as it lies in the model.
        """
        if layer.parameter in self.first_rows and layer.expert is None:
            stem = f"{layer.key.removesuffix('.weight').rpartition('.')[0]}.{layer.name.rpartition('.')[2]}"
            return dataclasses.replace(layer, stem=stem.lstrip("."), stored_first=self.first_rows[layer.parameter])
        return dataclasses.replace(layer, turned=True) if layer.key in self.turned else layer


class Conversions:
    """The renamings and conversions of a model's class."""

    def __init__(
        self,
        mapping: Sequence[WeightTransform],
        base_model_prefix: str,
        state: dict[str, torch.Tensor],
    ) -> None:
        """Take what transformers declares.

        Args:
            mapping: Renamings and conversions, as `get_model_conversion_mapping` returns them.
            base_model_prefix: Prefix that names in a checkpoint may lack, or have too much.
            state: The model's tensors by name, on the meta device.
        """
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix, self._state = base_model_prefix, state

    @property
    def mapping(self) -> list[WeightRenaming | WeightConverter]:
        """Renamings and then conversions, as transformers' loading takes them."""
        return [*self._renamings, *self._converters]

    def target_of(self, key: str) -> tuple[str, str | None]:
        """Return what the model calls a checkpoint tensor, and the pattern of its conversion; None without conversion.

        Where a tensor becomes several parameters, it is the first of them.

        Args:
            key: Name of the checkpoint tensor.
        """
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if name not in self._state and key in self._state:
            name, pattern = rename_source_key(key, [], [], self._prefix, self._state)
        return name, pattern

    def targets(self, keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Targets:
        """Return what some checkpoint tensors become.

        Args:
            keys: Names of the tensors.
            shapes: Sizes of the tensors by name, as far as they are known. Whether a tensor is turned may depend on
                them.
        """
        plain: dict[str, str] = {}
        converted: dict[str, dict[tuple[int, int], str]] = {}
        turned, first_rows = set[str](), dict[str, int]()
        for key in keys:
            target, pattern = self.target_of(key)
            converter = next((c for c in self._converters if pattern in c.source_patterns), None)
            if pattern is None or converter is None:
                plain[target] = key
                continue
            names, operations = _names(target, converter), converter.operations
            transposes = [operation for operation in operations if isinstance(operation, Transpose)]
            if len(transposes) == len(operations) and len(names) == 1:
                plain[target] = key
                if _turns(transposes, shapes.get(key), self._shape(target)):
                    turned.add(key)
            elif len(names) > 1 and all(isinstance(o, Chunk | Split) and o.dim == 0 for o in operations):
                row = 0
                for name in names:
                    plain[name], first_rows[name] = key, row
                    row += (self._shape(name) or (0,))[0]
            else:
                place = self._place(key, pattern, converter)
                for name in names:
                    converted.setdefault(name, {})[place] = key
        return Targets(plain, converted, frozenset(turned), first_rows)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._state[name].shape) if name in self._state else None

    def _place(self, key: str, pattern: str, converter: WeightConverter) -> tuple[int, int]:
        """Return which expert, and which layer in a parameter, a converted tensor is, where many become a parameter."""
        match = re.search(re.sub(r"(\\?\.)\*\\?\.", r"\\.(\\d+)\\.", pattern), apply_renamings(key, self._renamings))
        expert = int(match.group(1)) if match and match.groups() else 0
        return expert, converter.source_patterns.index(pattern)


def _names(target: str, converter: WeightConverter) -> list[str]:
    """Return the model's names of all that a conversion makes, of which `target` is the first."""
    first, *others = converter.target_patterns
    before, _, after = target.rpartition(first)
    return [target, *(f"{before}{other}{after}" for other in others)] if first in target else [target]


def _turns(operations: Sequence[Transpose], stored: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> bool:
    """Tell whether transposing ends with the last two dimensions exchanged."""
    # Some files hold either layout. Then transformers turns those whose sizes are not the model's.
    applied = [o for o in operations if not (o.check_dims and (stored is None or stored == wanted))]
    return math.prod([-1] * len(applied)) < 0
