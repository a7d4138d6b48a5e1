"""Tasks: losses against oracles written out, metrics against naive loops, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import tasks
from fedsim.data.targets import IGNORED, Targets
from fedsim.headline import RESERVED, Metric
from fedsim.merging import Choice
from fedsim.tasks import TASKS, Task
from fedsim.tasks.areas import area
from fedsim.tasks.classification import Classification
from fedsim.tasks.language_modelling import LanguageModelling
from fedsim.tasks.multi_label import MultiLabel
from fedsim.tasks.reconstruction import Reconstruction
from fedsim.tasks.regression import Regression
from fedsim.validate import InputError, PrivateInputError
from tests.conftest import small, train

RNG = np.random.default_rng(3)


def normal(*shape: int) -> Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


def measured(task: Task, outputs: Tensor, targets: Tensor, cut: int = 3) -> dict[str, float]:
    """The metrics over batches of `cut` examples."""
    meter = task.meter()
    for start in range(0, len(targets), cut):
        meter.add(outputs[start : start + cut], targets[start : start + cut])
    return meter.result()


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    norm = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - norm for x in row]


# --- losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_is_cross_entropy(smoothing: float) -> None:
    outputs, targets = normal(7, 4), torch.tensor([0, 3, 2, 2, 1, 0, 3])
    expected = []
    for row, wanted in zip(outputs.tolist(), targets.tolist(), strict=True):
        each = log_softmax(row)
        expected.append(-(1 - smoothing) * each[wanted] - smoothing * sum(each) / 4)
    found = Classification(label_smoothing=smoothing).loss(outputs, targets)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_multi_label_is_the_sum_of_binary_cross_entropies() -> None:
    outputs, targets = normal(6, 5), torch.from_numpy(RNG.integers(0, 2, (6, 5)).astype(np.uint8))
    expected = [
        sum(math.log1p(math.exp(x)) - y * x for x, y in zip(row, wanted, strict=True))
        for row, wanted in zip(outputs.tolist(), targets.tolist(), strict=True)
    ]
    np.testing.assert_allclose(MultiLabel().loss(outputs, targets).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["squared", "huber"])
def test_regression_is_of_scaled_differences(name: str) -> None:
    outputs, targets = 2 * normal(8, 3), 50 + 20 * normal(8, 3)
    expected = []
    for row, wanted in zip(outputs.tolist(), targets.tolist(), strict=True):
        apart = [abs(x - (y - 50) / 10) for x, y in zip(row, wanted, strict=True)]
        squared = [d * d / 2 if name == "squared" or d <= 1 else d - 0.5 for d in apart]
        expected.append(sum(squared) / 3)
    found = Regression(center=50.0, scale=10.0, loss_name=name).loss(outputs, targets)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_language_modelling_is_the_mean_over_places_that_count() -> None:
    outputs = normal(3, 4, 5)
    targets = torch.tensor([[1, 2, 4, 0], [3, IGNORED, IGNORED, 2], [IGNORED] * 4])
    expected = []
    for places, wanted in zip(outputs.tolist(), targets.tolist(), strict=True):
        each = [-log_softmax(row)[t] for row, t in zip(places, wanted, strict=True) if t != IGNORED]
        expected.append(sum(each) / len(each) if each else 0.0)
    np.testing.assert_allclose(LanguageModelling().loss(outputs, targets).numpy(), expected, rtol=1e-12)


# --- metrics --------------------------------------------------------------------------------------------


def test_accuracies_of_classes() -> None:
    outputs, targets = normal(20, 6), torch.from_numpy(RNG.integers(0, 6, 20))
    outputs[4, (targets[4] + 1) % 6] = math.nan  # another class's, and the own one the highest
    outputs[4, targets[4]] = 100.0
    outputs[5, targets[5]] = math.inf
    places = [
        sorted(row, reverse=True).index(row[t]) if all(map(math.isfinite, row)) else 6
        for row, t in zip(outputs.tolist(), targets.tolist(), strict=True)
    ]
    found = measured(Classification(top_k=3), outputs, targets)
    assert found["accuracy"] == pytest.approx(sum(p == 0 for p in places) / 20, rel=1e-12)
    assert found["top_3_accuracy"] == pytest.approx(sum(p < 3 for p in places) / 20, rel=1e-12)


def test_accuracies_of_labels_and_tokens() -> None:
    outputs, targets = normal(9, 3), torch.from_numpy(RNG.integers(0, 2, (9, 3)).astype(np.uint8))
    outputs[0] = torch.where(targets[0] > 0, 5.0, -5.0)
    outputs[1] = torch.where(targets[1] > 0, math.inf, -math.inf)
    right = [
        [math.isfinite(max(map(abs, row))) and (x > 0) == (y == 1) for x, y in zip(row, wanted, strict=True)]
        for row, wanted in zip(outputs.tolist(), targets.tolist(), strict=True)
    ]
    found = measured(MultiLabel(), outputs, targets)
    assert found["label_accuracy"] == pytest.approx(np.mean(right), rel=1e-12)
    assert found["exact_match"] == pytest.approx(np.mean([all(row) for row in right]), rel=1e-12)
    assert found["exact_match"] > 0

    texts, tokens = normal(2, 4, 5), torch.tensor([[1, 2, 4, 0], [3, IGNORED, IGNORED, 2]])
    for text, place in ((0, 0), (0, 1), (1, 0)):
        texts[text, place, tokens[text, place]] = 50.0
    for text, place in ((0, 2), (0, 3), (1, 3)):
        texts[text, place, (tokens[text, place] + 1) % 5] = 50.0
    assert measured(LanguageModelling(), texts, tokens)["token_accuracy"] == pytest.approx(
        (2 / 4 + 1 / 2) / 2
    )
    texts[0, 0, 0] = math.nan
    assert measured(LanguageModelling(), texts, tokens)["token_accuracy"] == pytest.approx(
        (1 / 4 + 1 / 2) / 2
    )


def test_errors_are_in_the_targets_own_unit() -> None:
    outputs, targets = normal(11, 2), 50 + 20 * normal(11, 2)
    apart = (outputs.numpy() * 10 + 50 - targets.numpy()).ravel()
    found = measured(Regression(center=50.0, scale=10.0, unit="years"), outputs, targets)
    assert found["rmse"] == pytest.approx(math.sqrt(sum(d * d for d in apart) / len(apart)), rel=1e-12)
    assert found["mae"] == pytest.approx(sum(map(abs, apart)) / len(apart), rel=1e-12)
    assert Regression(unit="years").chosen == Metric("rmse", "years", False)


def pairs(scores: np.ndarray, present: np.ndarray) -> float:
    """The share of pairs of an example with and one without the label that are in the right order."""
    good = [
        1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        for i in np.flatnonzero(present)
        for j in np.flatnonzero(~present)
    ]
    return float(np.mean(good))


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_the_area_counts_pairs_and_ties_by_half(levels: int) -> None:
    scores, present = RNG.integers(0, levels, 60).astype(np.float32), RNG.integers(0, 2, 60) > 0
    assert area(scores, present) == pytest.approx(pairs(scores, present), rel=1e-12)


def test_the_area_is_a_mean_over_labels_that_can_be_told() -> None:
    outputs, targets = normal(30, 3), torch.from_numpy(RNG.integers(0, 2, (30, 3)).astype(np.uint8))
    targets[:, 1] = 1
    columns = [pairs(outputs[:, c].float().numpy(), targets[:, c].numpy() > 0) for c in (0, 2)]
    assert measured(MultiLabel(), outputs, targets)["auc"] == pytest.approx(np.mean(columns), rel=1e-12)
    assert area(np.array([1.0, math.nan, 0.0]), np.array([True, False, False])) == 0.5
    assert area(np.array([1.0, math.nan, 0.0]), np.array([True, True, False])) == 0.5
    assert math.isnan(area(np.ones(2), np.array([True, True])))


def test_areas_weigh_by_how_many_have_a_label() -> None:
    outputs, targets = normal(40, 2), torch.zeros((40, 2), dtype=torch.uint8)
    targets[:5, 0], targets[:20, 1] = 1, 1
    each = [pairs(outputs[:, c].float().numpy(), targets[:, c].numpy() > 0) for c in (0, 1)]
    found = measured(MultiLabel(average="weighted"), outputs, targets)["auc"]
    assert found == pytest.approx((5 * each[0] + 20 * each[1]) / 25, rel=1e-12)


@pytest.mark.parametrize("average", ["macro", "weighted"])
def test_the_area_of_classes_is_of_probabilities_against_the_rest(average: str) -> None:
    """An offset an example leaves its probabilities as they are, and not the order of its logits."""
    outputs = normal(50, 3) + 5 * normal(50, 1)
    targets = torch.from_numpy(RNG.choice(3, 50, p=[0.7, 0.2, 0.1]))
    chances = torch.softmax(outputs, 1).numpy()
    each = [pairs(chances[:, c], targets.numpy() == c) for c in range(3)]
    weights = None if average == "macro" else np.bincount(targets.numpy(), minlength=3)
    task = TASKS.make(Choice("classification", {"auc": average, "headline": "auc"}))
    assert task.chosen == Metric("auc", "%")
    found = measured(task, outputs, targets)["auc"]
    assert found == pytest.approx(np.average(each, weights=weights), rel=1e-12)
    assert [m.name for m in Classification().all_metrics] == ["accuracy", "loss"]


# --- metrics of the user's, headline --------------------------------------------------------------------


@tasks.metric("years", higher_is_better=False)
def worst(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().amax(1)


def plain(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum()


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


def epsilon(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


HERE = "tests.unit.test_tasks"


def test_metrics_of_ones_own_have_unit_and_direction() -> None:
    options = {"metrics": [f"{HERE}:worst", f"{HERE}:plain"], "headline": "worst", "scale": 10.0}
    task = TASKS.make(Choice("regression", options))
    assert task.chosen == Metric("worst", "years", False)
    assert task.chosen.shown(1.25) == "1.25 years"
    assert [m.name for m in task.all_metrics] == ["rmse", "mae", "worst", "plain", "loss"]
    assert task.all_metrics[3] == Metric("plain", "", True)
    outputs, targets = normal(5, 2), normal(5, 2)
    expected = np.abs(10 * outputs.numpy() - targets.numpy()).max(axis=1).mean()
    assert measured(task, outputs, targets, 2)["worst"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": [f"{HERE}:accuracy"]}, "must have names of their own"),
        ({"metrics": [f"{HERE}:plain", f"{HERE}:plain"]}, "must have names of their own"),
        ({"metrics": [f"{HERE}:epsilon"]}, "a result has other numbers called epsilon"),
        ({"metrics": [f"{HERE}:RNG"]}, "must list functions"),
        ({"headline": "acuracy"}, "Did you mean 'accuracy'"),
        ({"top_k": 5}, "top_k must be between 1 and 4"),
        ({"label_smoothing": 1.5}, "label_smoothing must be"),
        ({"auc": "micro"}, "task.options.auc must be one of"),
        ({"top": 5}, "unknown key 'top'"),
    ],
)
def test_wrong_metrics_and_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TASKS.make(Choice("classification", options)).check(Targets("class", 4))


def test_a_metric_that_is_no_number_an_example_is_refused() -> None:
    task = Classification(metrics=[summed])
    with pytest.raises(InputError, match=r"summed must give one number an example, shape \(3,\)"):
        task.meter().add(normal(3, 2), torch.zeros(3, dtype=torch.long))


# --- targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS.own())
@pytest.mark.parametrize("kind", ["class", "labels", "values", "tokens"])
def test_targets_of_another_kind_are_refused(name: str, kind: str) -> None:
    task = TASKS.make(Choice(name))
    if task.kind == kind or name == "reconstruction":  # looks at no targets
        task.check(Targets(kind, 3))
        return
    with pytest.raises(
        InputError, match=f"must have targets of kind '{task.kind}', but the data has '{kind}'"
    ):
        task.check(Targets(kind, 3))


def test_more_labels_than_are_declared_are_refused_and_not_counted_in_public() -> None:
    targets = np.zeros((5, 20), np.uint8)
    targets[2, :17] = 1
    MultiLabel(labels_at_most=17).check_targets(targets)
    MultiLabel().check_targets(targets)
    with pytest.raises(PrivateInputError, match="got 17") as refused:
        MultiLabel(labels_at_most=3).check_targets(targets)
    assert "17" not in refused.value.public
    assert "labels_at_most=3" in refused.value.public


def test_strata_by_hand() -> None:
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]], np.uint8)
    assert MultiLabel().strata(labels).tolist() == [1, 0, 3]
    deciles = Regression().strata(np.arange(100.0)[::-1, None])
    assert np.bincount(deciles).tolist() == [10] * 10
    assert deciles[0] == 9
    assert LanguageModelling().strata(np.zeros((2, 3), np.int64)) is None
    assert Reconstruction().strata(np.zeros(3, np.int64)) is None, "of pictures with classes too"


def test_no_metric_has_the_name_of_another_number_of_a_run(tmp_path: Path) -> None:
    train(small("train.steps=2"), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    line = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    taken = {*result, *line["public"], *line["sensitive"]} - {"accuracy"}
    assert {name for name in taken if name.isidentifier()} <= RESERVED


def test_a_metric_that_writes_into_what_it_gets_changes_nothing() -> None:
    def greedy(outputs: Tensor, targets: Tensor) -> Tensor:
        outputs.zero_()
        targets.zero_()
        return outputs[:, 0]

    outputs, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    plain, with_own = Classification(), Classification(metrics=[greedy])
    found = with_own.all_measures(outputs.clone(), targets.clone())
    for name, values in plain.all_measures(outputs, targets).items():
        assert torch.equal(found[name], values)


class _Off:
    """What `_off` says of each example, on average."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.seen.append(_off(outputs, targets))

    def result(self) -> float:
        return float(torch.cat(self.seen).mean())


def _off(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean(1)


class _Tens(Classification):
    def predicted(self, outputs: Tensor) -> Tensor:
        return 10 * outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets / 10).square().sum(1)

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(outputs, targets)}


@pytest.mark.parametrize("kind", [_Tens, lambda **given: Regression(center=50.0, scale=10.0, **given)])
def test_metrics_of_both_kinds_get_what_is_predicted(kind: Any) -> None:
    task = kind(metrics=[_off, _Off])
    outputs, targets = torch.randn(20, 2), 50 + 10 * torch.randn(20, 2)
    meter = task.meter() if isinstance(task, Regression) else tasks.base.Means(task)
    held = tasks.base.WithGauges(task)
    for part in (slice(0, 7), slice(7, 20)):
        meter.add(outputs[part], targets[part])
        held.add(outputs[part], targets[part])
    wanted = float(_off(task.predicted(outputs), targets).mean())
    assert meter.result()["_off"] == pytest.approx(wanted)
    assert held.result()["_Off"] == pytest.approx(wanted)
    assert held.result()["_off"] == pytest.approx(wanted)
