"""Random features over scattering: the kernel they stand for, and what they may depend on (budget: 15 s)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedsim.config import DataConfig
from fedsim.data import datasets, features, random_features, scattering
from fedsim.merging import Choice


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.array(datasets.load(DataConfig(test_examples=300)).test.inputs)


@pytest.fixture(scope="module")
def lifted(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return torch.cat(list(random_features.lifted(images))).double().numpy()


def expected_kernel(cosine: float, points: int = 401) -> tuple[float, float, float]:
    """Mean, variance and covariance of max(0, u - t), max(0, v - t) for unit normals of a correlation."""
    grid = np.linspace(-6, 6, points)
    weights = np.exp(-(grid**2) / 2)
    weights /= weights.sum()
    first = np.maximum(0, grid - random_features.THRESHOLD)
    second = np.maximum(
        0,
        cosine * grid[:, None] + math.sqrt(max(0.0, 1 - cosine**2)) * grid[None] - random_features.THRESHOLD,
    )
    mean = float(weights @ first)
    return (
        mean,
        float(weights @ first**2) - mean**2,
        float((weights * first) @ second @ weights) - mean**2,
    )


def test_inner_products_are_those_of_the_kernel(
    images: NDArray[np.uint8], lifted: NDArray[np.float64]
) -> None:
    """A correlation over 6,000 features has standard error below 0.013; the bound is over 4 of them."""
    scattered = torch.from_numpy(np.concatenate(list(scattering.compute(images[:20])))).double()
    normed = torch.group_norm(scattered, scattered.shape[1] // 3).flatten(1)
    unit = (normed / normed.norm(dim=1, keepdim=True)).numpy()
    from_linear = []
    for i in range(0, 20, 2):
        _, variance, covariance = expected_kernel(float(unit[i] @ unit[i + 1]))
        found = lifted[i] @ lifted[i + 1] / random_features.WIDTH
        assert found == pytest.approx(covariance / variance, abs=0.06)
        from_linear.append(abs(covariance / variance - float(unit[i] @ unit[i + 1])))
    assert max(from_linear) > 0.12  # the same bound would reject a linear map


def test_rows_are_standardised_before_whitening(lifted: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(lifted.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(lifted.std(1), 1, atol=1e-3)


def test_whitening_takes_off_what_all_images_share(
    images: NDArray[np.uint8], lifted: NDArray[np.float64]
) -> None:
    """No image of the data shapes the map, yet it shortens their mean and their largest variance."""
    whitened = np.concatenate(list(random_features.compute(images))).astype(np.float64)
    share = [np.square(rows.mean(0)).sum() / np.square(rows).sum(1).mean() for rows in (lifted, whitened)]
    largest = [np.linalg.norm(rows - rows.mean(0), 2) ** 2 for rows in (lifted, whitened)]
    assert share[1] < 0.7 * share[0]
    assert largest[1] < 0.3 * largest[0]


def test_features_depend_on_the_image_alone(images: NDArray[np.uint8]) -> None:
    together = np.concatenate(list(random_features.compute(images)))
    alone = np.concatenate(list(random_features.compute(images[250:260])))
    np.testing.assert_allclose(alone, together[250:260], atol=2e-5)


def test_they_are_a_feature_map_of_the_registry(
    images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    stored = features.of_images(Choice("scattering_random"), images[:8])
    assert stored.shape == (8, random_features.WIDTH)
    fresh = next(iter(random_features.compute(images[:8])))
    np.testing.assert_allclose(stored.astype(np.float64), fresh, rtol=1e-3, atol=1e-4)
