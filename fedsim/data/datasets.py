"""Data sets as plain arrays, opened once per process.

`load` returns the training and evaluation split that a `DataConfig` names. Images stay uint8 until
`normalise` turns one physical batch into a float tensor, so a node holds one byte per pixel and nothing is
decoded twice. The row of an example in the training split is its global id: draws, augmentations and
partitions are all keyed by it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import seeds, validate
from fedsim.config import DataConfig
from fedsim.data import features, glyphs
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


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Examples with labels, and what is public about them.

    Attributes:
        name: the data set's name in the registry.
        inputs: (N, H, W, C) uint8 images, or (N, ...) float16, float32 or float64 features; read-only.
        labels: (N,) int64 in 0 .. num_classes - 1; read-only.
        groups: (N,) int64 natural owner of each example, or None where the data set has no owners.
        num_classes: number of labels, a public constant of the data set.
        mean, std: C numbers each, applied to pixels on the [0, 1] scale: published constants for the standard
            sets, 0.5 and 0.5 for other images (statistics of private images would leak), empty for features.

    Raises:
        InputError: shapes, dtypes, lengths or labels that do not fit together. Feature values are not
            scanned: an example that is not finite contributes a zero gradient and is counted.
    """

    name: str
    inputs: NDArray[Any]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_inputs(self.name, self.inputs)
        n = len(self.inputs)
        object.__setattr__(self, "inputs", _read_only(self.inputs))
        object.__setattr__(self, "labels", _read_only(_integers(self.name, "labels", self.labels, n)))
        if self.groups is not None:
            object.__setattr__(self, "groups", _read_only(_integers(self.name, "groups", self.groups, n)))
        validate.positive(self.num_classes, f"{self.name}: num_classes")
        if n and (self.labels.min() < 0 or self.labels.max() >= self.num_classes):
            raise InputError(
                f"{self.name}: labels must lie in 0 .. {self.num_classes - 1}, got "
                f"{self.labels.min()} .. {self.labels.max()}. Number the classes from 0."
            )
        channels = self.inputs.shape[-1] if self.is_image else 0
        if (len(self.mean), len(self.std)) != (channels, channels) or not all(s > 0 for s in self.std):
            raise InputError(
                f"{self.name}: mean and std must hold {channels} numbers, std positive, "
                f"got {self.mean} and {self.std}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_image(self) -> bool:
        """Whether inputs are uint8 images (augmentable, normalised) rather than float features."""
        return self.inputs.dtype == np.uint8

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example as a model sees it: (C, H, W) for images, the feature shape otherwise."""
        shape = self.inputs.shape[1:]
        return (shape[2], shape[0], shape[1]) if self.is_image else shape

    def take(self, rows: NDArray[np.int64] | slice) -> ArrayDataset:
        """Return the given rows as a data set; a slice shares memory, an index array copies."""
        groups = None if self.groups is None else self.groups[rows]
        return dataclasses.replace(self, inputs=self.inputs[rows], labels=self.labels[rows], groups=groups)


@dataclass(frozen=True, eq=False)
class Splits:
    """A training split (private, partitioned over holders) and the split a run is evaluated on."""

    train: ArrayDataset
    test: ArrayDataset

    def __post_init__(self) -> None:
        for split, data in (("train", self.train), ("test", self.test)):
            if not len(data):
                raise InputError(f"{data.name}: the {split} split must hold at least one example, got none.")
        a, b = self.train, self.test
        if (a.inputs.shape[1:], a.inputs.dtype) != (b.inputs.shape[1:], b.inputs.dtype):
            raise InputError(
                f"{a.name}: train and test examples must have the same shape and dtype, got "
                f"{a.inputs.shape[1:]} {a.inputs.dtype} and {b.inputs.shape[1:]} {b.inputs.dtype}."
            )


Loader = Callable[[Path], Splits]


def default_root() -> Path:
    """Return the folder used where `data.root` is not set: $FEDSIM_DATA, else ./data; absolute."""
    return Path(os.environ.get("FEDSIM_DATA") or "data").absolute()


def resolve(config: DataConfig) -> DataConfig:
    """Return `config` with an absolute `root`, as a process with another working directory needs it.

    The embedded subset is looked for in `root`, then in the default folder, then in the package itself,
    and last in the installed fedsim: a copy of the code shipped without data files, as Flower's bundle is,
    finds it there.
    """
    validate.one_of(config.name, DATASETS, "data.name")
    validate.one_of(config.features, [None, *features.FEATURES], "data.features")
    root = default_root() if config.root is None else Path(config.root).expanduser().absolute()
    if config.name == "fashion_mnist_subset":
        places = [root, default_root(), EMBEDDED_DIR, *_installed_embedded()]
        root = next((p for p in places if (p / SUBSET_FILE).is_file()), root)
    return dataclasses.replace(config, root=str(root))


def _installed_embedded() -> list[Path]:
    """Where the installed distribution, editable or not, keeps the embedded data."""
    try:
        installed = metadata.distribution("fedsim")
    except metadata.PackageNotFoundError:
        return []
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    checkout = urlparse(origin.get("url", ""))
    folders = [Path(str(installed.locate_file("fedsim/data/embedded")))]
    if checkout.scheme == "file":
        folders.append(Path(unquote(checkout.path)) / "fedsim" / "data" / "embedded")
    return folders


def load(config: DataConfig) -> Splits:
    """Return the splits that `config` describes; the same object for the same config in one process.

    `holdout_examples` = n takes n examples out of the training set, chosen by a fixed keyed shuffle that no
    run seed changes, and evaluates on these *instead of* the test set: hyper-parameters are tuned with a
    hold-out and reported without. `train_examples` and `test_examples` then keep the first examples of the
    training and the evaluation split. Global example ids are the rows of the training split that results.
    `features` names a fixed map (fedsim.data.features) that replaces every image by float16 features, read
    from a cache on disk that the first call fills.

    Raises:
        InputError: unknown name, files missing or malformed, or more examples asked for than there are.
    """
    return _load(resolve(config))


@functools.lru_cache(maxsize=4)
def _load(config: DataConfig) -> Splits:
    assert config.root is not None  # set by resolve
    splits = DATASETS[config.name](Path(config.root))
    train, test = splits.train, splits.test
    if config.features is not None:  # of the whole set, so that every cut of it shares one cached file
        train, test = _featurised(train, config.features), _featurised(test, config.features)
    if config.holdout_examples:
        if config.holdout_examples >= len(train):
            raise InputError(
                f"data.holdout_examples must be below the {len(train)} training examples of {config.name}, "
                f"got {config.holdout_examples}."
            )
        order = seeds.stream(0, "holdout").permutation(len(train))
        kept, held = np.split(order, [len(train) - config.holdout_examples])
        train, test = train.take(np.sort(kept)), train.take(np.sort(held))
    train = _first(train, config.train_examples, "data.train_examples")
    test = _first(test, config.test_examples, "data.test_examples")
    return Splits(train, test)


def _featurised(data: ArrayDataset, name: str) -> ArrayDataset:
    return dataclasses.replace(data, inputs=features.of_images(name, data.inputs), mean=(), std=())


def _first(data: ArrayDataset, n: int | None, name: str) -> ArrayDataset:
    if n is None:
        return data
    if n > len(data):
        raise InputError(
            f"{name} must be at most {len(data)}, the examples {data.name} has left, got {n}. "
            "Lower it, or leave it out to use them all."
        )
    return data.take(slice(0, n))


def normalise(
    batch: NDArray[Any],
    dataset: ArrayDataset,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Turn examples into what a model takes.

    Args:
        batch: (..., H, W, C) uint8 images or (...) float features; leading axes (examples, views) are free.
        dataset: where the examples come from; its mean and std are used.
        dtype: torch.float32 or torch.float64.
        device: where the result lives; images travel as bytes and are converted there.

    Returns:
        (..., C, H, W) tensor (x / 255 - mean) / std for images; features unchanged but for their dtype.
        Each value depends on its own pixel alone, so batching never changes it.
    """
    tensor = torch.tensor(batch, device=device)  # copies: the data set's arrays are read-only
    if not dataset.is_image:
        return tensor.to(dtype)
    mean = torch.tensor(dataset.mean, dtype=dtype, device=device).view(-1, 1, 1)
    std = torch.tensor(dataset.std, dtype=dtype, device=device).view(-1, 1, 1)
    planes = tensor.movedim(-1, -3).to(dtype, memory_format=torch.contiguous_format)
    return planes.div_(255.0).sub_(mean).div_(std)


# --- loaders: one function a format ---------------------------------------------------------------------


def _fashion_mnist_subset(root: Path) -> Splits:
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
    def loader(root: Path) -> Splits:
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
        except (RuntimeError, OSError, ValueError, TypeError, AssertionError) as error:
            raise InputError(
                f"{name}: expected {layout} under data.root, got {root}: {error or type(error).__name__}. "
                f"{remedy}, or set data.root (or FEDSIM_DATA) to the folder that has it."
            ) from error

    return loader


_BY_TORCHVISION = "Download it once with torchvision.datasets.{}(root, download=True)"


def _image_folder(root: Path) -> Splits:
    import torchvision

    folders = {}
    for split in ("train", "test"):
        try:
            folders[split] = torchvision.datasets.ImageFolder(str(root / split))
        except OSError as error:
            raise InputError(
                f"image_folder: expected images at {root}/{split}/CLASS/FILE (png, jpg, ...), got: {error} "
                "Set data.root to a folder with train and test, each with one folder per class."
            ) from error
    if folders["train"].classes != folders["test"].classes:
        differ = sorted(set(folders["train"].classes) ^ set(folders["test"].classes))
        raise InputError(
            f"image_folder: {root}/train and {root}/test must have the same class folders, "
            f"got a difference in {', '.join(differ)}. Add the missing folders or remove the others."
        )
    train = _decode(folders["train"], None)
    return Splits(train, _decode(folders["test"], train.inputs.shape[1:]))


def _decode(folder: Any, shape: tuple[int, ...] | None) -> ArrayDataset:
    """Decode every image once into (N, H, W, 3); all have `shape`, by default that of the first."""
    first = _pixels(folder.samples[0][0])  # ImageFolder refuses a folder without images
    shape = first.shape if shape is None else shape
    inputs = np.empty((len(folder.samples), *shape), dtype=np.uint8)
    for row, (path, _) in enumerate(folder.samples):
        image = _pixels(path) if row else first
        if image.shape != shape:
            raise InputError(
                f"image_folder: every image must be {shape[1]} x {shape[0]} pixels like the first one, "
                f"got {image.shape[1]} x {image.shape[0]} in {path}. Bring the images to one size beforehand."
            )
        inputs[row] = image
    labels = np.array([label for _, label in folder.samples], dtype=np.int64)
    return ArrayDataset("image_folder", inputs, labels, None, len(folder.classes), (0.5,) * 3, (0.5,) * 3)


def _pixels(path: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image_folder: {path} must be a readable image. {error}") from error


def _glyphs(name: str) -> Loader:
    def loader(root: Path) -> Splits:
        a, classes = glyphs.load(name, root), len(glyphs.CHARACTERS[name])
        return Splits(
            *(
                ArrayDataset(
                    name, a[f"{s}_inputs"], a[f"{s}_labels"], a[f"{s}_groups"], classes, (0.5,), (0.5,)
                )
                for s in ("train", "test")
            )
        )

    return loader


def _arrays(root: Path) -> Splits:
    arrays = _read_arrays(root)
    needed = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise InputError(
            f"arrays: data.root must be an .npz file or a folder of .npy files with {', '.join(needed)} "
            f"(and train_groups where examples have owners), got {root} without {', '.join(missing)}."
        )
    labels = {
        s: _integers("arrays", f"{s}_labels", arrays[f"{s}_labels"], len(arrays[f"{s}_inputs"]))
        for s in ("train", "test")
    }
    num_classes = 1 + max((int(a.max()) for a in labels.values() if len(a)), default=0)

    def split(name: str) -> ArrayDataset:
        inputs = arrays[f"{name}_inputs"]
        half = (0.5,) * inputs.shape[-1] if inputs.dtype == np.uint8 and inputs.ndim == 4 else ()
        groups = arrays.get("train_groups") if name == "train" else None
        return ArrayDataset("arrays", inputs, labels[name], groups, max(num_classes, 1), half, half)

    return Splits(split("train"), split("test"))


def _read_arrays(root: Path) -> Mapping[str, NDArray[Any]]:
    """Read an .npz into memory, or map the .npy files of a folder (an .npz cannot be memory-mapped)."""
    names = [f"{split}_{part}" for split in ("train", "test") for part in ("inputs", "labels", "groups")]
    try:
        if root.is_file():
            archive = np.load(root, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("It is a single array; save it into a folder of .npy files.")
            with archive:
                return {name: archive[name] for name in names if name in archive}
        paths = {name: root / f"{name}.npy" for name in names}
        return {n: np.load(p, mmap_mode="r", allow_pickle=False) for n, p in paths.items() if p.is_file()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"arrays: {root} must hold plain numeric numpy arrays (no object arrays). {error}"
        ) from error


def _check_inputs(name: str, inputs: NDArray[Any]) -> None:
    image = inputs.dtype == np.uint8 and inputs.ndim == 4
    features = inputs.dtype in (np.float16, np.float32, np.float64) and inputs.ndim >= 2
    if not (image or features) or 0 in inputs.shape[1:]:
        raise InputError(
            f"{name}: inputs must be uint8 images of shape (N, H, W, C) or float16, float32 or float64 "
            f"features of shape (N, d), got {inputs.dtype} of shape {inputs.shape}. "
            "Grey images need a last axis of length 1."
        )


def _integers(name: str, what: str, values: NDArray[Any], n: int) -> NDArray[np.int64]:
    values = np.asarray(values)
    if values.shape != (n,) or not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"{name}: {what} must be {n} integers, one per example, "
            f"got {values.dtype} of shape {values.shape}."
        )
    return values.astype(np.int64, copy=False)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()  # the caller's own array keeps its flag
    view.flags.writeable = False
    return view


DATASETS: Mapping[str, Loader] = {
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
    "image_folder": _image_folder,
    **{name: _glyphs(name) for name in glyphs.CHARACTERS},
    "arrays": _arrays,
}
