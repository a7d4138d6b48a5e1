"""Accuracy at each holder's own mix of labels, where labels or holders have nothing to be tested on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.partition import Partition
from fedsim.data.targets import Targets
from fedsim.engine.scoring import holder_scores
from fedsim.tasks.classification import Classification


class Zero(nn.Module):
    """Says label 0 of everything: right on all of label 0, wrong on all of label 1."""

    def __init__(self) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.eye(3, dtype=inputs.dtype)[torch.zeros(len(inputs), dtype=torch.long)]


def data(labels: list[int]) -> ArrayDataset:
    features = np.zeros((len(labels), 2), np.float32)
    return ArrayDataset("toy", features, np.array(labels, dtype=np.int64), None, Targets("class", 3))


def scores(train: list[int], holders: list[int], test: list[int]) -> dict[str, float]:
    partition = Partition(np.array(holders), 1 + max(holders))
    found = holder_scores(Zero(), Classification(), Splits(data(train), data(test)), partition, torch.float32)
    return found.value


def test_holders_without_tested_labels_are_left_out() -> None:
    """Label 2 has no test example. Four holders: (0, 0), (2, 2), (0, 1, 2), (1): at 1, not at all, 1/2, 0."""
    found = scores([0, 0, 2, 2, 0, 1, 2, 1], [0, 0, 1, 1, 2, 2, 2, 3], test=[0, 0, 1])
    expected = {f"{q}%": np.percentile([1.0, 0.5, 0.0], q) for q in (5, 50, 95)}
    assert found == pytest.approx(expected)
    assert found["50%"] != pytest.approx(np.percentile([1.0, 0.0, 0.5, 0.0], 50)), "nor as 0"


def test_with_no_holder_left_there_is_no_number() -> None:
    assert scores([2, 2], [0, 1], test=[0, 1]) == {}
