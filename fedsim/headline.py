"""A number by which released models are judged, and how people read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.validate import InputError

RESERVED = frozenset(
    {
        "assumed_public",
        "backend",
        "clip_fraction",
        "clip_norm",
        "code_hash",
        "commit",
        "config",
        "epsilon",
        "examples",
        "examples_per_holder_at_most",
        "hardware",
        "headline",
        "holder_scores",
        "holders",
        "largest_holder",
        "learning_rate",
        "loss",
        "mean_gradient_norm",
        "n_delta",
        "nodes",
        "noise_multiplier",
        "noise_source",
        "noise_std_of_mean",
        "noise_to_signal",
        "non_finite_gradients",
        "parameters",
        "parameters_sha256",
        "peak_memory_bytes",
        "physical_batch_size",
        "public_only",
        "realised_batch_size",
        "seconds",
        "seconds_by_part",
        "seed",
        "sensitive",
        "step",
        "steps",
        "steps_repeated_to_rounding",
        "stopped_by_budget",
        "method",
        "sum_norm",
        "task",
        "title",
        "train_loss",
        "trust",
        "tuning",
    }
)
"""Names that result.json or the numbers of a step have already: no metric is called so."""


@dataclass(frozen=True)
class Metric:
    """A number by which released models are judged.

    Attributes:
        name: as results, plots and TensorBoard call it.
        unit: "%" for a fraction that is shown in per cent; any other word is shown behind the number.
        higher_is_better: the direction.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a metric must have a name, got {self.name!r}.")

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Metric:
        """Return the headline of a result.json, or of what `fedsim repeat` writes."""
        return cls(**result["headline"])

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be shown in the unit."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def label(self) -> str:
        """Name and unit, as on an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def number(self, value: float | None) -> str:
        """Return a value as people read it, without its unit; "-" for none."""
        if value is None:
            return "-"
        return f"{100 * value:.2f}" if self.unit == "%" else f"{value:.4g}"

    def shown(self, value: float | None) -> str:
        """Return a value as people read it, with its unit; "-" for none."""
        if value is None:
            return "-"
        return self.number(value) + (self.unit if self.unit == "%" else f" {self.unit}".rstrip())
