"""Images of random processes: textured shapes that lie over each other, and nothing else.

A network can learn to see from images that show nothing real (Baradad et al. 2021, dead leaves and other
processes; Tang et al. 2023, DP-RandP, as a prior for private training). Here an image is a background, black
or grey, under up to LEAVES superellipses |u|^p + |v|^p < 1 of any place, size, direction and power, each with
a shade that runs along its axes and a texture of waves, some together with their mirror image. No data is
looked at, so what such images teach is a constant and costs no privacy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAVES = 10


def draw(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return (count, 1, height, width) float32 within [0, 1]."""

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand((count, 1, 1), generator=generator)

    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    images = (uniform() * (uniform() < 0.5)).expand(-1, height, width).clone()
    for _ in range(LEAVES):
        centre_x, centre_y, angle = uniform(-0.8, 0.8), uniform(-0.8, 0.8), uniform(0, math.pi)
        long, wide = torch.exp(uniform(-2.6, -0.1)), torch.exp(uniform(-2.6, -0.1))
        cos, sin = torch.cos(angle), torch.sin(angle)
        u = ((x - centre_x) * cos + (y - centre_y) * sin) / long
        v = ((y - centre_y) * cos - (x - centre_x) * sin) / wide
        power = torch.exp(uniform(0, 2.3))  # from a diamond to nearly a box
        inside = (u.abs() + 1e-4) ** power + (v.abs() + 1e-4) ** power < 1
        waves = torch.sin(v * uniform(0, 12) + u * uniform(0, 12))
        shade = uniform() + uniform(-0.5, 0.5) * u + uniform(-0.3, 0.3) * waves
        inside |= inside.flip(2) & (uniform() < 0.5)
        inside &= uniform() < 0.75
        images = torch.where(inside, shade.clamp(0, 1), images)
    return images[:, None]
