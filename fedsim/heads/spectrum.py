"""Eigenvalues of a noisy symmetric matrix, and what its known noise says about the true ones.

All of it is post-processing of a released matrix G + E, with E the noise of a vector of `packing`, of
standard deviation s: eigenvalues of E alone fill the half circle of radius R = s sqrt(2 d).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim import validate
from fedsim.heads import packing
from fedsim.validate import InputError


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A symmetric matrix V diag(values) V^T.

    Attributes:
        values: (d,) float64; ascending in `of`.
        vectors: V (d, d) float64, orthonormal columns.
    """

    values: Tensor
    vectors: Tensor

    def matrix(self) -> Tensor:
        """Return the matrix (d, d)."""
        return (self.vectors * self.values) @ self.vectors.t()

    def projected(self) -> Spectrum:
        """Return the nearest positive semidefinite matrix (Higham 1988): negative values become 0."""
        return replace(self, values=self.values.clamp(min=0.0))

    def power(self, exponent: float, ridge: float = 0.0) -> Tensor:
        """Return (matrix + ridge I)^exponent, (d, d).

        Raises:
            InputError: values + ridge are not all positive.
        """
        return (self.vectors * self._lifted(ridge) ** exponent) @ self.vectors.t()

    def solve(self, right: Tensor, ridge: float = 0.0) -> Tensor:
        """Return W (k, d) with W (matrix + ridge I) = right (k, d), float64.

        Raises:
            InputError: values + ridge are not all positive.
        """
        return ((right.double() @ self.vectors) / self._lifted(ridge)) @ self.vectors.t()

    def shrunk(self, noise_std: float) -> Spectrum:
        """Return the matrix with values y above R put to sqrt(y^2 - R^2), and 0 in the place of others.

        A value l > R / 2 of a matrix of low rank appears at y = l + R^2 / (4 l), its vector turned; below
        it is lost in the noise. This is the best value for the turned vector in Frobenius norm
        (Benaych-Georges and Nadakuditi 2011; Gavish and Donoho 2017). For matrices of full rank see
        `denoised`.
        """
        edge = self._edge(noise_std)
        kept = (self.values.square() - edge**2).clamp(min=0.0).sqrt()
        return replace(self, values=torch.where(self.values > edge, kept, torch.zeros_like(kept)))

    def denoised(self, noise_std: float) -> Spectrum:
        """Return the matrix with the values that are best for these vectors, whatever the true spectrum.

        y_i - 2 v h(y_i) with v = R^2 / 4 and h(y) the mean over j of (y - y_j) / ((y - y_j)^2 + e^2), the
        real part of the Stieltjes transform at distance e = d^(-1/2) sqrt(v) from the axis (Bun, Allez,
        Bouchaud and Potters 2016, equation for additive Gaussian noise); then projected.
        """
        variance = self._edge(noise_std) ** 2 / 4
        width = (variance / len(self.values)) ** 0.5
        apart = self.values[:, None] - self.values
        drift = (apart / (apart.square() + width**2)).mean(1)
        return replace(self, values=(self.values - 2 * variance * drift).clamp(min=0.0))

    def _edge(self, noise_std: float) -> float:
        validate.positive(noise_std, "noise_std")
        return packing.noise_norm(noise_std, len(self.values))

    def _lifted(self, ridge: float) -> Tensor:
        lifted = self.values + ridge
        if not bool((lifted > 0).all()):
            raise InputError(
                f"the matrix plus ridge must be positive definite, got a smallest value of "
                f"{float(lifted.min()):.6g}. Raise the ridge, or project the matrix."
            )
        return lifted


def of(matrix: Tensor) -> Spectrum:
    """Return the spectrum of a symmetric matrix (d, d), by LAPACK in float64; its lower triangle is read.

    Raises:
        InputError: not square, or not finite.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not bool(torch.isfinite(matrix).all()):
        raise InputError(f"a matrix must be square and finite, got shape {tuple(matrix.shape)}.")
    values, vectors = torch.linalg.eigh(matrix.double())
    return Spectrum(values, vectors)


def of_packed(vector: Tensor) -> Spectrum:
    """Return the spectrum of a matrix packed as by `packing.pack`, (d (d + 1) / 2,)."""
    return of(packing.unpack(vector))
