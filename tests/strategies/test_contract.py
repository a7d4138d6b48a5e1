"""What every combination of the axes must satisfy; a new variant is picked up by its file."""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fedsim import loading, presets
from fedsim.config import CONFIG_DIR, Config
from fedsim.engine.experiment import prepare
from fedsim.flower.client_app import app
from fedsim.mechanism import Mechanism
from fedsim.method import Method
from fedsim.privacy import accountant, events, ledger
from fedsim.samplers import SAMPLERS
from fedsim.strategies import STRATEGIES
from fedsim.types import StepTask
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train
from tests.strategies.combinations import AXES, EVERY, PRIVATE, VALID, Combination, name_of, of, reasons
from tests.strategies.small_data import shrunk

DELTA = 1e-5
combinations = functools.partial(pytest.mark.parametrize, "chosen", ids=name_of)

# Options that make another mechanism of a combination: it must satisfy the same.
FORMS: dict[str, tuple[Combination, str]] = {
    "local steps": (
        ("local", "gradient", "poisson", "independent"),
        "strategy.options={local_steps: 3, local_learning_rate: 0.5}",
    ),
    "adaptive": (
        ("central", "holder_update", "poisson", "independent"),
        "query.options={target_quantile: 0.5, count_noise: 2}",
    ),
    "top up": (("shares", "gradient", "poisson", "independent"), "strategy.options={on_shortfall: top_up}"),
}
forms = pytest.mark.parametrize(
    ("chosen", "form"),
    [(chosen, "") for chosen in PRIVATE] + list(FORMS.values()),
    ids=[*map(name_of, PRIVATE), *FORMS],
)

# Whole runs, broken and resumed: a sampler is another one where the server sees exact sums of gradients or
# updates; elsewhere it is the same code on other draws.
WHOLE = [c for c in PRIVATE if c[2] == "poisson" or (c[0] == "central" and c[1] != "moments")]
whole_runs = pytest.mark.parametrize(
    ("chosen", "form"),
    [(chosen, "") for chosen in WHOLE] + list(FORMS.values()),
    ids=[*map(name_of, WHOLE), *FORMS],
)


class Flaky:
    """A ClientApp whose node 1 raises on chosen train messages."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails = fails
        self.asked = 0

    def __call__(self, message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            self.asked += 1
            if self.fails(self.asked):
                raise OSError("disk of this holder is gone")
        return app(message, context)


def formed(chosen: Combination, form: str, *overrides: str) -> Config:
    return of(chosen, *([form] if form else []), *overrides)


def few(chosen: Combination) -> str:
    """A batch in which nobody is; under passes, a step of a pass with more steps than there are units."""
    return f"train.expected_batch_size={0.01 if chosen[2] == 'passes' else 1e-6}"


def start_of(config: Config) -> torch.Tensor:
    held = prepare(config).model.state_dict()
    return torch.cat([held[name].flatten() for name in sorted(held)])


@pytest.fixture(scope="module")
def few_pixels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same 40 images of 49 pixels: equal to the last bit or to rounding is that at any size."""
    return shrunk(tmp_path_factory.mktemp("images"), 40, 10, 7)


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, few_pixels: list[str]
) -> Callable[[str, str], torch.Tensor]:
    """The parameters that the non-private run of a query and a sampler ends in, trained once."""

    @functools.cache
    def parameters(query: str, sampler: str) -> torch.Tensor:
        config = of(("nonprivate", query, sampler, "independent"), "model.dtype=float64", *few_pixels)
        folder = tmp_path_factory.mktemp("plain")
        train(config, folder)
        assert torch.max(torch.abs(final(folder) - start_of(config))) > 1e-3
        return final(folder)

    return parameters


def test_the_product_has_every_variant_in_a_combination_that_runs() -> None:
    for place, registry in enumerate(AXES.values()):
        assert {combination[place] for combination in VALID} == set(registry.own())


@combinations([c for c in EVERY if reasons(c)])
def test_what_does_not_go_together_is_refused_with_the_reason(chosen: Combination) -> None:
    with pytest.raises(InputError) as refused:
        prepare(of(chosen))
    assert any(reason in str(refused.value) for reason in reasons(chosen)), str(refused.value)


