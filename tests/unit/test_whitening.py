"""Whitening by other images against the matrix it stands for."""

from __future__ import annotations

import pytest
import torch

from fedsim.data import whitening


@pytest.mark.parametrize(("count", "width", "ridge"), [(5, 9, 0.5), (20, 30, 3.0), (2, 6, 0.01)])
def test_it_is_the_inverse_root_of_the_covariance_and_a_ridge(count: int, width: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(count)
    scales = torch.logspace(-2, 1, width, dtype=torch.float64)
    fitted, features = (
        torch.randn((n, width), generator=generator, dtype=torch.float64) * scales + 1 for n in (count, 7)
    )
    centred = fitted - fitted.mean(0)
    covariance = centred.t() @ centred / count
    values, vectors = torch.linalg.eigh(torch.eye(width, dtype=torch.float64) + covariance / ridge)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.t()
    found = whitening.fit(fitted, ridge)(features)
    torch.testing.assert_close(found, (features - fitted.mean(0)) @ root, rtol=1e-8, atol=1e-8)


def test_it_keeps_the_dtype() -> None:
    fitted = torch.randn((4, 6), generator=torch.Generator().manual_seed(0))
    assert whitening.fit(fitted, 1.0)(fitted).dtype == torch.float32
