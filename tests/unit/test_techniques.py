"""Single switches of the recipes: rate scaling, warm-up, averaging, noise levels, public weights, freezing
(budget: 40 s)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim import loading, models
from fedsim.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from fedsim.engine.experiment import epsilons, prepare
from fedsim.grads.flat import get_flat, spec
from fedsim.learners import optimizer as optim
from fedsim.mechanism import Mechanism
from fedsim.merging import Choice
from fedsim.models import weights
from fedsim.noise.levels import NoiseLevels
from fedsim.noise.stream import Stream
from fedsim.privacy import accountant, events, ledger, search
from fedsim.privacy.family import EventFamily
from fedsim.strategies.base import Collected
from fedsim.validate import InputError
from fedsim.visibility import shown
from tests.conftest import final, small, train

DELTA = 1e-5

# --- learning rate


def test_kurakins_learning_rate() -> None:
    """Nesterov 0.9, base rate 2 for 256, one epoch of warm-up, cosine over ten epochs at batch 1,024."""
    written = OptimizerConfig(
        "nesterov",
        {"momentum": 0.9},
        2.0,
        scale_with_batch=256,
        schedule=Choice("cosine"),
        warmup_epochs=1.0,
    )
    optim.check(written)
    training = TrainConfig(steps=12_511, expected_batch_size=1024)
    config = optim.resolved(written, training, examples=1_281_167)
    assert config.learning_rate == 8.0
    assert config.warmup_steps == 1252  # 1,281,167 / 1,024, rounded up
    rates = [optim.learning_rate(config, training.steps, step) for step in range(training.steps)]
    assert rates[0] == 8.0 / 1252
    assert rates[1251] == 8.0 == max(rates)
    half = 1252 + (12_511 - 1252) // 2
    assert rates[half] == pytest.approx(4.0, rel=1e-3)
    assert 0.0 < rates[-1] < 1e-6


def test_rates_stay_as_written_without_the_switches() -> None:
    written = OptimizerConfig("sgd", {}, 0.3, warmup_steps=4)
    assert optim.resolved(written, TrainConfig(expected_batch_size=512), 1000) == written


def test_scaled_rate_is_the_rate_written_out(tmp_path: Path) -> None:
    train(small("optimizer.learning_rate=0.5", "optimizer.scale_with_batch=300"), tmp_path / "scaled")
    train(small("optimizer.learning_rate=0.1"), tmp_path / "plain")
    assert torch.equal(final(tmp_path / "scaled"), final(tmp_path / "plain"))
    train(small("optimizer.warmup_epochs=0.4"), tmp_path / "epochs")  # 0.4 * 400 / 60: 3 steps
    train(small("optimizer.warmup_steps=3"), tmp_path / "steps")
    assert torch.equal(final(tmp_path / "epochs"), final(tmp_path / "steps"))
    assert not torch.equal(final(tmp_path / "epochs"), final(tmp_path / "plain"))


def test_average_warms_up_as_de_et_al() -> None:
    """With parameters 1, 1, 1, ... from a start at 0 the average is 1 - product of min(mu, (1+t)/(10+t))."""
    ema = optim.Ema(0.9)
    ema.init(torch.zeros(1, dtype=torch.float64))
    left = 1.0
    for step in range(200):
        ema.update(torch.ones(1, dtype=torch.float64), step)
        left *= min(0.9, (1 + step) / (10 + step))
        assert float(ema.value) == pytest.approx(1.0 - left, rel=1e-12)
    assert (1 + 80) / (10 + 80) == 0.9  # from there on the decay is constant


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.warmup_steps=2", "optimizer.warmup_epochs=1"], "Give one of them"),
        (["optimizer.scale_with_batch=0"], "scale_with_batch"),
        (["optimizer.warmup_epochs=-1"], "warmup_epochs"),
        (["model.reset=[head.*]"], "model.init_from is None"),
    ],
)
def test_wrong_switches_are_refused_when_loading(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(*overrides)


def test_a_warmup_longer_than_the_run_is_refused_before_it_starts() -> None:
    with pytest.raises(InputError, match="warmup_steps"):
        prepare(small("optimizer.warmup_epochs=5"))


# --- noise levels


def test_levels_cut_the_run_into_equal_parts() -> None:
    for steps, parts in ((10, 3), (7, 7), (100, 4), (5, 1), (16, 5)):
        factors = tuple(1.0 + index for index in range(parts))
        levels = NoiseLevels(factors, steps)
        assert [levels.factor(step) for step in range(steps)] == [
            factors[step * parts // steps] for step in range(steps)
        ]
        for first in range(1, steps + 3):
            counted = [f for f, count in levels.counts(first) for _ in range(count)]
            assert counted == [levels.factor(step) for step in range(first)]
    for factors, steps in (((), 5), ((1.0,) * 17, 100), ((1.0, 1.0), 1), ((1.0, -1.0), 5)):
        with pytest.raises(InputError, match=r"noise\.options\.factors"):
            NoiseLevels(factors, steps)


@pytest.mark.exact
def test_levels_compose_like_the_library() -> None:
    """Epsilon of a scheduled run against a composition written out step by step, by the library's RDP."""
    levels, rate = NoiseLevels((1.5, 1.0, 0.75), 10), 0.05
    mine = accountant.epsilon(EventFamily.gaussian(rate, levels).event(1.2, 10), DELTA, "rdp").value
    book = dp.rdp.RdpAccountant()
    for step in range(10):
        sigma = 1.2 * (1.5, 1.0, 0.75)[step * 3 // 10]
        book.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)))
    assert mine == pytest.approx(book.get_epsilon(DELTA), rel=1e-6)
    order = NoiseLevels((0.75, 1.0, 1.5, 1.5), 10)  # other factors: other epsilon
    other = accountant.epsilon(EventFamily.gaussian(rate, order).event(1.2, 10), DELTA, "rdp").value
    assert other != pytest.approx(mine, rel=1e-3)


