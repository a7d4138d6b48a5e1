"""Which way to per-example norms is cheapest: a cost model over shapes, and a guard over bytes.

The choice is a function of shapes, dtype and device type alone, never of a clock: two runs of one recipe
take the same path and so give the same bits. `python -m benchmarks.choices` measures the candidates and
reports where the model ranks them wrongly. The guard comes first: a way whose memory does not fit is not
considered.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsim.grads.bookkeeping import choose_gpu, gram
from fedsim.grads.bookkeeping.geometry import Geometry, Pair
from fedsim.grads.bookkeeping.tape import Tape

# Nanoseconds on one core of a server processor within whole steps, fitted with benchmarks.choices; only their
# ratios matter.
FLOP = 1 / 90  # a fused kernel or a large matrix product
ENTRY = 1.0  # measuring, keeping and contracting one entry of a per-example gradient
LINEAR_ENTRY = 1.5  # the same of a linear layer's gradient
CACHED = 2**19  # bytes of one example's gradient up to which these cost a third
GRAM_FLOP = 1 / 80  # small batched products
GRAM_ENTRY = 0.75  # one entry of a convolution's positions-by-positions matrix, for every pass over it
GRAM_CALLS = 5  # the calls it takes for all examples together
INNER_ENTRY = 4.0  # one entry of two such matrices that are formed, multiplied and added
READ_ENTRY = 0.5  # reading one entry of an input or output gradient again
PLACE_ENTRY = 3.0  # one entry of an output gradient, for the passes that standardisation needs
PATCH_ENTRY = 0.5  # gathering one entry of a patch, channels innermost
PATCH_RUN = 8.0  # beginning one run of entries that lie next to each other
SLICE_ENTRY = 0.5  # the same from slices of the image
SLICE_RUN = 6.0  # beginning one row of a slice
LAYOUT_ENTRY = 1.0  # bringing one entry of an image to the other layout
FAR = 256  # pixels of an image from which its channels lie so far apart that this costs more
LOOP_ENTRY = 1.8  # layout changes of torch's weight gradient, for every entry of the kernel and example
LOOP_CALL = 30_000.0  # one call of it
REORDER_ENTRY = 0.5  # the same, for every entry of the image and its output gradient
CALL = 20_000.0  # the calls around one batched product
LANES = 16  # float32 numbers a kernel works on at a time: fewer cost as much
ODD = 1.8  # a product whose width is no multiple of them


def linear(tape: Tape, positions: int, width_in: int, width_out: int, size: int) -> str:
    """Choose for a linear layer: "closed", "keep", "gram", or "drop" (form, take the norm, drop)."""
    if positions == 1:
        return "closed"
    if tape.gpu:
        return choose_gpu.linear(tape, positions, width_in, width_out)
    examples = tape.examples
    entries = width_in * width_out
    form = 2 * positions * entries * FLOP
    widths = width_in + width_out
    again = positions * widths * READ_ENTRY
    cost = {
        "keep": form + entries * LINEAR_ENTRY,
        "gram": form + again + 2 * positions**2 * (widths * GRAM_FLOP + INNER_ENTRY),
        "drop": 2 * form + 2 * entries * ENTRY,
    }
    allowed = {"drop"}
    if positions <= gram.MOST and positions**2 * 8 <= tape.scratch:
        allowed.add("gram")
    best = min(allowed, key=cost.__getitem__)
    if cost["keep"] < cost[best] and tape.reserve(
        examples * entries * size, examples * positions * width_out * size
    ):
        return "keep"
    return best


def convolution(
    tape: Tape,
    kernel: tuple[int, int, int, int],
    inputs: Tensor,
    geometry: Geometry,
    standardised: bool,
) -> tuple[str, bool]:
    """Choose for a convolution: the way ("loop", "grouped", "shifts", ...) and whether to keep G.

    Args:
        kernel: (out, in / groups, height, width).
        inputs: (B, images an example, channels, height, width).
    """
    if tape.gpu:
        return choose_gpu.convolution(tape, kernel, inputs, geometry, standardised)
    out, channels, _, width = kernel
    entries = math.prod(kernel)
    views, inputs = inputs.shape[1], inputs.flatten(0, 1)
    outputs = geometry.outputs((inputs.shape[2], inputs.shape[3]), (kernel[2], kernel[3]))
    places = views * outputs[0] * outputs[1]
    pixels = views * math.prod(inputs.shape[2:])
    size = inputs.element_size()
    native = 2 * places * entries * FLOP
    last = inputs.is_contiguous(memory_format=torch.channels_last) and not inputs.is_contiguous()
    image = views * math.prod(inputs.shape[1:])
    # Below this size torch takes its slow kernel for one image, which wants the other layout.
    call = 4 * LOOP_CALL if last and image <= 20480 else LOOP_CALL
    reorder = REORDER_ENTRY * (image + places * out)
    row = math.prod(kernel[1:])
    patch = places * row
    product = native * (ODD if row % LANES else 1.0) + CALL / 2
    cost = {
        "loop": native + call + LOOP_ENTRY * entries + reorder,
        "grouped": native * max(1.0, LANES / channels) + entries + 1.5 * reorder,
        "patches": 1.05 * product + (PATCH_ENTRY + PATCH_RUN / (channels * width)) * patch + entries / 4,
        "slices": product + (SLICE_ENTRY + SLICE_RUN / outputs[1]) * patch,
    }
    if channels > 32:
        cost["grouped"] = 1.05 * native + 1.6 * entries + (reorder if views > 1 else 0.0)
    if last:
        cost["grouped"] += 2 * LAYOUT_ENTRY * (image + places * out)
        cost["slices"] += LAYOUT_ENTRY * image
    else:
        cost["patches"] += LAYOUT_ENTRY * image * math.prod(inputs.shape[2:]) / FAR
    if geometry.groups > 1:
        del cost["patches"], cost["slices"]
    formed = min(cost, key=cost.__getitem__)
    entry = _entry(entries * size)
    cost["keep"] = cost[formed] + entries * entry
    cost["drop"] = 2 * cost[formed] + entries * entry
    best = "drop"
    if geometry.groups == 1 and places <= gram.MOST and (pixels**2 + 3 * places**2) * 4 <= tape.scratch:
        cost["gram"] = (
            native
            + 2 * (pixels**2 * channels + places**2 * out) * GRAM_FLOP
            + (_shifted(views, geometry, kernel, inputs, outputs) + pixels**2 + 3 * places**2) * GRAM_ENTRY
            + (places * out * PLACE_ENTRY if standardised else 0.0)
            + GRAM_CALLS * CALL / tape.examples
        )
        best = min(best, "gram", key=cost.__getitem__)
    kept, held = (tape.examples * count * size for count in (entries, places * out))
    if cost["keep"] < cost[best] and tape.reserve(kept, held):
        return formed, True
    return ("gram" if best == "gram" else formed), False


def _shifted(views: int, geometry: Geometry, kernel: tuple[int, ...], inputs: Tensor, outputs: Pair) -> int:
    """Entries of an image's Gram matrix to fetch for that of its patches, with those passed over."""
    total = views**2 * math.prod(geometry.stride)
    for axis in range(2):
        size, places = inputs.shape[2 + axis], outputs[axis]
        meetings = [geometry.meeting(axis, i, size, places)[0] for i in range(kernel[2 + axis])]
        total *= sum((own.stop - own.start) ** 2 for own in meetings)
    return total


def _entry(width: int) -> float:
    """Cost of one entry of a per-example gradient of `width` bytes."""
    return ENTRY / 3 if width <= CACHED else ENTRY
