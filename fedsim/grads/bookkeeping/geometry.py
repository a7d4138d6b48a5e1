"""Where a convolution's kernel meets its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Stride, zero padding and dilation along (height, width), and groups."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def padded(self, size: Pair) -> Pair:
        """Height and width of an input of this `size` with its padding."""
        return size[0] + 2 * self.padding[0], size[1] + 2 * self.padding[1]

    def pad(self, inputs: Tensor) -> Tensor:
        """Inputs (n, channels, height, width) with their padding, in the layout they have."""
        rows, columns = self.padding
        return F.pad(inputs, (columns, columns, rows, rows)) if rows or columns else inputs

    def outputs(self, size: Pair, kernel: Pair) -> Pair:
        """Height and width of the output for an input of this `size`."""
        height, width = (
            (whole - gap * (own - 1) - 1) // step + 1
            for whole, own, gap, step in zip(
                self.padded(size), kernel, self.dilation, self.stride, strict=True
            )
        )
        return height, width

    def meeting(self, axis: int, offset: int, size: int, outputs: int) -> tuple[slice, slice]:
        """Which of `outputs` places have place `offset` of the kernel on one of `size` pixels, and on which.

        With the others it meets padding.
        """
        step, shift = self.stride[axis], offset * self.dilation[axis] - self.padding[axis]
        first = max(0, -(shift // step))
        end = max(first, min(outputs, (size - 1 - shift) // step + 1))
        start = first * step + shift
        return slice(first, end), slice(start, start + (end - first) * step, step)

    def backward(
        self, gradient: Tensor, inputs: Tensor, weight: Tensor, mask: tuple[bool, bool, bool], groups: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`aten::convolution_backward` with this geometry, or with other `groups`."""
        return torch.ops.aten.convolution_backward(
            gradient, inputs, weight, None, self.stride, self.padding, self.dilation, False, (0, 0),
            groups or self.groups, mask,
        )  # fmt: skip