@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_calibration_of_a_multiple(kind: str) -> None:
    rate, steps = 0.02, 60
    family = EventFamily.gaussian(rate, NoiseLevels((2.0, 1.0), steps))
    found = search.noise_multiplier_for(2.0, DELTA, family, steps, kind)
    reached = accountant.epsilon(family.event(found.noise_multiplier, steps), DELTA, kind).value
    assert reached is not None
    assert 2.0 * (1 - 2e-4) <= reached <= 2.0
    constant = search.noise_multiplier_for(
        2.0, DELTA, EventFamily.gaussian(rate), steps, kind
    ).noise_multiplier
    assert found.noise_multiplier < constant < 2.0 * found.noise_multiplier
    twice = EventFamily.gaussian(rate, NoiseLevels((2.0,), steps))
    same = search.noise_multiplier_for(2.0, DELTA, twice, steps, kind).noise_multiplier
    assert same == pytest.approx(constant / 2.0, rel=3e-4)


def test_steps_within_a_budget_follow_the_levels() -> None:
    family = EventFamily.gaussian(0.05, NoiseLevels((2.0, 1.0, 0.5), 90))
    steps = search.max_steps(1.0, DELTA, family, 1.5, "rdp", limit=90)

    def spent(count: int) -> float:
        value = accountant.epsilon(family.event(1.5, count), DELTA, "rdp").value
        assert value is not None
        return value

    assert 0 < steps < 90
    assert spent(steps) <= 1.0 < spent(steps + 1)


def schedule(*factors: float) -> str:
    return f"noise={{name: schedule, options: {{factors: {list(factors)}}}}}"


def scheduled(*overrides: str) -> Config:
    return small(schedule(2.0, 1.0, 0.5), "privacy.noise_multiplier=1.0", *overrides)


@pytest.mark.parametrize("factors", [(), (1.0, 0.0), (1.0, -1.0), (1.0, 1e300), (1.0,) * 7])
def test_wrong_factors_are_refused_before_anything_starts(factors: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"noise\.options\.factors"):
        prepare(small(schedule(*factors)))


