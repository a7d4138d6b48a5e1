"""A source of examples: SVMlight and LIBSVM files, lines of `label [qid:owner] index:value ... # note`.

Guarantee: features and classes are declared, never counted, because what the examples hold is private and
the shape of the model is not. An error about the content of a file says what was expected, and says what it
found only where it may (PrivateInputError).
Source: Joachims, https://www.cs.cornell.edu/people/tj/svm_light/ ; indices start at 1.
"""

from dataclasses import dataclass, field

import numpy as np

import fedsim
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.rows import classes, number, numbered
from fedsim.data.sources import Source
from fedsim.validate import PrivateInputError


@dataclass(frozen=True)
class SvmLight(Source):
    """Sparse rows of numbers with a class each.

    Attributes:
        features: how many there can be.
        classes: the labels there can be, in the order of their numbers.
        train, test: files below data.root.
        owners: whether qid names the holder of a row, for federation.partition=natural.
    """

    features: int = 0
    classes: list[str] = field(default_factory=list)
    train: str = "train.svm"
    test: str = "test.svm"
    owners: bool = False

    def __post_init__(self):
        if self.features < 1 or len(self.classes) < 2:
            raise fedsim.InputError("data.options must declare features (a number) and classes (a list).")

    def load(self, root):
        """The training split, which is private, and the split a run is evaluated on."""
        return Splits(self._split(root / self.train, self.owners), self._split(root / self.test, False))

    def inputs(self, path):
        """Names and inputs of rows to predict; their labels are not read."""
        _, _, inputs = self._read(path)
        return [str(row) for row in range(len(inputs))], inputs

    def _split(self, path, owners):
        labels, names, inputs = self._read(path)
        targets, declared = classes(labels, self.classes, f"{path}: labels")
        groups = numbered(names, f"{path}: qid") if owners else None
        return ArrayDataset("svmlight", inputs, targets, groups, declared)

    def _read(self, path):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise fedsim.InputError(f"{path} must be a readable text file: {error}.") from error
        rows = [words for words in (line.partition("#")[0].split() for line in lines) if words]
        inputs, names = np.zeros((len(rows), self.features), np.float32), [""] * len(rows)
        for row, (_, *cells) in enumerate(rows):
            for name, _, cell in (cell.partition(":") for cell in cells):
                if name == "qid":
                    names[row] = cell
                else:
                    inputs[row, self._place(name, path)] = self._value(cell, path)
        return [words[0] for words in rows], names, inputs

    def _place(self, name, path):
        if not name.isdecimal() or not 1 <= int(name) <= self.features:
            expected = f"{path}: indices must be 1 .. {self.features}, as data.options.features declares"
            raise PrivateInputError(f"{expected}, got {name!r}.", f"{expected}.")
        return int(name) - 1

    def _value(self, cell, path):
        value = number(cell, f"{path}: values")
        if not abs(value) <= float(np.finfo(np.float32).max):  # nor is what is no number
            expected = f"{path}: values must be finite numbers"
            raise PrivateInputError(f"{expected}, got {cell!r}.", f"{expected}.")
        return value
