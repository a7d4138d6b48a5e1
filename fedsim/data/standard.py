"""Data sets that declare their own classes and constants: the embedded subset, torchvision's, glyphs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from fedsim.data import glyphs
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.validate import InputError

EMBEDDED_DIR = Path(__file__).resolve().parent / "embedded"
SUBSET_FILE = "fashion_mnist_subset.npz"
SUBSET_SHA256 = "d2e3082e52dc42e8731b36c46651bc201c3960ae50470802125daac2de29c144"

# Published per-channel constants on the [0, 1] scale. Statistics of any other data set are not computed: they
# would be a function of private examples that no ledger accounts for.
_Constants = tuple[tuple[float, ...], tuple[float, ...]]
_FASHION_MNIST: _Constants = ((0.2860,), (0.3530,))
_MNIST: _Constants = ((0.1307,), (0.3081,))
_CIFAR10: _Constants = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100: _Constants = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class Loader(Protocol):
    """Reads one data set."""

    def __call__(self, root: Path, classes: int | None) -> Splits:
        """Return the splits at `root`; `classes` is what data.classes declares, None for most."""
        ...


def _fashion_mnist_subset(root: Path, classes: int | None) -> Splits:
    path = root / SUBSET_FILE
    if not path.is_file():
        raise InputError(
            f"data.root must hold {SUBSET_FILE} when the package comes without it, got {root}. "
            "Copy the file from fedsim/data/embedded of a checkout into that folder."
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SUBSET_SHA256:
        raise InputError(f"{path}: the file is not the published subset (sha256 differs). Restore the file.")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        a = dict(arrays)
    return Splits(
        *(
            ArrayDataset(
                "fashion_mnist_subset",
                a[f"{split}_images"][..., None],
                a[f"{split}_labels"],
                None,
                10,
                *_FASHION_MNIST,
            )
            for split in ("train", "test")
        )
    )


def _torchvision(
    name: str, cls: str, num_classes: int, constants: _Constants, layout: str, remedy: str
) -> Loader:
    def loader(root: Path, classes: int | None) -> Splits:
        import torchvision  # costs seconds to import; the embedded set and plain arrays do without

        def split(train: bool) -> ArrayDataset:
            # torchvision checks the CIFAR files against published digests before it unpickles them.
            data = getattr(torchvision.datasets, cls)(str(root), train=train, download=False)
            images = np.asarray(data.data)
            images = images[..., None] if images.ndim == 3 else images
            return ArrayDataset(name, images, np.asarray(data.targets), None, num_classes, *constants)

        try:
            return Splits(split(True), split(False))
        except InputError:
            raise
        except Exception as error:  # torchvision says what is wrong with a file in a dozen ways
            raise InputError(
                f"{name}: expected {layout} under data.root, got {root}: "
                f"{str(error) or type(error).__name__}. {remedy}, "
                "or set data.root (or FEDSIM_DATA) to the folder that has it."
            ) from error

    return loader


_BY_TORCHVISION = "Download it once with torchvision.datasets.{}(root, download=True)"


_BY_TORCHVISION = "Download it once with torchvision.datasets.{}(root, download=True)"


def _glyphs(name: str) -> Loader:
    def loader(root: Path, classes: int | None) -> Splits:
        a, characters = glyphs.load(name, root), len(glyphs.CHARACTERS[name])
        return Splits(
            *(
                ArrayDataset(
                    name, a[f"{s}_inputs"], a[f"{s}_labels"], a[f"{s}_groups"], characters, (0.5,), (0.5,)
                )
                for s in ("train", "test")
            )
        )

    return loader


STANDARD: Mapping[str, Loader] = {
    "fashion_mnist_subset": _fashion_mnist_subset,
    "fashion_mnist": _torchvision(
        "fashion_mnist",
        "FashionMNIST",
        10,
        _FASHION_MNIST,
        "FashionMNIST/raw with the four unpacked IDX files",
        "Run `make data`",
    ),
    "mnist": _torchvision(
        "mnist",
        "MNIST",
        10,
        _MNIST,
        "MNIST/raw with the four unpacked IDX files",
        _BY_TORCHVISION.format("MNIST"),
    ),
    "cifar10": _torchvision(
        "cifar10",
        "CIFAR10",
        10,
        _CIFAR10,
        "cifar-10-batches-py with the Python batches",
        _BY_TORCHVISION.format("CIFAR10"),
    ),
    "cifar100": _torchvision(
        "cifar100",
        "CIFAR100",
        100,
        _CIFAR100,
        "cifar-100-python with train, test and meta",
        _BY_TORCHVISION.format("CIFAR100"),
    ),
    **{name: _glyphs(name) for name in glyphs.CHARACTERS},
}
