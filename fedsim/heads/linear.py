"""Flat parameters of one linear layer, and the same as weights of rows with a constant entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.validate import InputError


@dataclass(frozen=True)
class LinearHead:
    """Weights (k, d0), then biases (k,), against W (k, d) of rows: a bias is the constant's weight times it.

    Attributes:
        outputs: k.
        features: d0.
        bias: constant entry of every row; 0 for none: d is then d0, and biases are 0.
    """

    outputs: int
    features: int
    bias: float

    @classmethod
    def of(cls, parameters: int, features: int, outputs: int, bias: float) -> LinearHead:
        """Return the layer of a model with so many parameters.

        Raises:
            InputError: a linear layer with a bias has another number.
        """
        if parameters != outputs * (features + 1):
            raise InputError(
                f"a linear head must have weights and biases of {features} features and {outputs} outputs, "
                f"{outputs * (features + 1)} numbers, but the model has {parameters}. Use model.name=linear."
            )
        return cls(outputs, features, bias)

    def rows(self, flat: Tensor) -> Tensor:
        """Return W (k, d) of flat parameters (k (d0 + 1),)."""
        split = self.outputs * self.features
        weights, biases = flat[:split].reshape(self.outputs, -1), flat[split:]
        return torch.cat([weights, biases[:, None] / self.bias], 1) if self.bias else weights

    def flat(self, rows: Tensor) -> Tensor:
        """Return flat parameters (k (d0 + 1),) of W (k, d)."""
        biases = rows[:, self.features] * self.bias if self.bias else rows.new_zeros(self.outputs)
        return torch.cat([rows[:, : self.features].reshape(-1), biases])
