"""The data set that a configuration names, opened once per process.

`load` returns the training and evaluation split that a `DataConfig` names. Images stay uint8 until
`examples.normalise` turns one physical batch into a float tensor, so a node holds one byte per pixel and
nothing is decoded twice. The row of an example in the training split is its global id: draws, augmentations
and partitions are all keyed by it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
from numpy.typing import NDArray

from fedsim import given, merging, seeds
from fedsim.config import DataConfig
from fedsim.data import features
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.feature_file import FeatureFile
from fedsim.data.features import Rows
from fedsim.data.pictures.pictures import Pictures
from fedsim.data.sources import SOURCES
from fedsim.merging import Choice
from fedsim.validate import InputError, PrivateInputError


def default_root() -> Path:
    """Return the folder used where `data.root` is not set: $FEDSIM_DATA, else ./data; absolute."""
    return Path(os.environ.get("FEDSIM_DATA") or "data").absolute()


def resolve(config: DataConfig) -> DataConfig:
    """Return `config` with an absolute `root`, as a process with another working directory needs it.

    The embedded subset is looked for in `root`, then in the default folder, then in the package itself,
    and last in the installed fedsim: a copy of the code shipped without data files, as Flower's bundle is,
    finds it there.
    """
    SOURCES.find(config.name)
    if config.features is not None:
        features.FEATURES.make(config.features)
    root = default_root() if config.root is None else Path(config.root).expanduser().absolute()
    if config.name == "fashion_mnist_subset":
        from fedsim.data.sources.standard import EMBEDDED_DIR, SUBSET_FILE

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


def load(config: DataConfig, public_only: bool = False) -> Splits:
    """Return the splits that `config` describes; the same object for the same config in one process.

    `holdout_examples` = n takes n examples out of the training set, chosen by a fixed keyed shuffle that no
    run seed changes, and evaluates on these *instead of* the test set: hyper-parameters are tuned with a
    hold-out and reported without. `train_examples` and `test_examples` then keep the first examples of the
    training and the evaluation split. Global example ids are the rows of the training split that results.
    `features` names a fixed map (fedsim.data.features) that replaces every image by float16 features, read
    from a cache on disk; what is not there yet is computed.

    Raises:
        InputError: unknown name, files missing or malformed, or more examples asked for than there are. With
            `public_only` its message says nothing of what examples hold.
    """
    with telling(public_only):
        return _load(_described(config))


def extract(
    config: DataConfig, ids: NDArray[np.int64] | None = None, public_only: bool = False
) -> list[FeatureFile]:
    """Compute what is not there yet of the features that `load` reads, and return their files.

    Args:
        config: with `features`.
        ids: of the training examples that are wanted, such as those of a node; None: all of both splits.
        public_only: as of `load`.

    Raises:
        InputError: as `load`.
    """
    with telling(public_only):
        cuts = _cuts(merging.parse_options(json.loads(_described(config)), DataConfig, "data"))
        if ids is None:
            return [_file(data, config, rows) for data, rows in cuts]
        train, rows = cuts[0]
        return [_file(train, config, np.arange(len(train))[rows][ids])]


def _described(config: DataConfig) -> str:
    return json.dumps(dataclasses.asdict(resolve(config)), sort_keys=True)


@contextlib.contextmanager
def telling(public_only: bool) -> Iterator[None]:
    """Let messages say what examples hold only where they may."""
    try:
        yield
    except PrivateInputError as error:
        if not public_only:
            raise
        raise InputError(error.public) from None


@functools.lru_cache(maxsize=4)
def _load(described: str) -> Splits:
    config = merging.parse_options(json.loads(described), DataConfig, "data")
    return Splits(*(_seen(data, config, rows).take(rows) for data, rows in _cuts(config)))


def _cuts(config: DataConfig) -> tuple[tuple[ArrayDataset, Rows], tuple[ArrayDataset, Rows]]:
    """Return the split, as the source has it, that training examples and those of evaluation come from, and
    their rows in it."""
    root = Path(config.root or "")
    splits = SOURCES.make(Choice(config.name, config.options), root=root).load(root)
    train = splits.train
    if config.holdout_examples:
        if config.holdout_examples >= len(train):
            raise InputError(
                f"data.holdout_examples must be below the {len(train)} training examples of {config.name}, "
                f"got {config.holdout_examples}."
            )
        order = seeds.stream(0, "holdout").permutation(len(train))
        kept, held = np.split(order, [len(train) - config.holdout_examples])
        return (
            (train, np.sort(kept)[: _first(len(kept), config.train_examples, "data.train_examples", config)]),
            (train, np.sort(held)[: _first(len(held), config.test_examples, "data.test_examples", config)]),
        )
    n, m = (
        _first(len(train), config.train_examples, "data.train_examples", config),
        _first(len(splits.test), config.test_examples, "data.test_examples", config),
    )
    return (train, slice(0, n)), (splits.test, slice(0, m))


def _seen(data: ArrayDataset, config: DataConfig, rows: Rows) -> ArrayDataset:
    """Return the examples as a model sees them, in these rows."""
    if config.features is None:
        return data
    held = _file(data, config, rows).array()
    lost = isinstance(data.inputs, Pictures)
    return dataclasses.replace(data, inputs=held, mean=(), std=(), nan_is_lost=lost)


def _file(data: ArrayDataset, config: DataConfig, rows: Rows) -> FeatureFile:
    """Return the file of the features, with these rows in it; every cut of a data set has the same."""
    if config.features is None:
        raise InputError("data.features must name a map for there to be features, got null.")
    return features.file_of(config.features, data.inputs, rows, data.name)


def _first(left: int, n: int | None, setting: str, config: DataConfig) -> int:
    if n is not None and n > left:
        raise InputError(
            f"{setting} must be at most {left}, the examples {_called(config)} left, got {n}. "
            "Lower it, or leave it out to use them all."
        )
    return left if n is None else n


def _called(config: DataConfig) -> str:
    """What a message calls the data: by name, but for what was handed in, whose name is a digest."""
    return "the data handed in have" if given.is_given(config.name) else f"{config.name} has"
