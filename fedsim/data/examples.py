"""Examples with targets, the splits of a data set, and what a model sees of them.

Inputs are an array, or pictures that stay in their files (`fedsim.data.pictures`). Whoever wants examples
asks `ArrayDataset.read`, which serves both; nobody else indexes inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data.chosen import Rows
from fedsim.data.pictures.pictures import Fingerprints, Pictures
from fedsim.data.targets import Targets
from fedsim.data.token_rows import TokenRows
from fedsim.validate import InputError, PrivateInputError

Inputs = NDArray[Any] | Pictures
Wanted = NDArray[Any] | TokenRows
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Examples with targets, and what is public about them.

    Attributes:
        name: the data set's name in the registry.
        inputs: (N, H, W, C) uint8 images, or pictures that are decoded when they are read; (N, ...) float16,
            float32 or float64 features; or, where there is a `vocabulary`, (N, places) integer tokens;
            read-only.
        targets: (N, ...) as `declared` has them, read-only; classes beside pictures in the dtype that they
            come in, which may be smaller than int64; or tokens in a file, of which rows can be read.
            `wanted_of` gives what a loss takes.
        groups: (N,) integer natural owner of each example, int64 or, beside pictures, as they come; or None
            where the data set has no owners.
        declared: form of the targets: declared, since the examples are private and the model's shape is not.
        mean, std: C numbers each, applied to pixels on the [0, 1] scale: published constants for the standard
            sets, 0.5 and 0.5 for other images (statistics of private images would leak), empty for others.
        vocabulary: number of tokens there can be in the inputs, declared; None: the inputs are no tokens.
        whole: (N,) which inputs of an array are there: others could not be read, and contribute nothing;
            None: all of them. Pictures that stay in their files are asked when they are read.
        nan_is_lost: whether the inputs are features of pictures, NaN for one that cannot be decoded.

    Raises:
        InputError: shapes, dtypes, lengths or targets that do not fit together. Whether features are finite
            is for whoever reads or makes them (`finite`); an example that is not contributes a zero gradient.
    """

    name: str
    inputs: Inputs
    targets: Wanted
    groups: NDArray[Any] | None
    declared: Targets
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    vocabulary: int | None = None
    whole: NDArray[np.bool_] | None = None
    nan_is_lost: bool = False

    def __post_init__(self) -> None:
        _check_inputs(self.name, self.inputs, self.vocabulary)
        n = len(self.inputs)
        lazy = isinstance(self.inputs, Pictures)
        if isinstance(self.inputs, np.ndarray):
            object.__setattr__(self, "inputs", _read_only(self.inputs))
        if isinstance(self.targets, TokenRows):  # what its tokens are was decided when it was made
            assert (len(self.targets), self.targets.vocabulary) == (n, self.declared.size), self.name
        else:
            checked = self.declared.checked(self.targets, n, self.name, as_they_are=lazy)
            object.__setattr__(self, "targets", checked)
        if self.groups is not None:
            owners = _integers(self.name, "groups", self.groups, n, as_they_are=lazy)
            object.__setattr__(self, "groups", _read_only(owners))
        channels = self.inputs.shape[-1] if self.is_image else 0
        if (len(self.mean), len(self.std)) != (channels, channels) or not all(s > 0 for s in self.std):
            raise InputError(
                f"{self.name}: mean and std must hold {channels} numbers, std positive, "
                f"got {self.mean} and {self.std}."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def digest(self) -> str:
        """Return a digest of inputs and targets, as hexadecimal digits; of private examples it is private."""
        found = hashlib.blake2b(digest_size=16)
        for values in (self.identity, self.targets):
            found.update(f"{values.dtype.str} {values.shape}".encode())
            for start in range(0, len(values), 4096):  # they may be mapped from a file
                found.update(np.ascontiguousarray(values[start : start + 4096]).data)
        return found.hexdigest()

    def digest_of_targets(self) -> str:
        """Return a digest of the targets alone, whatever dtype classes come in, as hexadecimal digits."""
        found = hashlib.blake2b(f"{self.declared.kind} {self.targets.shape}".encode(), digest_size=16)

        def take_in(part: NDArray[Any]) -> None:
            found.update(np.ascontiguousarray(self._wide(part)).data)

        self.of_targets(take_in)
        return found.hexdigest()

    @property
    def identity(self) -> NDArray[Any] | Fingerprints:
        """What tells the inputs from others, (N, ...): themselves, or digests of the files of pictures."""
        return self.inputs.fingerprints if isinstance(self.inputs, Pictures) else self.inputs

    def read(self, rows: Rows, workers: int | None = None) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return inputs of these rows, (n, ...), and which are there, (n,); None: all of them.

        Args:
            rows: which; ids are rows.
            workers: threads that decode pictures; None: one a core.

        Returns:
            Also zeros, for pictures that cannot be decoded.
        """
        if isinstance(self.inputs, Pictures):
            found, whole = self.inputs.read(rows, workers)
            return found, None if whole.all() else whole
        return self.inputs[rows], self.there(rows)

    def there(self, rows: Rows) -> NDArray[np.bool_] | None:
        """Return which of these rows of an array are there, (n,); None: all of them."""
        there = None if self.whole is None else self.whole[rows]
        if self.nan_is_lost:
            assert isinstance(self.inputs, np.ndarray)
            first = self.inputs[(rows, *(0 for _ in self.inputs.shape[1:]))]  # no more of a row is read
            there = ~np.isnan(first)
        return None if there is None or there.all() else there

    def blank(self, count: int) -> NDArray[Any]:
        """Return (count, ...) zeros in the form of the inputs; no example is read."""
        return np.zeros((count, *self.inputs.shape[1:]), self.inputs.dtype)

    def blank_targets(self, count: int) -> NDArray[Any]:
        """Return (count, ...) zeros in the form that `wanted_of` starts from."""
        return np.zeros_like(self._wide(self.targets[:1]), shape=(count, *self.targets.shape[1:]))

    def wanted_of(self, rows: Rows) -> NDArray[Any]:
        """Return targets of these rows, (n, ...), classes as int64."""
        return self._wide(self.targets[rows])

    def of_targets(self, function: Callable[[NDArray[Any]], Result]) -> list[Result]:
        """Return what a function gives for targets (n, ...) in their order, a part of them at a time: all at
        once, or, of tokens in a file, as many as may be in memory."""
        if isinstance(self.targets, TokenRows):
            return [function(block) for block in self.targets.blocks()]
        return [function(self.targets)]

    def _wide(self, targets: NDArray[Any]) -> NDArray[Any]:
        return targets.astype(np.int64, copy=False) if self.declared.kind == "class" else targets

    @property
    def is_image(self) -> bool:
        """Whether inputs are uint8 images (augmentable, normalised) rather than features or tokens."""
        return self.inputs.dtype == np.uint8 and self.vocabulary is None

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example as a model sees it: (C, H, W) for images, the feature shape otherwise."""
        shape = self.inputs.shape[1:]
        return (shape[2], shape[0], shape[1]) if self.is_image else shape

    def take(self, rows: Rows) -> ArrayDataset:
        """Return the given rows as a data set; a slice shares memory, an index array copies, but no
        picture."""
        groups = None if self.groups is None else self.groups[rows]
        inputs = self.inputs.take(rows) if isinstance(self.inputs, Pictures) else self.inputs[rows]
        targets = self.targets.take(rows) if isinstance(self.targets, TokenRows) else self.targets[rows]
        whole = None if self.whole is None else self.whole[rows]
        return dataclasses.replace(self, inputs=inputs, targets=targets, groups=groups, whole=whole)


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
        if (a.declared, a.targets.shape[1:], a.vocabulary) != (b.declared, b.targets.shape[1:], b.vocabulary):
            raise InputError(
                f"{a.name}: train and test must declare the same targets and vocabulary, got {a.declared} of "
                f"shape {a.targets.shape[1:]} and {b.declared} of shape {b.targets.shape[1:]}."
            )


def normalise(
    batch: NDArray[Any] | torch.Tensor,
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
        (..., C, H, W) tensor (x / 255 - mean) / std for images; features unchanged but for their dtype;
        tokens as int64. Each value depends on its own pixel alone, so batching never changes it.
    """
    # Copies an array: those of the data set are read-only.
    tensor = batch.to(device) if isinstance(batch, torch.Tensor) else torch.tensor(batch, device=device)
    if dataset.vocabulary is not None:
        return tensor.to(torch.int64)
    if not dataset.is_image:
        return tensor.to(dtype)
    mean, std = (
        (_of_channels.__wrapped__ if torch.compiler.is_compiling() else _of_channels)(
            tuple(map(float, values)), dtype, torch.device(device)
        )  # what a program's tracing makes is of no use to anybody else
        for values in (dataset.mean, dataset.std)
    )
    planes = tensor.movedim(-1, -3).to(dtype, memory_format=torch.contiguous_format)
    return planes.div_(255.0).sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _of_channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One value a channel, (C, 1, 1), kept: what is sent to a GPU is waited for."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def wanted(
    targets: NDArray[Any] | torch.Tensor, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return targets as a loss takes them: values in `dtype`, classes and tokens int64, labels uint8."""
    tensor = targets if isinstance(targets, torch.Tensor) else torch.tensor(targets)
    return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)


def _check_inputs(name: str, inputs: Inputs, vocabulary: int | None) -> None:
    if isinstance(inputs, Pictures):
        assert vocabulary is None, f"{name}: pictures are no tokens"
        return
    if vocabulary is not None:
        validate.positive(vocabulary, f"{name}: vocabulary")
        if inputs.dtype.kind not in "iu" or inputs.ndim != 2 or 0 in inputs.shape[1:]:
            raise InputError(
                f"{name}: inputs with a vocabulary must be integer tokens of shape (N, places), got "
                f"{inputs.dtype} of shape {inputs.shape}."
            )
        if inputs.size and not 0 <= int(inputs.min()) <= int(inputs.max()) < vocabulary:
            expected = f"{name}: tokens must lie in 0 .. {vocabulary - 1} (as many are declared)"
            raise PrivateInputError(
                f"{expected}, got {inputs.min()} .. {inputs.max()}. Declare as many as there can be.",
                f"{expected}.",
            )
        return
    image = inputs.dtype == np.uint8 and inputs.ndim == 4
    features = inputs.dtype in (np.float16, np.float32, np.float64) and inputs.ndim >= 2
    if not (image or features) or 0 in inputs.shape[1:]:
        raise InputError(
            f"{name}: inputs must be uint8 images of shape (N, H, W, C) or float16, float32 or float64 "
            f"features of shape (N, d), got {inputs.dtype} of shape {inputs.shape}. "
            "Grey images need a last axis of length 1; tokens a declared vocabulary."
        )


def _integers(name: str, what: str, values: NDArray[Any], n: int, as_they_are: bool = False) -> NDArray[Any]:
    values = np.asarray(values)
    whole = np.issubdtype(values.dtype, np.integer)
    if values.shape != (n,) or not whole or (n and int(values.max()) > np.iinfo(np.int64).max):
        raise InputError(
            f"{name}: {what} must be {n} integers below 2**63, one per example, "
            f"got {values.dtype} of shape {values.shape}."
        )
    return values if as_they_are else values.astype(np.int64, copy=False)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()  # the caller's own array keeps its flag
    view.flags.writeable = False
    return view