@pytest.mark.parametrize("name", list(STRATEGIES.own()))
def test_a_trust_model_says_what_it_trusts(name: str) -> None:
    trust = STRATEGIES.own()[name]
    for text in (trust.trusted, trust.sent, trust.noise_added, trust.dropout_policy):
        assert text
    assert trust.__module__ == f"fedsim.strategies.{name}", "one file a trust model"


@pytest.mark.parametrize("axis", list(AXES))
def test_a_variant_says_where_it_is_from(axis: str) -> None:
    for variant in AXES[axis].own().values():
        assert variant.__doc__
        module = importlib.import_module(variant.__module__).__doc__ or ""
        assert re.search(r"Source:|et al. \d{4}|\d{4}\)", module), variant


SMOKE = sorted(path.stem for path in (CONFIG_DIR / "smoke").glob("*.yaml"))


def test_every_preset_has_a_smoke_file_that_names_it() -> None:
    """In the file itself: one that leaves its method to the defaults would test another under its name."""
    said = {name: OmegaConf.load(CONFIG_DIR / "smoke" / f"{name}.yaml") for name in SMOKE}
    for name in presets.names(CONFIG_DIR):
        assert OmegaConf.select(said[name], "preset") == name
    for name, text in said.items():
        assert "preset" in text or any(axis in text for axis in AXES), name


@pytest.mark.parametrize("name", SMOKE)
def test_learns_on_its_smoke_config(name: str, tmp_path: Path) -> None:
    path = CONFIG_DIR / "smoke" / f"{name}.yaml"
    config = loading.load(path, ["monitor.progress=false", "monitor.tensorboard=false"])
    said = OmegaConf.load(path)
    for axis in AXES:
        wanted = OmegaConf.select(said, axis)
        wanted = OmegaConf.select(wanted, "name") if OmegaConf.is_config(wanted) else wanted
        assert wanted in (None, getattr(config, axis).name), "it runs what it names"
    result = train(config, tmp_path)
    assert result["method"] == (
        OmegaConf.select(said, "preset") if name in said.get("preset", "") else result["method"]
    )
    assert result["accuracy"] > 0.5, "ten balanced classes: chance is 0.1"


@pytest.mark.usefixtures("epsilon_takes_no_time")
@forms
def test_vanishing_noise_and_clipping_equal_the_non_private_run_on_the_same_draws(
    chosen: Combination,
    form: str,
    tmp_path: Path,
    plain: Callable[[str, str], torch.Tensor],
    few_pixels: list[str],
) -> None:
    if "local_steps" in form:
        pytest.skip("its non-private form is written out in test_local_dpsgd")
    # Above every row of 49 pixels and a one; its square is the bound on second moments.
    clip = 1e4 if chosen[1] in ("gradient", "holder_update") else 8
    loose = [f"privacy.clip_norm={clip}", "privacy.noise_multiplier=1e-14", "model.dtype=float64"]
    more = [] if "target_quantile" not in form else ["query.options.quantile_learning_rate=1e-12"]
    train(formed(chosen, form, *loose, *more, *few_pixels), tmp_path)
    assert torch.max(torch.abs(final(tmp_path) - plain(chosen[1], chosen[2]))) <= 1e-9


@forms
def test_the_event_has_a_finite_epsilon_by_both_accountants(chosen: Combination, form: str) -> None:
    mechanism = prepare(formed(chosen, form)).mechanism
    for kind in ("pld", "rdp"):
        value = accountant.epsilon(mechanism.total_event(1), DELTA, kind, mechanism.unit).value
        assert value is not None
        assert 0 < value < math.inf


@forms
def test_the_target_is_met_by_what_is_released(chosen: Combination, form: str) -> None:
    target = ["privacy.noise_multiplier=null", "privacy.target_epsilon=3", "privacy.accountant=rdp"]
    mechanism = prepare(formed(chosen, form, *target)).mechanism
    reached = accountant.epsilon(mechanism.total_event(mechanism.steps), DELTA, "rdp", mechanism.unit).value
    assert reached is not None
    assert 2.99 < reached <= 3.0


@forms
def test_the_recorded_event_is_of_the_rate_at_which_units_take_part(chosen: Combination, form: str) -> None:
    mechanism = prepare(formed(chosen, form)).mechanism
    participation = mechanism.participation
    assert mechanism.budget.family.period == participation.period
    event = mechanism.total_event(participation.period)
    assert (events.relation(event) == events.REPLACE) == (participation.sample is not None)
    found = events.releases(event)
    assert {release.sampling_rate for release in found} == {participation.rate}


