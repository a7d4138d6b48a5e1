"""Data sets that declare their own classes and constants: the embedded subset, torchvision's, glyphs."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import glyphs
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures.decode import fitted
from fedsim.data.sources import SOURCES
from fedsim.data.sources.base import Source
from fedsim.data.sources.image_files import empty
from fedsim.data.targets import Targets
from fedsim.validate import InputError

EMBEDDED_DIR = Path(__file__).resolve().parents[1] / "embedded"
SUBSET_FILE = "fashion_mnist_subset.npz"
SUBSET_SHA256 = "d2e3082e52dc42e8731b36c46651bc201c3960ae50470802125daac2de29c144"

# Published per-channel constants on the [0, 1] scale. Statistics of any other data set are not computed: they
# would be a function of private examples that no ledger accounts for.
_Constants = tuple[tuple[float, ...], tuple[float, ...]]
_FASHION_MNIST: _Constants = ((0.2860,), (0.3530,))
_MNIST: _Constants = ((0.1307,), (0.3081,))
_CIFAR10: _Constants = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100: _Constants = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@SOURCES.register("fashion_mnist_subset")
@dataclass(frozen=True)
class FashionMnistSubset(Source):
    """10,000 + 2,000 images of Fashion-MNIST that the package embeds."""

    def load(self, root: Path) -> Splits:
        """See `Source.load`."""
        path = root / SUBSET_FILE
        if not path.is_file():
            raise InputError(
                f"data.root must hold {SUBSET_FILE} when the package comes without it, got {root}. "
                "Copy the file from fedsim/data/embedded of a checkout into that folder."
            )
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != SUBSET_SHA256:
            raise InputError(
                f"{path}: the file is not the published subset (sha256 differs). Restore the file."
            )
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            a = dict(arrays)
        name, declared = "fashion_mnist_subset", Targets("class", 10, _CLOTHES)
        return Splits(
            *(
                ArrayDataset(
                    name, a[f"{s}_images"][..., None], a[f"{s}_labels"], None, declared, *_FASHION_MNIST
                )
                for s in ("train", "test")
            )
        )


@dataclass(frozen=True)
class _Torchvision(Source):
    """A data set by torchvision's class `kind`, of `layout` below data.root."""

    kind: ClassVar[str]
    classes: ClassVar[int] = 10
    constants: ClassVar[_Constants]
    layout: ClassVar[str]

    @property
    def remedy(self) -> str:
        """How the files get there."""
        return f"Download it once with torchvision.datasets.{self.kind}(root, download=True)"

    def load(self, root: Path) -> Splits:
        """See `Source.load`."""
        import torchvision  # costs seconds to import; the embedded set and plain arrays do without

        name = self.kind.lower() if self.kind != "FashionMNIST" else "fashion_mnist"

        def split(train: bool) -> ArrayDataset:
            # torchvision checks the CIFAR files against published digests before it unpickles them.
            data = getattr(torchvision.datasets, self.kind)(str(root), train=train, download=False)
            images = np.asarray(data.data)
            images = self._sized(images[..., None] if images.ndim == 3 else images)
            declared = Targets("class", self.classes, tuple(data.classes))
            return ArrayDataset(name, images, np.asarray(data.targets), None, declared, *self.constants)

        try:
            return Splits(split(True), split(False))
        except InputError:
            raise
        except Exception as error:  # torchvision says what is wrong with a file in a dozen ways
            raise InputError(
                f"{name}: expected {self.layout} under data.root, got {root}: "
                f"{(str(error) or type(error).__name__).partition('. You can use')[0]}. {self.remedy}, "
                "or set data.root (or FEDSIM_DATA) to the folder that has it."
            ) from error

    def _sized(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The images (N, H, W, C) in the size that models get."""
        return images


@dataclass(frozen=True)
class _Scaled(_Torchvision):
    """Colour images, scaled where a model needs more pixels than they have.

    Attributes:
        size: edge that every image is scaled to, bilinearly; null: as it is.
    """

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            validate.positive(self.size, "data.options.size")

    def _sized(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.size is None:
            return images
        from PIL import Image

        found = empty(len(images), (self.size, self.size, images.shape[-1]), self.kind)
        for place, image in enumerate(images):
            found[place] = fitted(Image.fromarray(image), (self.size, self.size))
        return found


@SOURCES.register("fashion_mnist")
@dataclass(frozen=True)
class FashionMnist(_Torchvision):
    """60,000 + 10,000 grey images of ten kinds of clothes (Xiao et al. 2017)."""

    kind = "FashionMNIST"
    constants = _FASHION_MNIST
    layout = "FashionMNIST/raw with the four unpacked IDX files"
    remedy = "Run `make data`"


@SOURCES.register("mnist")
@dataclass(frozen=True)
class Mnist(_Torchvision):
    """60,000 + 10,000 grey images of digits (LeCun et al. 1998)."""

    kind = "MNIST"
    constants = _MNIST
    layout = "MNIST/raw with the four unpacked IDX files"


@SOURCES.register("cifar10")
@dataclass(frozen=True)
class Cifar10(_Scaled):
    """50,000 + 10,000 colour images of ten classes (Krizhevsky 2009)."""

    kind = "CIFAR10"
    constants = _CIFAR10
    layout = "cifar-10-batches-py with the Python batches"


@SOURCES.register("cifar100")
@dataclass(frozen=True)
class Cifar100(_Scaled):
    """50,000 + 10,000 colour images of a hundred classes (Krizhevsky 2009)."""

    kind = "CIFAR100"
    classes = 100
    constants = _CIFAR100
    layout = "cifar-100-python with train, test and meta"


@dataclass(frozen=True)
class _Glyphs(Source):
    """Characters rendered from the fonts below data.root, which own them (`fedsim.data.glyphs`)."""

    name: ClassVar[str]

    def load(self, root: Path) -> Splits:
        """See `Source.load`."""
        a, characters = glyphs.load(self.name, root), glyphs.CHARACTERS[self.name]
        declared = Targets("class", len(characters), tuple(characters))
        return Splits(
            *(
                ArrayDataset(
                    self.name, a[f"{s}_inputs"], a[f"{s}_labels"], a[f"{s}_groups"], declared, (0.5,), (0.5,)
                )
                for s in ("train", "test")
            )
        )


@SOURCES.register("glyphs")
@dataclass(frozen=True)
class Glyphs(_Glyphs):
    """Digits and letters, rendered from a folder of fonts; a font owns its characters."""

    name = "glyphs"


@SOURCES.register("glyphs_a_to_j")
@dataclass(frozen=True)
class GlyphsAToJ(_Glyphs):
    """The letters A to J, rendered from a folder of fonts; a font owns its characters."""

    name = "glyphs_a_to_j"
