"""Symmetric matrices as vectors, and what is known of their noise (budget: 10 s)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.heads import packing, spectrum
from fedsim.validate import InputError


def symmetric(seed: int, width: int, batch: tuple[int, ...] = ()) -> Tensor:
    made = torch.from_numpy(np.random.default_rng(seed).normal(size=(*batch, width, width)))
    return made + made.transpose(-1, -2)


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([(), (3,), (2, 2)]))
@settings(deadline=None, derandomize=True)
def test_packed_and_back(seed: int, width: int, batch: tuple[int, ...]) -> None:
    matrix = symmetric(seed, width, batch)
    vector = packing.pack(matrix)
    assert vector.shape == (*batch, packing.length(width))
    assert packing.width(packing.length(width)) == width
    torch.testing.assert_close(packing.unpack(vector), matrix, rtol=1e-14, atol=0)
    torch.testing.assert_close(packing.pack(packing.unpack(vector)), vector, rtol=1e-14, atol=0)
    frobenius = torch.linalg.matrix_norm(matrix)
    torch.testing.assert_close(torch.linalg.vector_norm(vector, dim=-1), frobenius, rtol=1e-12, atol=0)


def test_what_no_matrix_packs_to_is_refused() -> None:
    for length in (0, 2, 4, 11):
        with pytest.raises(InputError, match="d \\(d \\+ 1\\) / 2 entries"):
            packing.unpack(torch.zeros(length))
    with pytest.raises(InputError, match="square"):
        packing.pack(torch.zeros(2, 3))


def test_the_root_halves_the_noise_of_the_unscaled_triangle() -> None:
    """Both have bound C^2, so the same noise an entry; the matrix that comes out differs."""
    width, std = 300, 2.0
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=packing.length(width))) * std
    ours = packing.unpack(noise)
    upper = torch.triu_indices(width, width)
    unscaled = torch.zeros(width, width, dtype=torch.float64)
    unscaled[upper[0], upper[1]] = noise
    unscaled = unscaled + unscaled.triu(1).t()
    assert float(ours.diagonal().std()) == pytest.approx(std, rel=0.15)
    off = ours[upper[0], upper[1]][upper[0] < upper[1]]
    assert float(off.std()) == pytest.approx(std / 2**0.5, rel=0.02)
    norms = [float(torch.linalg.matrix_norm(m, 2)) for m in (ours, unscaled)]
    assert norms[0] == pytest.approx(packing.noise_norm(std, width), rel=0.05)
    assert norms[1] / norms[0] == pytest.approx(2**0.5, rel=0.02)


@given(st.integers(0, 10**6), st.integers(2, 8))
@settings(deadline=None, derandomize=True)
def test_projection_is_the_nearest_semidefinite_matrix(seed: int, width: int) -> None:
    matrix = symmetric(seed, width)
    found = spectrum.of(matrix).projected()
    assert float(torch.linalg.eigvalsh(found.matrix()).min()) >= -1e-12 * float(matrix.norm())
    # Moreau: what was taken off is negative semidefinite, and orthogonal to what stays.
    taken = matrix - found.matrix()
    assert float(torch.linalg.eigvalsh(taken).max()) <= 1e-12 * float(matrix.norm())
    assert abs(float((taken * found.matrix()).sum())) <= 1e-9 * float(matrix.square().sum())
    torch.testing.assert_close(spectrum.of(matrix).matrix(), matrix, rtol=0, atol=1e-11)


def noisy(width: int, rank: int, std: float, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    basis = torch.linalg.qr(torch.from_numpy(rng.normal(size=(width, rank)))).Q
    true = (basis * torch.linspace(1.5, 6, rank) * packing.noise_norm(std, width)) @ basis.t()
    return true, true + packing.unpack(torch.from_numpy(rng.normal(size=packing.length(width))) * std)


@pytest.mark.parametrize("rank", [5, 150])
def test_known_noise_makes_the_matrix_better(rank: int) -> None:
    true, seen = noisy(200, rank, 1.0, 3)
    found = spectrum.of(seen)
    errors = {
        name: float((made.matrix() - true).norm())
        for name, made in [
            ("projected", found.projected()),
            ("shrunk", found.shrunk(1.0)),
            ("denoised", found.denoised(1.0)),
        ]
    }
    assert errors["denoised"] < (0.5 if rank == 5 else 0.98) * errors["projected"]
    if rank == 5:
        assert errors["shrunk"] < 0.5 * errors["projected"]


def test_noise_alone_is_seen_as_nothing() -> None:
    found = spectrum.of(packing.unpack(torch.from_numpy(np.random.default_rng(5).normal(size=20_100)) * 3))
    assert float(found.shrunk(3.3).values.max()) == 0
    assert float(found.denoised(3.0).matrix().norm()) < 0.15 * float(found.projected().matrix().norm())


def test_a_matrix_that_is_not_positive_is_not_solved_with() -> None:
    found = spectrum.of(torch.diag(torch.tensor([-2.0, 1.0])))
    with pytest.raises(InputError, match="Raise the ridge"):
        found.solve(torch.ones(1, 2), 1.0)
    torch.testing.assert_close(found.solve(torch.ones(1, 2), 3.0), torch.tensor([[1.0, 0.25]]).double())
    with pytest.raises(InputError, match="square and finite"):
        spectrum.of(torch.full((2, 2), torch.nan))