@pytest.mark.parametrize("batch", [10, 5, 40])
@pytest.mark.parametrize("sampler", list(SAMPLERS.own()))
def test_units_take_part_as_the_sampler_says(sampler: str, batch: int) -> None:
    """In one step of a cycle at most, there at the stated rate, and never closer than stated; 1e-7."""
    if sampler == "cyclic" and batch == 40:
        pytest.skip("two groups cannot both be whole")
    config = of(("central", "gradient", sampler, "independent"), f"train.expected_batch_size={batch}")
    mechanism, method = prepare(config).mechanism, Method.of(config)
    says, cycles, units = mechanism.participation, 60, 4000
    taken = np.zeros((cycles * says.period, units), dtype=bool)
    for step in range(len(taken)):
        task = StepTask(step, 0, mechanism.sampling_rate, method.keys(11, step))
        taken[step] = method.selected(task, np.arange(units), units)
        backwards = method.selected(task, np.arange(units)[::-1].copy(), units)
        assert np.array_equal(taken[step], backwards[::-1]), "whoever else is asked about"
    once = taken.reshape(cycles, says.period, units).sum(axis=1)
    assert once.max() <= 1
    if says.sample is not None:
        assert (taken.sum(axis=1) == units * says.share).all()
    assert abs(once.mean() - says.rate) <= 5.4 * math.sqrt(says.rate * (1 - says.rate) / once.size) + 1e-12
    assert abs(taken.mean() - says.share) <= 5.4 * math.sqrt(says.share / taken.size) + 0.02 * says.share
    unit, step = np.argwhere(taken.T).T
    gaps = np.diff(step)[np.diff(unit) == 0]
    assert gaps.min() >= says.separation


@pytest.mark.usefixtures("epsilon_takes_no_time")
@whole_runs
def test_an_empty_draw_is_an_ordinary_step(
    chosen: Combination, form: str, tmp_path: Path, few_pixels: list[str]
) -> None:
    if chosen[2] == "fixed_size":
        pytest.skip("no draw is empty")
    slow = ["optimizer.learning_rate=1e-9"] if chosen[1] in ("gradient", "holder_update") else []
    config = formed(chosen, form, few(chosen), *slow, *few_pixels)
    assert train(config, tmp_path)["steps"] == 6
    assert ledger.read(tmp_path / "ledger.jsonl").steps == 6
    assert torch.max(torch.abs(final(tmp_path) - start_of(config))) > 0, "noise is added to an empty sum"


@pytest.mark.usefixtures("epsilon_takes_no_time")
@whole_runs
def test_a_node_that_fails_is_asked_again_and_a_broken_run_goes_on_exactly(
    chosen: Combination, form: str, tmp_path: Path, few_pixels: list[str]
) -> None:
    config = formed(chosen, form, *few_pixels)
    train(config, tmp_path / "unbroken")
    train(config, tmp_path / "once", client=Flaky(lambda n: n == 3))
    assert torch.equal(final(tmp_path / "once"), final(tmp_path / "unbroken"))
    with pytest.raises(RunError, match="disk of this holder is gone"):
        train(config, tmp_path / "twice", client=Flaky(lambda n: n >= 4))
    assert not (tmp_path / "twice" / "result.json").exists()
    train(config, tmp_path / "twice", resume=True)
    assert torch.equal(final(tmp_path / "twice"), final(tmp_path / "unbroken"))
    assert ledger.read(tmp_path / "twice" / "ledger.jsonl").steps == 6


# What one unit adds at most to each part of a step, at clip norm 1/2: by hand, not asked of the query.
BOUNDS: dict[str, list[dict[str, float]]] = {
    "gradient": [{"sum": 0.5}],
    "holder_update": [{"sum": 0.5}],
    "moments": [{"second": 0.25, "first": 0.5}],
    # Softmax of 10 classes: at zero weights residuals (0.1, ..., -0.9), curvatures 0.1 * 0.9 of every class;
    # later residuals of norm root 2 at most, and curvatures of three classes of chance 1/3.
    "newton": [
        {"gradient": 0.9**0.5 * 0.5, "hessian": 0.09 * 0.25},
        {"gradient": 2**0.5 * 0.5, "hessian": (4 / 27) ** 0.5 * 0.25},
    ],
    "feature_covariance": [{"second": 0.25}, {"sum": 2**0.5 * 100.0}],
}


