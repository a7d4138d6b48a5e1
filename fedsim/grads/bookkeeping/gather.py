"""Per-example gradients of a convolution as matrix products with gathered patches.

Patches are views of the padded input, with overlaps, until they are copied for a product. The copies of few
examples exist at a time, in memory that the next ones take over, so a core finds them in its cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsim.grads import gpu
from fedsim.grads.bookkeeping.geometry import Geometry, Pair
from fedsim.grads.bookkeeping.precision import affine, for_onednn

_CACHE = 2**21  # bytes of copies at a time on a CPU: about what one core's cache holds


def form(
    out: Tensor,
    inputs: Tensor,
    gradient: Tensor,
    geometry: Geometry,
    kernel: Pair,
    channels_inside: bool,
    scratch: int,
) -> None:
    """Put the gradients of examples, each of one or more views, into `out`.

    Args:
        out: (n, out, entries); its last two axes may lie in memory in either order.
        inputs: (n * views, in, height, width).
        gradient: of the outputs, (n * views, out, ...).
        kernel: height and width; the entries of a gradient are in * height * width.
        channels_inside: whether `entries` are ordered (height, width, in), so that runs of channels are
            copied, and not (in, height, width), of which runs of pixels are.
        scratch: bytes the copies may take.
    """
    count = out.shape[0]
    patches = (_pixels_first if channels_inside else _channels_first)(inputs, geometry, kernel, gradient)
    patches = patches.unflatten(0, (count, -1))
    contiguous = gradient.is_contiguous()
    if channels_inside:
        patches = patches.unsqueeze(1)
    elif not contiguous:
        patches = patches.movedim(1, 4).unsqueeze(1)
    # Places of all views are one axis; or each view is a part, where that spares a copy of the gradient.
    parts = patches.shape[1]
    if contiguous and count * parts == len(gradient):
        places = gradient.reshape(count, parts, out.shape[1], -1)
    else:
        places = gradient.permute(0, 2, 3, 1).reshape(count, parts, -1, out.shape[1]).transpose(2, 3)
    limit = scratch if gpu.on(inputs) else min(scratch, _CACHE)
    step = max(1, limit // (patches.element_size() * math.prod(patches.shape[1:])))
    copies = patches.new_empty((min(step, count), *patches.shape[1:]))
    if channels_inside:
        factors = copies.view(len(copies), parts, -1, out.shape[2])
    else:
        factors = copies.view(len(copies), parts, out.shape[2], -1).transpose(2, 3)
    turned = out.stride(2) != 1
    if turned:
        out, places, factors = out.transpose(1, 2), places.transpose(2, 3), factors.transpose(2, 3)

    def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.unbind() if step == 1 else tensor.split(step)

    if step == 1:
        copies, factors = copies[0], factors[0]
    by_part = factors.unbind(-3)
    every = zip(pieces(patches), pieces(out), *map(pieces, places.unbind(1)), strict=True)
    for own, target, *own_places in every:
        if len(own) < len(copies):  # the last ones
            copies, by_part = copies[: len(own)], [part[: len(own)] for part in by_part]
        copies.copy_(own)
        for part, pair in enumerate(zip(own_places, by_part, strict=True)):
            left, right = reversed(pair) if turned else pair
            _product(target, left, right, int(part > 0))


def _product(out: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """Put beta * out + left @ right into `out`, of matrices or batches of them."""
    if out.dim() == 3:
        torch.baddbmm(out, left, right, beta=beta, out=out)
    elif beta or not for_onednn(left, right.t()):
        torch.addmm(out, left, right, beta=beta, out=out)
    else:
        out.copy_(affine(left, right.t()))


def _channels_first(inputs: Tensor, geometry: Geometry, kernel: Pair, gradient: Tensor) -> Tensor:
    """Patches (n, channels, kernel height, kernel width, height, width) as a view of padded planes."""
    planes = geometry.pad(inputs.contiguous())
    image, channel, row, column = planes.stride()
    (down, across), (row_gap, column_gap) = geometry.stride, geometry.dilation
    return planes.as_strided(
        (*inputs.shape[:2], *kernel, *gradient.shape[2:]),
        (image, channel, row_gap * row, column_gap * column, down * row, across * column),
        planes.storage_offset(),
    )


def _pixels_first(inputs: Tensor, geometry: Geometry, kernel: Pair, gradient: Tensor) -> Tensor:
    """Patches (n, height, width, kernel height, kernel width, channels) as a view of padded pixels."""
    pixels = geometry.pad(inputs.contiguous(memory_format=torch.channels_last))
    pixels = pixels.permute(0, 2, 3, 1).contiguous()
    image, row, column, channel = pixels.stride()
    (down, across), (row_gap, column_gap) = geometry.stride, geometry.dilation
    return pixels.as_strided(
        (inputs.shape[0], *gradient.shape[2:], *kernel, inputs.shape[1]),
        (image, down * row, across * column, row_gap * row, column_gap * column, channel),
        pixels.storage_offset(),
    )
