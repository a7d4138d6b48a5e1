"""A random change of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Augmentation(ABC):
    """A random change of images; its fields are the options."""

    @abstractmethod
    def views(self, images: Images, words: Words) -> Images:
        """Return changed images.

        Args:
            images: (B, V, H, W, C) with V = 1 (no view differs yet) or K.
            words: (B, K) uniform 64-bit words, the only source of randomness: of the step's key, the example
                and the view.

        Returns:
            (B, K, H, W, C), the same size, each view a function of its image and its word alone.
        """

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027 - most take any image
        """Raise InputError for images (H, W, C) that it cannot take."""


@dataclass(frozen=True)
class Part(Augmentation):
    """One that scales a part of each picture to the size of the images, and says which part.

    Only as the first of the list: of pictures that lie in files it takes the part from the picture as it is
    there, of any size, before anything else is done to it.
    """

    @abstractmethod
    def boxes(self, sizes: NDArray[np.int64], words: Words) -> NDArray[np.int64]:
        """Return the part that becomes each view.

        Args:
            sizes: (B, 2) height and width of each picture.
            words: (B, K) as of `views`.

        Returns:
            (B, K, 4): top, left, height and width in whole pixels, within the picture; each a function of its
            picture's size and its word alone.
        """


@dataclass(frozen=True)
class Function(Augmentation):
    """A function from outside in place of an augmentation: (images, words, **options) -> images."""

    function: Callable[[Images, Words], Images]

    def views(self, images: Images, words: Words) -> Images:
        """See `Augmentation.views`."""
        return self.function(images, words)
