"""Per-example gradients of a convolution as batched products with shifted rows: the way of GPUs.

Pixels are rows of channels, and the rows of an image, with its padding, lie one after the other; output
gradients lie at the same pitch, with zeros beside them. Then what one place (i, j) of the kernel multiplies
is a run of these rows, shifted by i * width + j: one batched product a place gives the gradients of all
examples, no patch is gathered, and nothing is copied but once. A stride sorts pixels by their phase, so that
each phase is an image of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping.geometry import Geometry, Pair
from fedsim.grads.bookkeeping.precision import added, batch_product, parts_for, product, widen


def pitch(outputs: Pair, kernel: Pair, geometry: Geometry) -> Pair:
    """Height and width at which images lie: the outputs, and what a kernel reaches beyond them."""
    height, width = (
        places + gap * (size - 1) // step
        for places, gap, size, step in zip(outputs, geometry.dilation, kernel, geometry.stride, strict=True)
    )
    return height, width


@dataclass(frozen=True)
class Rows:
    """Pixels and output gradients of n examples at one pitch.

    Attributes:
        pixels: (phases down, phases across, n, rows, in).
        places: output gradients, (n, rows, out), zero where there is no output.
        beyond: how many rows at the end of an example no run begins at: the largest shift.
    """

    pixels: Tensor
    places: Tensor
    beyond: int
    kernel: Pair
    geometry: Geometry
    width: int

    @classmethod
    def of(cls, inputs: Tensor, gradient: Tensor, count: int, kernel: Pair, geometry: Geometry) -> Rows:
        """Lay out inputs (n * views, in, height, width) and output gradients (n * views, out, ...)."""
        outputs = gradient.shape[2], gradient.shape[3]
        height, width = pitch(outputs, kernel, geometry)
        (down, across), (top, left) = geometry.stride, geometry.padding
        # A last part that no place of the kernel meets is cut off: its padding is negative.
        below, right = down * height - top - inputs.shape[2], across * width - left - inputs.shape[3]
        images = F.pad(inputs, (left, right, top, below))
        phases = images.unflatten(3, (width, across)).unflatten(2, (height, down))
        pixels = phases.permute(3, 5, 0, 2, 4, 1).reshape(down, across, count, -1, inputs.shape[1])
        beside = F.pad(gradient, (0, width - outputs[1], 0, height - outputs[0]))
        places = beside.permute(0, 2, 3, 1).reshape(count, -1, gradient.shape[1])
        beyond = (height - outputs[0]) * width + width - outputs[1]
        return cls(pixels, places, beyond, kernel, geometry, width)

    def runs(self) -> Iterator[tuple[int, int, Tensor, int]]:
        """For each place (i, j) of the kernel: i, j, the pixels (n, rows, in) it meets, and their shift."""
        (down, across), (row_gap, column_gap) = self.geometry.stride, self.geometry.dilation
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                row, column = i * row_gap, j * column_gap
                shift = row // down * self.width + column // across
                yield i, j, self.pixels[row % down, column % across], shift


def form(out: Tensor, inputs: Tensor, gradient: Tensor, geometry: Geometry) -> None:
    """Put the gradients of examples, each of one or more views, into `out`.

    Args:
        out: (n, out, height, width, in) in at least float32; `in` innermost in memory.
        inputs: (n * views, in, height, width).
        gradient: of the outputs, (n * views, out, ...).
    """
    rows = Rows.of(inputs, gradient, len(out), (out.shape[2], out.shape[3]), geometry)
    length = rows.places.shape[1] - rows.beyond
    places = rows.places[:, :length].transpose(1, 2)
    for i, j, pixels, shift in rows.runs():
        batch_product(places, pixels[:, shift : shift + length], out[:, :, i, j])


def weighted(inputs: Tensor, gradient: Tensor, factors: Tensor, kernel: Pair, geometry: Geometry) -> Tensor:
    """Sum of factor * gradient over examples, (out, height, width, in) in at least float32.

    Args:
        factors: (n,) in at least float32.
    """
    rows = Rows.of(inputs, gradient, len(factors), kernel, geometry)
    # Examples lie one after the other, too: a run that goes on into the next one meets zeros there.
    places = (widen(rows.places) * factors.view(-1, 1, 1)).flatten(0, 1)
    length = len(places) - rows.beyond
    parts = [part[:length].t() for part in parts_for(places, inputs.dtype)]
    total = factors.new_empty((places.shape[1], *kernel, inputs.shape[1]))
    for i, j, pixels, shift in rows.runs():
        run = pixels.flatten(0, 1)[shift : shift + length]
        total[:, i, j] = added(product(part, run) for part in parts)
    return total
