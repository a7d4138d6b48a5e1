"""The full Fashion-MNIST, 70,000 grey images: MIT licence."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.data.fetching.ways import DataSet, FetchFailed, already_there, debian_package

PACKAGE = "dataset-fashion-mnist"
SECONDS_WITHOUT_DATA = 20

# sha256 of the unpacked IDX files: compression differs between distributors, the content does not.
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def by_torchvision(_: Path, folder: Path) -> Path:
    """torchvision's own download."""
    import torchvision

    with _socket_timeout(SECONDS_WITHOUT_DATA):
        try:
            torchvision.datasets.FashionMNIST(str(folder), download=True)
        except (RuntimeError, OSError, EOFError) as error:
            raise FetchFailed(f"{type(error).__name__}: {error}".strip()) from error
    return folder / "FashionMNIST" / "raw"


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision opens connections without a limit; a firewall that drops packets would hang it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def by_debian(_: Path, folder: Path) -> Path:
    """The Debian package."""
    images = next(debian_package(PACKAGE, folder).rglob("train-images-idx3-ubyte*"), None)
    if images is None:
        raise FetchFailed(f"the package {PACKAGE} does not hold the IDX files")
    return images.parent


SET = DataSet(
    title="Fashion-MNIST",
    folder="FashionMNIST/raw",
    digests=DIGESTS,
    ways={
        "files that are already there": already_there,
        "download by torchvision": by_torchvision,
        f"Debian package {PACKAGE}": by_debian,
    },
    use="data.name=fashion_mnist",
    otherwise=(
        f"install the Debian package {PACKAGE} elsewhere and copy its files likewise",
        "use data.name=fashion_mnist_subset, which needs no download",
    ),
)