def assert_noise_is_that_of_the_event(
    chosen: Combination, mechanism: Mechanism, step: int, seen: dict[str, np.ndarray]
) -> None:
    """The parts' noise as it reached the learner is together one release of the recorded noise multiplier:
    not missing, not twice, not of the batch. Every holder's under local trust; a little more under shares,
    where rounding costs. False alarm 2e-9 each: 7,850 numbers tell a standard deviation to 5 %."""
    first = step - step % mechanism.participation.period  # a cycle's release is recorded at its first step
    (recorded,) = events.releases(mechanism.event_at(first))
    squares = 0.0
    for name, bound in BOUNDS[chosen[1]][step].items():
        std = float(np.sqrt(np.mean(np.square(seen[name])))) * mechanism.divisor
        squares += (bound / std) ** 2
    reached = squares**-0.5 / recorded.noise_multiplier
    if chosen[0] == "local":
        reached /= math.sqrt(mechanism.facts.holders)
    within = 6 / math.sqrt(2 * min(seen[name].size for name in BOUNDS[chosen[1]][step]))
    assert 1 - within < reached < 1 + within + (0.05 if chosen[0] == "shares" else 0)


@pytest.mark.usefixtures("epsilon_takes_no_time")
@whole_runs
def test_noise_is_added_once_whatever_the_number_of_holders(
    chosen: Combination, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nobody drawn the learner gets the noise alone, of the scale that is stated for each part."""
    if chosen[2] == "fixed_size":
        pytest.skip("no draw is empty; nothing of the noise depends on the sampler")
    seen: list[dict[str, np.ndarray]] = []
    means = Mechanism.means

    def spy(self: Mechanism, release: Any, sums: Any) -> Any:
        made = means(self, release, sums)
        seen.append({name: np.array(values) for name, values in made.values.items()})
        return made

    monkeypatch.setattr(Mechanism, "means", spy)
    for holders in (2, 12):
        of_holders = [f"federation.holders={holders}", f"federation.nodes={min(holders, 4)}"]
        phases = len(BOUNDS[chosen[1]])
        one = [f"train.steps={phases}"]
        if phases == 1:  # more numbers, for a closer look; later Hessians are one a class
            one += ["data.name=fashion_mnist_subset"]
        one += ["noise.options.factors=[1.25]"] if chosen[3] == "schedule" else []
        config = formed(chosen, form, *of_holders, few(chosen), *one)
        seen.clear()
        train(config, tmp_path / str(holders))
        mechanism = prepare(config).mechanism
        assert len(seen) == phases
        for step, noises in enumerate(seen):
            stated = mechanism.stds_of_sums(mechanism.release(step))
            assert set(noises) == set(stated)
            for name, noise in noises.items():
                if noise.size < 100:
                    continue  # a count has a test of its own
                ratio = float(np.mean((noise * mechanism.divisor) ** 2)) / stated[name] ** 2
                within = 6 * math.sqrt(2 / noise.size)
                assert abs(ratio - 1) < within, f"{name}: false alarm 2e-9; twice the noise gives ratio 4"
            if not form:
                assert_noise_is_that_of_the_event(chosen, mechanism, step, noises)


@combinations([c for c in VALID if c not in PRIVATE])
def test_non_private_runs_claim_nothing(chosen: Combination, tmp_path: Path, few_pixels: list[str]) -> None:
    result = train(of(chosen, *few_pixels), tmp_path)
    assert result["trust"]["unit"] == "none"
    assert ledger.read(tmp_path / "ledger.jsonl").epsilon().value == math.inf
    if chosen[2] == "fixed_size":
        return
    nobody = of(chosen, few(chosen), *few_pixels)
    train(nobody, tmp_path / "empty")
    assert torch.equal(final(tmp_path / "empty"), start_of(nobody)), "nothing is added to an empty sum"


def test_unknown_variants_and_options_are_refused_with_the_nearest_name() -> None:
    for axis, near, right in (
        ("strategy", "centrl", "central"),
        ("query", "gradeint", "gradient"),
        ("sampler", "poison", "poisson"),
        ("noise", "tre", "tree"),
    ):
        with pytest.raises(InputError, match=right):
            prepare(small(f"{axis}={near}"))
        with pytest.raises(InputError, match="unknown key"):
            prepare(small(f"{axis}.options={{zap: 1}}"))
    with pytest.raises(InputError, match="central_dpsgd"):
        small("preset=central_dpsg")
