"""Symmetric matrices as vectors, so that lengths stay.

A matrix (d, d) becomes its upper triangle, row by row, with the entries off the diagonal times sqrt(2): the
L2 norm of the vector is the Frobenius norm of the matrix, and that of x x^T is exactly |x|^2.

Why the root. Unscaled, x x^T has squared norm (|x|^4 + sum of x_i^4) / 2, which is |x|^4 where x lies along
an axis: the bound is C^2 either way. Noise of standard deviation s in every entry of the vector is in the
matrix s on the diagonal and, with the root, s / sqrt(2) elsewhere, without it s: the root halves the variance
for the same bound. It is also the noise of the paper, N(0, s^2) in all d^2 entries, made symmetric by
averaging with its transpose, at half the numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsim.validate import InputError


def length(width: int) -> int:
    """Return d (d + 1) / 2."""
    return width * (width + 1) // 2


def width(length: int) -> int:
    """Return the d of vectors of that length.

    Raises:
        InputError: no d has it.
    """
    found = (math.isqrt(8 * length + 1) - 1) // 2
    if found * (found + 1) // 2 != length or length < 1:
        raise InputError(f"a packed symmetric matrix must have d (d + 1) / 2 entries, got {length}.")
    return found


def pack(matrix: Tensor) -> Tensor:
    """Return the vector (..., d (d + 1) / 2) of symmetric matrices (..., d, d); only upper triangles are
    read.

    Raises:
        InputError: not square.
    """
    rows = matrix.shape[-1]
    if matrix.dim() < 2 or matrix.shape[-2] != rows:
        raise InputError(f"a symmetric matrix must be square, got shape {tuple(matrix.shape)}.")
    upper = torch.triu_indices(rows, rows, device=matrix.device)
    return matrix[..., upper[0], upper[1]] * _scales(upper, matrix)


def unpack(vector: Tensor) -> Tensor:
    """Return the symmetric matrices (..., d, d) of vectors made by `pack`, noise and all."""
    rows = width(vector.shape[-1])
    upper = torch.triu_indices(rows, rows, device=vector.device)
    values = vector / _scales(upper, vector)
    matrix = vector.new_zeros(*vector.shape[:-1], rows, rows)
    matrix[..., upper[1], upper[0]] = values
    matrix[..., upper[0], upper[1]] = values
    return matrix


def noise_norm(noise_std: float, width: int) -> float:
    """Return what the largest eigenvalue of the unpacked noise is near: s sqrt(2 d).

    Entries off the diagonal have variance v = s^2 / 2, and the eigenvalues of such a matrix fill
    [-2 sqrt(v d), 2 sqrt(v d)] as a half circle (Wigner 1955); the largest is above by O(d^(-2/3)) of it.
    """
    return noise_std * math.sqrt(2 * width)


def _scales(upper: Tensor, like: Tensor) -> Tensor:
    root = like.new_tensor(math.sqrt(2))
    return torch.where(upper[0] == upper[1], torch.ones_like(root), root)
