"""Arrays and tensors that are handed in from Python, as arrays of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.validate import InputError


def as_array(given: Any, what: str) -> NDArray[Any]:
    """Return an array, a tensor, or nested lists as an array.

    Args:
        given: what was handed in.
        what: it is, for messages.

    Raises:
        InputError: a masked array, whose hidden values would be used; a tensor of a dtype that numpy does not
            have; parts of unequal shapes.
    """
    if isinstance(given, np.ma.MaskedArray):
        raise InputError(
            f"{what} must be without a mask, for the values it hides would be used. Leave those examples "
            "out, or fill them: array.filled(...)."
        )
    if isinstance(given, torch.Tensor):
        held = given.detach().cpu()
        try:
            return held.numpy()
        except TypeError as error:
            raise InputError(
                f"{what} must be of a dtype that numpy has, got {held.dtype}. Convert it: tensor.float()."
            ) from error
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InputError(f"{what} must be one array, got {type(given).__name__}: {error}.") from error
