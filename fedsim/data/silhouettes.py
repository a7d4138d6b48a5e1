"""Images of nothing in particular: a few plain shapes on black, drawn from a fixed key.

The average of a feature map over them stands in for its average over private images, which would have a
price. Subtracted, it removes much of what the features of all images have in common: that part tells no two
examples apart, but takes its share of every clipped gradient.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds

COUNT = 1000
PARTS = 4  # at most, in one image
GRAIN = 0.15  # standard deviation of the noise, relative to the brightness it is put on


def draw(height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Return COUNT images (COUNT, height, width, channels), the same on every machine.

    Each holds 1 to PARTS ellipses or rounded boxes (|u / a|^p + |v / b|^p < 1 with p = 2 or 8) of any place,
    size, direction and colour, the later over the earlier, with fine noise.
    """
    random = seeds.stream(0, "silhouettes")
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    images = np.zeros((COUNT, height, width, channels))
    for image in images:
        for _ in range(random.integers(1, PARTS + 1)):
            centre, axes = random.uniform(-0.5, 0.5, 2), random.uniform(0.15, 0.95, 2)
            angle, power = random.uniform(0, np.pi), random.choice([2.0, 8.0])
            dx, dy = x - centre[0], y - centre[1]
            u = dx * np.cos(angle) + dy * np.sin(angle)
            v = dy * np.cos(angle) - dx * np.sin(angle)
            inside = np.abs(u / axes[0]) ** power + np.abs(v / axes[1]) ** power < 1
            image[inside] = random.uniform(0.1, 1.0, channels)
    images *= 1 + GRAIN * random.standard_normal(images.shape)
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
