"""Images in folders: ROOT/train/CLASS/FILE and ROOT/test/CLASS/FILE.

The folders in train are the classes, empty ones too: their list is public, which images they hold is not.
No file is skipped but hidden ones (.NAME); how one is read is said in fedsim.data.sources.image_files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.pictures.index import narrow
from fedsim.data.sources import SOURCES, folders
from fedsim.data.sources.image_files import ImageFiles
from fedsim.data.targets import Targets
from fedsim.partitions.base import as_numbers
from fedsim.validate import InputError, with_place


@SOURCES.register("image_folder")
@dataclass(frozen=True)
class ImageFolder(ImageFiles):
    """Images in folders, ROOT/train/CLASS/FILE and ROOT/test/CLASS/FILE, brought to one size by a rule.

    Attributes:
        classes: number of classes, to be checked; None: the folders in train.
        owners: what ROOT/train/CLASS/OWNER/FILE means: True: the folder below a class is the natural owner.
        train_folder, test_folder: names of the two, where they are others than train and test, such as val.
    """

    classes: int | None = None
    owners: bool = False
    train_folder: str = "train"
    test_folder: str = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given in (("train_folder", self.train_folder), ("test_folder", self.test_folder)):
            if not given or Path(given).is_absolute() or ".." in Path(given).parts:
                raise InputError(f"data.options.{name} must be a folder below data.root, got {given!r}.")

    def load(self, root: Path) -> Splits:
        """See `Source.load`: the order is that of class and path.

        Raises:
            InputError: folders that are missing, empty or do not fit together, and files that are no image,
                of another size than the first where no size is set, or without a plain 8-bit meaning; names
                the file.
        """
        train_root, test_root = root / self.train_folder, root / self.test_folder
        names = _classes(train_root)
        if self.classes not in (None, len(names)):
            raise InputError(
                f"data.options.classes must be {len(names)}, the class folders in {train_root}, or null, "
                f"got {self.classes}. A class without training images is an empty folder there."
            )
        if unknown := sorted(set(_classes(test_root)) - set(names)):
            raise InputError(
                f"image_folder: {test_root} must have class folders of {train_root} only, got "
                f"{', '.join(unknown)} more. Remove them, or add them to train (empty folders will do)."
            )
        train = self._split(train_root, names, None)
        return Splits(train, self._split(test_root, names, train.inputs.shape[1:]))

    def _split(self, folder: Path, names: Sequence[str], shape: tuple[int, ...] | None) -> ArrayDataset:
        """Return the examples of a split; images that are decoded at once have `shape`, by default that of
        the first. The files of one class at a time are listed."""
        listed = [functools.partial(folders.files, folder / name, "image_folder") for name in names]
        if not any(files() for files in listed):
            raise InputError(
                f"image_folder: {folder} must hold at least one image at CLASS/FILE, got none. Set data.root "
                "to a folder with train and test, each with one folder per class."
            )
        inputs, counts = self.images(
            folder, listed, shape, lambda _, error: with_place(error, before="image_folder: "), str(folder)
        )
        labels = np.repeat(np.arange(len(names), dtype=narrow(len(names))), counts)
        groups = self._owners(folder, [path for files in listed for path in files()]) if self.owners else None
        declared = Targets("class", len(names), tuple(names))
        return ArrayDataset("image_folder", inputs, labels, groups, declared, *self.constants)

    def _owners(self, folder: Path, files: Sequence[Path]) -> NDArray[np.int64]:
        """The number of each file's owner among the sorted names of the folders below the classes."""
        parts = [path.relative_to(folder).parts for path in files]
        if short := [path for path, found in zip(files, parts, strict=True) if len(found) < 3]:
            raise InputError(
                f"image_folder: with data.options.owners files must lie at CLASS/OWNER/FILE, got {short[0]}."
            )
        return as_numbers([found[1] for found in parts])


def _classes(folder: Path) -> list[str]:
    """The folders in `folder`, sorted; hidden ones are not looked at."""
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"image_folder: expected images at {folder}/CLASS/FILE (png, jpg, ...), got: {error}. "
            "Set data.root to a folder with train and test, each with one folder per class."
        ) from error
    names = [p.name for p in entries if p.is_dir()]
    if not names or len(names) != len(entries):
        found = next((p.name for p in entries if not p.is_dir()), "nothing")
        raise InputError(
            f"image_folder: {folder} must hold one folder per class and nothing else, got {found}. "
            "Images belong at CLASS/FILE."
        )
    return names
