"""Independent Gaussian noise from a key: as fast as an ordinary generator, and cryptographic.

Uniforms are words of AES-256 in counter mode, turned into normals by Box and Muller (1958), all in float64
with 53-bit uniforms. Random access: value i depends on (key, i) alone.

A normal made this way lies on a grid and within +-8.6 standard deviations, and the released sum is rounded
to the model's dtype. Epsilon is stated for the ideal Gaussian; the attack of Mironov (2012) on the low bits
of floating-point noise is not covered by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import seeds
from fedsim.validate import InputError

_PAIRS = 1 << 14  # uniforms of each kind per block: the working set (about 1 MiB) stays in cache
_BLOCK = 2 * _PAIRS


def standard_normal(key: bytes, count: int, start: int = 0) -> NDArray[np.float64]:
    """Return values start .. start + count - 1 of the normal stream of `key`.

    Args:
        key: 32 bytes; never used for anything else.
        count: how many values, >= 0.
        start: index of the first value, >= 0.

    Returns:
        (count,) float64, independent N(0, 1). Any slice gives the same values, bit for bit on one machine
        type; sine and cosine may differ in the last bit between builds of torch.

    Raises:
        InputError: negative count or start.
    """
    if count < 0 or start < 0:
        raise InputError(f"count and start must not be negative, got {count} and {start}.")
    out = np.empty(count, dtype=np.float64)
    maker = _BlockMaker(key)
    stop = start + count
    first_block, last_block = start // _BLOCK, -(-stop // _BLOCK)
    spare = np.empty(_BLOCK, dtype=np.float64)
    with _one_thread():
        for block in range(first_block, last_block):
            low, high = block * _BLOCK, (block + 1) * _BLOCK
            if start <= low and high <= stop:
                maker.fill(block, out[low - start : high - start])
            else:  # blocks are always made whole, so that a value cannot depend on where a slice begins
                maker.fill(block, spare)
                low_cut, high_cut = max(low, start), min(high, stop)
                out[low_cut - start : high_cut - start] = spare[low_cut - low : high_cut - low]
    return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: on a busy machine waking others for a small block costs 30 times its work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _BlockMaker:
    """Makes aligned blocks of normals in buffers it owns: no allocation inside the loop but the words."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._integers = np.empty(_BLOCK, dtype=np.uint64)
        self._uniforms = np.empty(_BLOCK, dtype=np.float64)

    def fill(self, block: int, out: NDArray[np.float64]) -> None:
        """Write block `block` (its first half cosines, its second half sines) into out (_BLOCK,)."""
        np.right_shift(seeds.words(self._key, block * _BLOCK, _BLOCK), np.uint64(11), out=self._integers)
        np.copyto(self._uniforms, self._integers.view(np.int64))  # below 2**53, hence exact
        radius, angle = self._uniforms[:_PAIRS], self._uniforms[_PAIRS:]
        np.add(radius, 1.0, out=radius)  # (0, 1] after scaling: the logarithm is finite
        np.multiply(radius, 2.0**-53, out=radius)
        np.log(radius, out=radius)
        np.multiply(radius, -2.0, out=radius)
        np.sqrt(radius, out=radius)
        np.multiply(angle, math.tau * 2.0**-53, out=angle)
        # numpy has no vectorised float64 sine; torch has.
        cosines, sines = out[:_PAIRS], out[_PAIRS:]
        turn = torch.from_numpy(angle)
        torch.cos(turn, out=torch.from_numpy(cosines))
        torch.sin(turn, out=torch.from_numpy(sines))
        np.multiply(cosines, radius, out=cosines)
        np.multiply(sines, radius, out=sines)


def step_noise(
    root: seeds.Root, step: int, count: int, noise_std: float, purpose: str = "noise"
) -> NDArray[np.float64]:
    """Return the noise of one step, (count,) float64 with standard deviation `noise_std`.

    The same (root, step, purpose) always gives the same noise, so a resumed step releases nothing new. With
    an integer root whoever knows the seed can subtract the noise (`seeded`); with 32 secret bytes from the
    operating system nobody can once the secret is destroyed (`secure`).
    """
    values = standard_normal(seeds.derive(root, purpose, step), count)
    np.multiply(values, noise_std, out=values)
    return values
