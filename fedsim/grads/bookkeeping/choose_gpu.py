"""The cost model of `choose` for GPUs: bytes moved, multiplications, and launches.

In nanoseconds, by figures of data centre GPUs of about 2022 as their makers state them, at half to three
quarters of the peak; not measured here. As on the CPU only ratios matter, and the choice is a function of
shapes and dtype alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsim.grads.bookkeeping import gram, shifts
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.bookkeeping.tape import Tape

FLOP = 1 / 40_000  # of float32
HALF_FLOP = 1 / 400_000  # of bfloat16, into float32
BYTE = 1 / 2_000
LAUNCH = 5_000.0
WIDE = 4  # bytes of an entry of a formed gradient or Gram matrix
PARTS = 3  # products of bfloat16 that make one of float32 and bfloat16


def _flop(size: int) -> float:
    return HALF_FLOP if size == 2 else FLOP


def linear(tape: Tape, positions: int, width_in: int, width_out: int) -> str:
    """See `choose.linear`, of several positions."""
    size = 2 if torch.is_autocast_enabled(tape.anchor.device.type) else tape.anchor.element_size()
    entries, widths = width_in * width_out, width_in + width_out
    rows = positions * widths * size * BYTE
    form = max(2 * positions * entries * _flop(size), rows) + entries * WIDE * BYTE
    again = max(2 * positions * entries * _flop(size), rows) * (PARTS if size == 2 else 1)
    passes = gram.passes(width_in) + gram.passes(width_out) + 6
    cost = {
        "keep": form + 2 * entries * WIDE * BYTE,
        "drop": 2 * (form + entries * WIDE * BYTE),
        "gram": 2 * positions**2 * widths * _flop(size) + rows + passes * positions**2 * WIDE * BYTE + again,
    }
    possible = positions <= gram.MOST and positions**2 * 2 * WIDE <= tape.scratch
    allowed = {"drop", "gram"} if possible else {"drop"}
    best = min(allowed, key=cost.__getitem__)
    kept, held = (tape.examples * count for count in (entries * WIDE, positions * width_out * size))
    if cost["keep"] < cost[best] and tape.reserve(kept, held):
        return "keep"
    return best


def convolution(
    tape: Tape,
    kernel: tuple[int, int, int, int],
    inputs: Tensor,
    geometry: Geometry,
    standardised: bool,
) -> tuple[str, bool]:
    """See `choose.convolution`."""
    out, channels = kernel[:2]
    entries, area = math.prod(kernel), math.prod(kernel[2:])
    views, images = inputs.shape[1], inputs.flatten(0, 1)
    size = inputs.element_size()
    outputs = geometry.outputs((images.shape[2], images.shape[3]), (kernel[2], kernel[3]))
    places, pixels = views * math.prod(outputs), views * math.prod(images.shape[2:])
    kept, held = tape.examples * entries * WIDE, tape.examples * places * out * size
    if geometry.groups > 1:
        return "grouped", tape.reserve(kept, held)
    rows = views * math.prod(shifts.pitch(outputs, (kernel[2], kernel[3]), geometry))
    layout = 2 * (pixels * channels + places * out) * size * BYTE
    runs = area * rows * (out + channels) * size * BYTE
    native = max(2 * rows * entries * _flop(size), runs)
    form = layout + native + entries * WIDE * BYTE + area * LAUNCH / tape.examples
    again = layout + native * (PARTS if size == 2 else 1)
    passes = entries * WIDE * BYTE * (2 if standardised else 1)
    cost = {
        "keep": form + passes + entries * WIDE * BYTE,
        "drop": 2 * form + passes + entries * WIDE * BYTE,
        "gram": 2 * (pixels**2 * channels + places**2 * out) * _flop(size)
        + (gram.passes(channels) + 1) * pixels**2 * WIDE * BYTE
        + (gram.passes(out) + 3 * area + 5) * places**2 * WIDE * BYTE
        + (2 * area * LAUNCH / tape.examples)
        + (2 * places * entries * FLOP if standardised else 0.0)  # the convolution with its direction
        + again,
    }
    best = "drop"
    if places <= gram.MOST and (pixels**2 + 3 * places**2) * WIDE <= tape.scratch:
        best = min(best, "gram", key=cost.__getitem__)
    if cost["keep"] < cost[best] and tape.reserve(kept, held):
        return "shifts", True
    return ("gram" if best == "gram" else "shifts"), False
