"""One bound a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.clipping import CLIPPING
from fedsim.clipping.by_group import ClipByGroup


@CLIPPING.register("per_layer")
@dataclass(frozen=True)
class PerLayerClip(ClipByGroup):
    """Clip each layer's gradient to C / sqrt(number of layers) (McMahan et al. 2018, section 2, per-layer).

    A layer is the parameters that one module owns itself: weight and bias together, and the gain of a
    weight-standardised convolution with them. A tied parameter belongs to the module that names it first.
    """

    def group_of(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return for each parameter which of the modules, in order, owns it."""
        modules = [name.rpartition(".")[0] for name in names]
        order = {module: place for place, module in enumerate(dict.fromkeys(modules))}
        return tuple(order[module] for module in modules)

    def bounds(self, count: int) -> tuple[float, ...]:
        """C / sqrt(count) for each."""
        return (self.clip_norm / math.sqrt(count),) * count
