"""Rules with a bound for each layer or group: bounds, sensitivity, what is refused, what is reported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import loading
from fedsim.clipping import CLIPPING, clip_rule
from fedsim.clipping.base import BoundedRule
from fedsim.clipping.grouped import ClipGroup, GroupedClip
from fedsim.clipping.normalised import NormalisedClip
from fedsim.clipping.per_layer import PerLayerClip
from fedsim.config import Config, ModelConfig
from fedsim.engine.contributions import statistics
from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.grads.bookkeeping.tape import Tape
from fedsim.grads.clip import clip_and_sum
from fedsim.merging import Choice
from fedsim.models import build
from fedsim.privacy import events
from fedsim.types import ClippedSum, StepTask
from fedsim.validate import InputError
from tests.conftest import small
from tests.unit.test_grads import small as small_cnn

HERE = "tests.unit.test_clip_groups"
NAMES = ("token", "conv.weight", "conv.gain", "block.norm.weight", "block.norm.bias", "head.weight")


def test_a_layer_is_what_one_module_owns() -> None:
    assert PerLayerClip(1.0).group_of(NAMES) == (0, 1, 1, 2, 2, 3)
    resnet = build(ModelConfig("wide_resnet", {"depth": 10, "width": 1}), (3, 8, 8), 5, seed=0)
    names = [name for name, _ in resnet.named_parameters()]
    groups = PerLayerClip(1.0).group_of(names)
    gains = [name for name in names if name.endswith(".gain")]
    assert gains
    for name in gains:  # weight and gain of a standardised convolution share a bound
        assert groups[names.index(name)] == groups[names.index(name.replace("gain", "weight"))]


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    st.floats(1e-3, 1e3),
    st.lists(st.floats(0.0, 1e8), min_size=6, max_size=6),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_sensitivity_is_the_norm_of_the_bounds(
    weights: list[float], clip_norm: float, norms: list[float]
) -> None:
    groups = {str(i): ClipGroup([str(i)], w) for i, w in enumerate(weights)}
    count = len(weights)
    row = torch.tensor([norms[:count]], dtype=torch.float64)
    for rule in (GroupedClip(clip_norm, groups), PerLayerClip(clip_norm)):
        bounds = rule.bounds(count)
        assert rule.sensitivity == clip_norm
        assert math.hypot(*bounds) == pytest.approx(clip_norm, rel=1e-12)
        left = rule.coefficients(row) * row
        assert (left <= torch.tensor(bounds, dtype=torch.float64) * (1 + 1e-12)).all()
        assert left.norm().item() <= clip_norm * (1 + 1e-12)
    for group, bound in zip(groups.values(), GroupedClip(clip_norm, groups).bounds(count), strict=True):
        assert bound / clip_norm == pytest.approx(group.weight / math.hypot(*weights), rel=1e-12)


def test_coefficients_and_clipped() -> None:
    rule = GroupedClip(5.0, {"a": ClipGroup(["a"], 3.0), "b": ClipGroup(["b"], 4.0)})
    assert rule.bounds(2) == pytest.approx((3.0, 4.0), rel=1e-15)
    norms = torch.tensor([[1.0, 8.0], [6.0, 4.0], [0.0, 3.0], [math.nan, 1.0], [1.0, math.inf]]).double()
    got = rule.coefficients(norms)
    expected = [[1.0, 4 / 8.000001], [3 / 6.000001, 4 / 4.000001], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=1e-7, atol=0)
    assert rule.clipped(norms)[:3].tolist() == [True, True, False]
    assert rule.coefficients(norms.float()).dtype == torch.float32
    with pytest.raises(InputError, match="2 groups, got 3"):
        rule.coefficients(torch.ones(1, 3))


def test_materialised_gradients_by_hand() -> None:
    gradients = [
        torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64),
        torch.tensor([[0.0], [12.0]], dtype=torch.float64),
    ]
    rule = PerLayerClip(math.sqrt(2.0))  # 1 for each of two
    total, norms = clip_and_sum(gradients, rule, (0, 1))
    torch.testing.assert_close(norms, torch.tensor([[5.0, 0.0], [0.5, 12.0]], dtype=torch.float64))
    expected = torch.tensor([0.6 + 0.3, 0.8 + 0.4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


ALL = {"all": ClipGroup(["*"])}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"head": ClipGroup(["head.*"])}, "no clip group matches token, conv.weight"),
        ({**ALL, "head": ClipGroup(["head.*"])}, r"several clip groups match head.weight \(all, head\)"),
        ({**ALL, "tail": ClipGroup(["tail.*"])}, "none for tail.*Trainable parameters: token, conv"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused(groups: dict[str, ClipGroup], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GroupedClip(1.0, groups).group_of(NAMES)


def test_a_long_list_of_parameters_is_cut() -> None:
    with pytest.raises(InputError, match=r"p11 and 88 more"):
        GroupedClip(1.0, {"head": ClipGroup(["head"])}).group_of([f"p{i}" for i in range(100)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerLayerClip(0.0), "clip_norm"),
        (lambda: GroupedClip(-1.0, ALL), "clip_norm"),
        (lambda: GroupedClip(1.0, {}), "at least one group"),
        (lambda: GroupedClip(1.0), "at least one group"),
        (lambda: GroupedClip(1.0, {"a": ClipGroup(["*"], 0.0)}), r"groups\.a\.weight must be"),
        (lambda: GroupedClip(1.0, {"a": ClipGroup([])}), r"groups\.a\.parameters must list patterns"),
    ],
)
def test_rules_refuse_values(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy.clipping=grouped"], "privacy.clipping.options.groups must name at least one group"),
        (["privacy.clipping.options.groups={}", "privacy.clipping=grouped"], "must name at least one group"),
        (
            ["privacy.clipping.options.groups={a: {parameters: ['*']}}"],
            "options of flat: unknown key 'groups",
        ),
        (
            ["privacy.clipping=per_layer", "privacy.clipping.options.groups={a: {parameters: ['*']}}"],
            "options of per_layer: unknown key 'groups",
        ),
        (
            ["privacy.clipping=normalised", "privacy.clipping.options.groups={a: {parameters: ['*']}}"],
            "options of normalised: unknown key 'groups",
        ),
        (
            ["privacy.clipping=grouped", "privacy.clipping.options.groups={a: {parameters: []}}"],
            "a.parameters must list",
        ),
        (
            ["privacy.clipping=grouped", "privacy.clipping.options.groups={a: {weight: 1}}"],
            "a.parameters must list",
        ),
        (
            ["privacy.clipping=grouped", "privacy.clipping.options.groups={a: '*'}"],
            "groups.a must be a mapping",
        ),
        (
            [
                "privacy.clipping=grouped",
                "privacy.clipping.options.groups={a: {parameters: ['*'], weight: 0}}",
            ],
            "groups.a.weight must be a positive",
        ),
        (
            [
                "privacy.clipping=grouped",
                "privacy.clipping.options.groups={a: {parameters: ['*'], wight: 2}}",
            ],
            "Did you mean 'weight'",
        ),
        (
            [
                "privacy.clipping=grouped",
                "privacy.clipping.options.groups={a: {parameters: ['*'], weight: heavy}}",
            ],
            "'weight' must be a number.*got 'heavy'",
        ),
        (["privacy.clipping=per_layr"], "Did you mean 'per_layer'"),
        (["privacy.clipping={name: normalised, options: {gama: 0.1}}"], "unknown key 'gama'.*'gamma'"),
        (
            ["privacy.clipping={name: normalised, options: {gamma: much}}"],
            "'gamma' must be a number.*got 'much'",
        ),
        (["privacy.clipping={name: normalised, options: {gamma: 0}}"], "options.gamma must be a positive"),
        (["privacy.clipping={name: flat, options: {clip_norm: 3}}"], "must leave out clip_norm"),
    ],
)
def test_configurations_that_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(*overrides))


@pytest.mark.parametrize("setting", ["privacy.clip_groups={a: {parameters: ['*']}}", "privacy.clipng=flat"])
def test_there_is_no_second_setting(setting: str) -> None:
    with pytest.raises(InputError, match="unknown key"):
        loading.load("base", [setting])


GROUPED = (
    "privacy.clipping=grouped",
    "privacy.clip_norm=2.0",
    "privacy.clipping.options.groups={body: {parameters: ['layers.0.*'], weight: 3}, "
    "head: {parameters: ['layers.2.*']}}",
)


def test_the_rule_of_a_configuration() -> None:
    config = loading.load("base", GROUPED)
    groups = {"body": ClipGroup(["layers.0.*"], 3.0), "head": ClipGroup(["layers.2.*"], 1.0)}
    assert clip_rule(config.privacy) == GroupedClip(2.0, groups)
    layered = loading.load("base", ["privacy.clipping=per_layer", "privacy.clip_norm=2.0"])
    assert clip_rule(layered.privacy) == PerLayerClip(2.0)
    assert set(CLIPPING.names()) == {"flat", "normalised", "per_layer", "grouped"}
    for name in CLIPPING.own():
        if name != "grouped":
            assert clip_rule(loading.load("base", [f"privacy.clipping={name}"]).privacy).sensitivity == 1.0
    smooth = ["privacy.clipping={name: normalised, options: {gamma: 0.5}}", "privacy.clip_norm=2"]
    assert clip_rule(loading.load("base", smooth).privacy) == NormalisedClip(2.0, 0.5)


@dataclass(frozen=True)
class Half(BoundedRule):
    """Halves what is no longer than twice the bound; drops the rest.

    Attributes:
        times: how often.
    """

    times: int = 1

    def coefficients(self, norms: Tensor) -> Tensor:
        """See `ClipRule.coefficients`."""
        return (norms <= 2 * self.clip_norm).to(norms.dtype) * 0.5**self.times


def halved(clip_norm: float, times: int = 1) -> Half:
    return Half(clip_norm, times)


def no_rule(clip_norm: float) -> float:
    return clip_norm


@pytest.mark.parametrize("name", ["Half", "halved"])
def test_a_rule_from_outside_is_given_the_bound_and_its_options(name: str) -> None:
    """A dataclass with typed options, or whatever is called."""
    rule = CLIPPING.make(Choice(f"{HERE}:{name}", {"times": 3}), clip_norm=2.0)
    assert rule == Half(2.0, 3)
    assert CLIPPING.make(Choice(f"{HERE}:{name}"), clip_norm=0.5) == Half(0.5)
    with pytest.raises(InputError, match=r"privacy\.clipping\.options must leave out clip_norm"):
        CLIPPING.make(Choice(f"{HERE}:{name}", {"clip_norm": 3.0}), clip_norm=2.0)
    with pytest.raises(InputError, match="tims"):
        CLIPPING.make(Choice(f"{HERE}:{name}", {"tims": 3}), clip_norm=2.0)


def test_what_makes_no_rule_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"must name a fedsim\.clipping\.base\.ClipRule.*no_rule gives float"
    ):
        CLIPPING.make(Choice(f"{HERE}:no_rule"), clip_norm=2.0)


def test_options_that_are_listed_are_those_that_can_be_given() -> None:
    listed = {name: options for name, (_, options) in CLIPPING.described().items()}
    assert listed == {"flat": {}, "grouped": {"groups": {}}, "normalised": {"gamma": 0.01}, "per_layer": {}}


def test_configurations_with_groups_survive_a_round_trip(tmp_path: Path) -> None:
    config = loading.load("base", GROUPED)
    assert loading.from_json(config.to_json()) == config
    (tmp_path / "c.yaml").write_text(loading.to_yaml(config), encoding="utf-8")
    assert loading.load(tmp_path / "c.yaml").digest() == config.digest()
    assert config.digest() != loading.load("base", ["privacy.clip_norm=2.0"]).digest()


def test_groups_are_checked_against_the_model_before_anything_starts() -> None:
    groups = "privacy.clipping.options.groups={a: {parameters: ['layers.0.*']}}"
    with pytest.raises(InputError, match=r"no clip group matches layers\.2"):
        prepare(small("privacy.clipping=grouped", groups))


@pytest.mark.parametrize("clipping", [["privacy.clipping=per_layer"], GROUPED], ids=["per_layer", "grouped"])
def test_updates_of_holders_are_not_clipped_by_group(clipping: list[str]) -> None:
    with pytest.raises(InputError, match=r"clips updates flat.*whole update"):
        prepare(small("preset=dp_fedavg", *clipping))


def test_the_plan_keeps_the_sensitivity_and_the_event() -> None:
    mechanism = prepare(small("privacy.clipping=per_layer")).mechanism
    assert mechanism.method.at.clip == PerLayerClip(0.5)
    release = mechanism.release()
    assert release.statistic.main.bound == 0.5
    assert release.noise_stds == {"sum": 0.5}
    assert mechanism.event_at(0) == events.gaussian_step(1.0, mechanism.sampling_rate)


def _clipped_by_definition(config: Config, node: Node, ids: Any, task: Any) -> int:
    """Count examples with a layer above its bound, from unclipped gradients of one example at a time."""
    loose = PerLayerClip(1e9)
    count = 0
    sizes = [p.numel() for p in node.model.parameters()]
    groups = loose.group_of([name for name, _ in node.model.named_parameters()])
    bound = config.privacy.clip_norm / math.sqrt(max(groups) + 1)
    for i in range(len(ids)):
        parts = node.clipped_sum(ids[i : i + 1], task, loose).sum.split(sizes)
        squares = [0.0] * (max(groups) + 1)
        for part, group in zip(parts, groups, strict=True):
            squares[group] += part.double().square().sum().item()
        count += any(math.sqrt(s) > bound for s in squares)
    return count


def test_the_reported_count_is_of_examples_with_a_part_above_its_bound() -> None:
    config = small("privacy.clipping=per_layer", "privacy.clip_norm=12.0", "engine.physical_batch_size=7")
    node = Node(config, 0, config.seed)
    keys = {name: bytes(32) for name in ("draw", "availability", "augment")}
    task = StepTask(step=0, wave=0, sampling_rate=0.5, keys=keys)
    ids = node.ids[:40]
    rule = node.method.at.clip
    result = node.clipped_sum(ids, task, rule)
    expected = _clipped_by_definition(config, node, ids, task)
    assert statistics(result)["clipped"] == expected
    _, together = node.clipped_sums(ids, task, rule)
    assert statistics(together)["clipped"] == expected
    assert 0 < expected < 40
    assert expected != int((result.norms > rule.sensitivity).sum())  # what flat clipping would report
    for nothing in (node.clipped_sum(ids[:0], task, rule), node.clipped_sums(ids[:0], task, rule)[1]):
        assert statistics(nothing)["clipped"] == 0


def test_examples_that_are_not_finite_do_not_count_as_clipped() -> None:
    norms = torch.tensor([2.0, math.inf, 2.0], dtype=torch.float64)
    result = ClippedSum(torch.zeros(1), 3, 1.0, norms, norms, torch.tensor([False, True, True]))
    assert statistics(result)["clipped"] == 1
    assert statistics(ClippedSum(torch.zeros(1), 3, 1.0, norms, norms))["clipped"] == 2


def test_the_tape_knows_the_group_of_a_parameter_by_its_order() -> None:
    model = small_cnn()
    names = [name for name, _ in model.named_parameters()]
    tape = Tape(model, dict(model.named_parameters()), 3, 0, 1, PerLayerClip(1.0).group_of(names))
    found: dict[str, int] = {name: tape.clip_groups[id(p)] for name, p in model.named_parameters()}
    assert list(found.values()) == list(PerLayerClip(1.0).group_of(names))
    assert [total.shape for total in tape.total] == [(3,)] * (max(found.values()) + 1)
    assert len(Tape(model, dict(model.named_parameters()), 3, 0, 1).total) == 1