@pytest.mark.parametrize("query", ["gradient", "holder_update"])
def test_a_scheduled_run_records_and_adds_the_noise_of_each_step(
    query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise of every step has the scale of the step's own event, which the ledger holds.

    False alarms: 18 bounds of five standard errors each, below 2e-5 together.
    """
    config = scheduled(
        f"query={query}", "train.expected_batch_size=1e-6", "optimizer.name=sgd",
        "optimizer.learning_rate=1e-6", "train.checkpoint_every=1",
    )  # fmt: skip
    plan = prepare(config).mechanism
    assert [plan.noise_factor(step) for step in range(6)] == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]
    nothing = Collected({}, [])
    noise = []
    for step in range(6):
        release = plan.release(step)
        noise.append(plan.noise(release, nothing, Stream(), 3, step)["sum"][:20_000])
        assert noise[-1].size == 20_000
    for step, values in enumerate(noise):
        # sensitivity 0.5; 20,000 values: a standard error is 0.5 %, the bound is five of them
        assert values.std() == pytest.approx(0.5 * plan.noise_factor(step), rel=0.025)
        assert abs(np.corrcoef(values, noise[(step + 1) % 6])[0, 1]) < 0.036  # five standard errors
    added: list[np.ndarray] = []  # by the run itself: nobody is drawn, so a step's sum is its noise
    means = Mechanism.means
    monkeypatch.setattr(
        Mechanism,
        "means",
        lambda self, release, sums: (added.append(sums["sum"].copy()), means(self, release, sums))[1],
    )
    train(config, tmp_path)
    for step, values in enumerate(added):
        assert values.std() == pytest.approx(0.5 * plan.noise_factor(step), rel=0.025)
    book = ledger.read(tmp_path / "ledger.jsonl")
    assert [r.noise_multiplier for r in book.records] == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]
    assert events.releases(book.total_event()) == events.releases(plan.total_event(6))
    assert [r.noise_multiplier for r in book.records] != [1.0] * 6  # what a plan without levels would record


@pytest.mark.exact
def test_target_and_budget_of_a_scheduled_run(tmp_path: Path) -> None:
    config = scheduled("privacy.noise_multiplier=null", "privacy.target_epsilon=3")
    prepared = prepare(config)
    spent = shown(epsilons(prepared.mechanism, 6, config), public_only=False)
    assert spent["example"].value == pytest.approx(3.0, rel=2e-4)
    assert spent["example"].value <= 3.0  # type: ignore[operator]
    assert spent["holder"].value > 3.0  # type: ignore[operator]
    result = train(config, tmp_path / "target")
    assert result["epsilon"]["example"]["value"] == spent["example"].value
    stopped = prepare(scheduled("privacy.stop_at_epsilon=1.5")).mechanism
    assert 0 < stopped.steps < 6
    assert stopped.stopped_by_budget
    assert [stopped.noise_factor(step) for step in range(3)] == [2.0, 2.0, 1.0]  # parts of the planned run


def test_scheduled_runs_resume_exactly(tmp_path: Path) -> None:
    from tests.strategies.test_contract import Flaky

    with pytest.raises(Exception, match="disk of this holder"):
        train(scheduled(), tmp_path / "a", client=Flaky(lambda n: n >= 4))
    train(scheduled(), tmp_path / "a", resume=True)
    train(scheduled(), tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))


def test_equal_levels_are_a_constant_run(tmp_path: Path) -> None:
    train(small(schedule(1.0)), tmp_path / "a")
    train(small(), tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))
    train(small(schedule(1.0, 0.9)), tmp_path / "c")
    assert not torch.equal(final(tmp_path / "c"), final(tmp_path / "b"))


@pytest.mark.parametrize("name", ["nonprivate", "dp_ftrl", "dp_mf", "local_dpsgd", "shares_dpsgd"])
def test_strategies_of_constant_noise_refuse_levels(name: str) -> None:
    noise = "null" if name == "nonprivate" else "1.0"
    unclipped = ["privacy.clip_norm=1.0"] if name == "nonprivate" else []
    config = small(
        f"preset={name}",
        schedule(2.0, 1.0),
        f"privacy.noise_multiplier={noise}",
        *unclipped,
    )
    with pytest.raises(InputError, match=r"noise(\.name)?=schedule .*(changes the noise|does not go with)"):
        prepare(config)


# --- public weights


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a non-private run, as any run leaves them."""
    out = tmp_path_factory.mktemp("public") / "run"
    train(
        small(
            "preset=nonprivate",
            "privacy.noise_multiplier=null",
            "privacy.clip_norm=1.0",
            "train.steps=20",
            "seed=9",
        ),
        out,
    )
    return out / "final.safetensors"


def start(model: ModelConfig, classes: int = 10) -> dict[str, torch.Tensor]:
    return models.build(model, (1, 28, 28), classes, seed=0).state_dict()


def test_weights_are_taken_and_the_head_starts_afresh(pretrained: Path) -> None:
    held = load_file(pretrained)
    whole = start(ModelConfig("mlp", init_from=str(pretrained)))
    assert whole.keys() == held.keys()
    assert all(torch.equal(whole[name], held[name]) for name in held)
    fresh = start(ModelConfig("mlp"))
    head = [name for name in held if name.startswith("layers.2")]
    part = start(ModelConfig("mlp", init_from=str(pretrained), reset=["layers.2.*"]))
    assert head
    for name in held:
        assert torch.equal(part[name], fresh[name] if name in head else held[name])
    other = start(ModelConfig("mlp", init_from=str(pretrained), reset=["layers.2.*"]), classes=4)
    assert other["layers.2.weight"].shape == (4, 32)
    assert torch.equal(other["layers.0.weight"], held["layers.0.weight"])
    double = start(ModelConfig("mlp", dtype="float64", init_from=str(pretrained)))
    assert torch.equal(double["layers.0.weight"], held["layers.0.weight"].double())


def test_what_does_not_fit_is_named(pretrained: Path, tmp_path: Path) -> None:
    held = load_file(pretrained)
    digest = hashlib.sha256(pretrained.read_bytes()).hexdigest()
    assert weights.pinned(ModelConfig("mlp", init_from=str(pretrained))).init_sha256 == digest
    with pytest.raises(InputError, match=r"another shape: layers.2.bias \(10,\) instead of \(4,\)"):
        start(ModelConfig("mlp", init_from=str(pretrained)), classes=4)
    save_file({**held, "extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(InputError, match="not of this model: extra"):
        start(ModelConfig("mlp", init_from=str(tmp_path / "extra.safetensors")))
    start(ModelConfig("mlp", init_from=str(tmp_path / "extra.safetensors"), reset=["ext*"]))
    save_file({"layers.0.weight": held["layers.0.weight"]}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"missing: layers.0.bias, layers.2.bias"):
        start(ModelConfig("mlp", init_from=str(tmp_path / "part.safetensors")))
    with pytest.raises(InputError, match="names no parameter"):
        start(ModelConfig("mlp", init_from=str(pretrained), reset=["haed.*"]))
    with pytest.raises(InputError, match="must be a safetensors file"):
        start(ModelConfig("mlp", init_from=str(tmp_path / "none.safetensors")))
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="must be a safetensors file"):
        start(ModelConfig("mlp", init_from=str(tmp_path / "bad.safetensors")))
    save_file({**held, "layers.0.bias": torch.full((32,), math.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="not finite"):
        start(ModelConfig("mlp", init_from=str(tmp_path / "nan.safetensors")))
    with pytest.raises(InputError, match="init_sha256 is abc"):
        start(ModelConfig("mlp", init_from=str(pretrained), init_sha256="abc"))


def test_frozen_parameters_are_no_part_of_the_mechanism() -> None:
    model = models.build(ModelConfig("mlp", freeze=["layers.0.*"]), (1, 28, 28), 10, seed=0)
    assert spec(model).names == ("layers.2.weight", "layers.2.bias")
    assert get_flat(model).numel() == 330
    bones = models.skeleton(ModelConfig("mlp", freeze=["layers.0.*"]), (1, 28, 28), 10)
    assert spec(bones) == spec(model)
    for patterns, message in ((["*"], "names every parameter"), (["layer.0.*"], "names no parameter")):
        with pytest.raises(InputError, match=message):
            models.build(ModelConfig("mlp", freeze=patterns), (1, 28, 28), 10, seed=0)


def test_fine_tuning_moves_the_head_alone_whatever_the_nodes(pretrained: Path, tmp_path: Path) -> None:
    held = load_file(pretrained)
    ends = []
    for nodes in (1, 3):
        config = small(
            f"model.init_from={pretrained}", "model.reset=[layers.2.*]", "model.freeze=[layers.0.*]",
            "model.dtype=float64", f"federation.nodes={nodes}",
        )  # fmt: skip
        result = train(config, tmp_path / str(nodes))
        assert result["parameters"] == 330
        ends.append(load_file(tmp_path / str(nodes) / "final.safetensors"))
    for name in ("layers.0.weight", "layers.0.bias"):
        assert torch.equal(ends[0][name], held[name].double())
    begin = start(ModelConfig("mlp", dtype="float64"))
    for name in ("layers.2.weight", "layers.2.bias"):
        assert not torch.equal(ends[0][name], begin[name])
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-10, atol=1e-12)


def test_public_weights_help(pretrained: Path, tmp_path: Path) -> None:
    common = ["privacy.noise_multiplier=4.0", "optimizer.learning_rate=0.05"]
    tuned = train(small(f"model.init_from={pretrained}", *common), tmp_path / "a")
    scratch = train(small(*common), tmp_path / "b")
    assert tuned["accuracy"] > scratch["accuracy"] + 0.05


def test_a_relative_path_is_made_absolute_when_loading(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pretrained.parent)
    config = small("model.init_from=final.safetensors")
    assert config.model.init_from == str(pretrained)
    again = loading.from_json(config.to_json())
    assert again == config
    assert dataclasses.replace(again, model=weights.pinned(again.model)).model.init_sha256
