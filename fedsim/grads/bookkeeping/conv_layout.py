"""How the formed gradients of a convolution lie in memory, and in what pieces they are formed.

A formed G is a row an example, its entries by (out, in, height, width), or by (out, height, width, in) where
the way puts channels innermost; some are formed as their transpose. How many examples are worked on at a time
follows from the memory that the way takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedsim.grads import gpu
from fedsim.grads.bookkeeping import choose, shifts
from fedsim.grads.bookkeeping.geometry import Geometry, Pair
from fedsim.grads.bookkeeping.tape import Tape

_GROUPS = 4096  # of one convolution on a GPU
_CACHE = 2**22  # bytes to work on at a time on a CPU, where nothing has to stay


@dataclass(frozen=True)
class Layout:
    """Of one kernel's gradients.

    Attributes:
        plan, keep: the way, and whether G stays, of `choose.convolution`.
        shape: of the kernel, (out, in / groups, height, width).
        views: images an example.
        geometry: of the convolution.
    """

    plan: str
    keep: bool
    shape: tuple[int, int, int, int]
    views: int
    geometry: Geometry

    @property
    def by_patches(self) -> bool:
        """Return whether the way puts channels innermost."""
        return self.plan in ("patches", "shifts")

    @property
    def gathers(self) -> bool:
        """Return whether G comes from gathered patches or slices (`gather`)."""
        return self.plan in ("patches", "slices")

    @property
    def _turned(self) -> bool:
        """Whether G is formed as its transpose: products whose width is no multiple of lanes are slow."""
        entries = math.prod(self.shape[1:])
        return self.gathers and entries % choose.LANES > 0 and self.shape[0] % choose.LANES == 0

    def by_row(self, formed: Tensor) -> Tensor:
        """View formed gradients (n, out * entries) as (n, out, entries), entries in the order of the plan."""
        if self._turned:
            return formed.unflatten(1, (-1, self.shape[0])).transpose(1, 2)
        return formed.unflatten(1, (self.shape[0], -1))

    def ordered(self, formed: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Bring formed gradients (n, out * entries) to the shape of the kernel, (n, out, in, ...)."""
        by_row = self.by_row(formed)
        if self.by_patches:
            _, channels, height, width = self.shape
            by_row = by_row.unflatten(2, (height, width, channels)).permute(0, 1, 4, 2, 3)
        return by_row.reshape(formed.shape[0], *kernel)

    def ranges(self, tape: Tape, inputs: Tensor, gradient: Tensor) -> list[Pair]:
        """First example and the end of each piece to work on: the same for norms and sums.

        Args:
            inputs, gradient: all examples', as of `ConvUse.fill`.
        """
        count = tape.examples
        pieces = -(-count // self._step(tape, inputs, gradient))
        step = -(-count // pieces)
        return [(low, min(low + step, count)) for low in range(0, count, step)]

    def _step(self, tape: Tape, inputs: Tensor, gradient: Tensor) -> int:
        """Examples to work on at a time."""
        size = max(4, inputs.element_size())  # half precision is widened
        scratch, entries = tape.scratch, math.prod(self.shape)
        if self.plan == "gram":
            return max(1, scratch // self._gram_bytes(inputs, gradient))
        if self.plan == "shifts":
            rows = self.row_bytes(inputs, gradient)
            return max(1, scratch // (rows + (0 if self.keep else size * entries)))
        cached = scratch if gpu.on(inputs) else min(scratch, _CACHE)
        if self.gathers:
            images = self.shape[1] * math.prod(self.geometry.padded((inputs.shape[2], inputs.shape[3])))
            images += math.prod(gradient.shape[1:])  # it may have to be copied too
            return max(1, (scratch if self.keep else cached) // (size * (entries + self.views * images)))
        if tape.gpu:  # of many groups, and so of inputs and output gradients laid out anew
            images = self.views * sum(math.prod(t.shape[1:]) for t in (inputs, gradient))
            groups = _GROUPS // self.geometry.groups
            return max(1, min(groups, scratch // (size * (entries + images))))
        return max(1, cached // (size * entries))

    def row_bytes(self, inputs: Tensor, gradient: Tensor) -> int:
        """Bytes of `shifts.Rows` of one example."""
        outputs = gradient.shape[2], gradient.shape[3]
        rows = math.prod(shifts.pitch(outputs, self.shape[2:], self.geometry))
        widths = self.shape[1] * math.prod(self.geometry.stride) + self.shape[0]
        return self.views * rows * widths * inputs.element_size()

    def _gram_bytes(self, inputs: Tensor, gradient: Tensor) -> int:
        pixels, places = (self.views * math.prod(t.shape[2:]) for t in (inputs, gradient))
        return 4 * (pixels**2 + 3 * places**2)
