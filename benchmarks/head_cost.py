"""What the sums and solves of private heads cost, beside the matrix-product rate of the same process.

    python -m benchmarks.head_cost --json results/head_cost.json [--threads 2]

Random features stand for real ones: nothing here depends on values. Rates count 2 n d^2 operations for second
moments although a symmetric product needs half of them, so that more than 100 % is possible.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import provenance
from fedsim.heads import solve, spectrum
from fedsim.heads.feature_covariance import FeatureCovariance, whitening
from fedsim.heads.gradient import Gradient
from fedsim.heads.logistic import Logistic
from fedsim.heads.moments import Moments
from fedsim.heads.newton import Newton
from fedsim.heads.rows import Rows

CASES = {"Fashion-MNIST": (60_000, 1280, 10), "a tenth of ImageNet": (128_116, 1280, 100)}
"""Examples, features, classes."""


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Return the shortest wall time of `repeats` calls, and what the last one gave."""
    best, made = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        made = call()
        best = min(best, time.perf_counter() - began)
    return best, made


def product_rate(features: Tensor) -> float:
    """Return operations a second of one plain product of the same shapes, X^T X, in float32."""
    seconds, _ = timed(lambda: features.t() @ features, 3)
    return 2.0 * features.numel() * features.shape[1] / seconds


def case(name: str, repeats: int) -> dict[str, Any]:
    """Return seconds by part of one case, and the share of the product rate that second moments reach."""
    examples, width, classes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(examples, width, generator=generator)
    labels = torch.from_numpy(np.arange(examples) % classes)
    rows, rate = Rows(20.0, 1.0), product_rate(features)
    moments, covariance = Moments(rows, width, classes), FeatureCovariance(rows, width)
    seconds: dict[str, float] = {}
    seconds["moments"], sums = timed(lambda: moments.sums(features, labels), repeats)
    seconds["covariance"], second = timed(lambda: covariance.sums(features)["second"], repeats)

    def solved() -> Tensor:
        found = spectrum.of_packed(sums["second"] / examples).denoised(1e-3)
        return solve.least_squares(found, sums["first"] / examples, solve.ridge(1e-3, width + 1))

    seconds["least squares, solved"], _ = timed(solved, repeats)
    seconds["map of rows"], mapping = timed(
        lambda: whitening(spectrum.of_packed(second / examples).denoised(1e-3), 1.0, 1e-3), repeats
    )
    gradient = Gradient(rows, Logistic(classes, "softmax"), 0.3, mapping)
    seconds["lengths of mapped rows"], lengths = timed(lambda: gradient.lengths(features), 1)
    weights = torch.zeros(classes, width + 1, dtype=torch.float64)
    seconds["a gradient"], _ = timed(
        lambda: gradient.mapped(gradient.sums(features, labels, weights, lengths)[0]), repeats
    )
    newton = Newton(rows, Logistic(classes, "softmax"), width, shared=True)
    seconds["first Newton sums"], _ = timed(lambda: newton.sums(features, labels, weights), repeats)
    operations = 2.0 * examples * (width + 1) ** 2
    return {
        "case": name,
        "examples": examples,
        "features": width,
        "classes": classes,
        "product_gflops": rate / 1e9,
        "of_product_rate": {part: operations / seconds[part] / rate for part in ("moments", "covariance")},
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    held = {
        "command": f"python -m benchmarks.head_cost --threads {options.threads} --repeats {options.repeats}",
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "rows": [case(name, options.repeats) for name in CASES],
    }
    options.json.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(held["rows"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
