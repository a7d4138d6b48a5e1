"""The data set that a configuration names, opened once per process.

`load` returns the training and evaluation split that a `DataConfig` names. Images stay uint8 until
`examples.normalise` turns one physical batch into a float tensor, so a node holds one byte per pixel and
nothing is decoded twice. The row of an example in the training split is its global id: draws, augmentations
and partitions are all keyed by it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np

from fedsim import merging, seeds
from fedsim.config import DataConfig
from fedsim.data import features
from fedsim.data.examples import ArrayDataset, Splits
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
    from a cache on disk that the first call fills.

    Raises:
        InputError: unknown name, files missing or malformed, or more examples asked for than there are. With
            `public_only` its message says nothing of what examples hold.
    """
    try:
        return _load(json.dumps(dataclasses.asdict(resolve(config)), sort_keys=True))
    except PrivateInputError as error:
        if not public_only:
            raise
        raise InputError(error.public) from None


@functools.lru_cache(maxsize=4)
def _load(described: str) -> Splits:
    config = merging.parse_options(json.loads(described), DataConfig, "data")
    root = Path(config.root)
    splits = SOURCES.make(Choice(config.name, config.options), root=root).load(root)
    train, test = splits.train, splits.test
    if config.features is not None:  # of the whole set, so that every cut of it shares one cached file
        train, test = (_featurised(split, config.features) for split in (train, test))
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


def _featurised(data: ArrayDataset, choice: Choice) -> ArrayDataset:
    return dataclasses.replace(data, inputs=features.of_images(choice, data.inputs), mean=(), std=())


def _first(data: ArrayDataset, n: int | None, name: str) -> ArrayDataset:
    if n is None:
        return data
    if n > len(data):
        raise InputError(
            f"{name} must be at most {len(data)}, the examples {data.name} has left, got {n}. "
            "Lower it, or leave it out to use them all."
        )
    return data.take(slice(0, n))
