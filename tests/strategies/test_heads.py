"""Newton and preconditioned gradients of a linear head: what they end in, and what their steps release."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors.torch import load_file
from scipy.special import expit, logsumexp

from fedsim.config import Config
from fedsim.data.examples import normalise
from fedsim.engine import holder
from fedsim.engine.experiment import prepare
from fedsim.heads import packing
from fedsim.noise.stream import Stream
from fedsim.privacy import accountant, events
from fedsim.queries import Means
from fedsim.strategies.base import Collected
from fedsim.tasks.classification import Classification
from fedsim.types import StepTask
from fedsim.validate import InputError
from tests.conftest import small, train
from tests.strategies import combinations

SMALL = (
    f"data.name={combinations.__name__}:thumbnails",
    "model.name=linear",
    "model.dtype=float64",
    "train.expected_batch_size=400",
    "optimizer.name=sgd",
    "optimizer.options={}",
    "optimizer.learning_rate=1.0",
)
FREE = ("strategy=nonprivate", "privacy.noise_multiplier=null", "privacy.clip_norm=1.0")
PENALTY = 0.5  # large, so that the optimum is reached soon


def of(*overrides: str) -> Config:
    return small(*SMALL, *overrides)


def newton(*overrides: str) -> Config:
    return of("preset=dp_newton", *overrides)


def fc(*overrides: str) -> Config:
    return of("preset=dp_fc", *overrides)


def head(out: Path) -> tuple[np.ndarray, np.ndarray]:
    held = load_file(out / "final.safetensors")
    return held["head.weight"].numpy(), held["head.bias"].numpy()


def rows(config: Config, bias: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    data = prepare(config).splits.train
    inputs = normalise(data.inputs, data, torch.float64).flatten(1).numpy()
    return np.concatenate([inputs, np.full((len(inputs), 1), bias)], 1), np.eye(10)[data.targets]


def minimum(x: np.ndarray, hot: np.ndarray, loss: str, penalty: float) -> np.ndarray:
    """The minimiser (10, d) of the mean loss and penalty / 2 |W|^2, by scipy."""

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(10, -1)
        scores = x @ w.T
        if loss == "softmax":
            value = (logsumexp(scores, 1) - (hot * scores).sum(1)).mean()
            residual = np.exp(scores - logsumexp(scores, 1)[:, None]) - hot
        else:
            value = (np.logaddexp(0, scores) - hot * scores).sum(1).mean()
            residual = expit(scores) - hot
        slope = residual.T @ x / len(x) + penalty * w
        return value + penalty / 2 * (w**2).sum(), slope.ravel()

    start = np.zeros(10 * x.shape[1])
    options = {"maxiter": 20_000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 50, "maxfun": 40_000}
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(10, -1)


@pytest.mark.parametrize(("loss", "steps", "rate"), [("one_vs_all", 10, 1.0), ("softmax", 120, 0.5)])
def test_newton_steps_without_noise_end_in_the_minimum(
    loss: str, steps: int, rate: float, tmp_path: Path
) -> None:
    """Softmax takes more and shorter steps: it sees the diagonal blocks of its Hessian alone."""
    options = f"{{rate: {rate}, ridge: 1e-9, penalty: {PENALTY}}}"
    learner = f"learner={{name: newton, options: {options}}}"
    config = newton(
        *FREE, learner, f"query.options.loss={loss}", "query.options.bias=2.0", f"train.steps={steps}"
    )
    train(config, tmp_path)
    wanted = minimum(*rows(config, 2.0), loss, PENALTY)
    weight, bias = head(tmp_path)
    assert np.abs(weight - wanted[:, :-1]).max() < 1e-6
    assert np.abs(bias - 2.0 * wanted[:, -1]).max() < 1e-6


@pytest.mark.parametrize("precondition", ["before_clip", "after_noise"])
@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_without_noise_they_are_preconditioned_gradient_steps(
    precondition: str, bias: float, tmp_path: Path
) -> None:
    """Written out on inputs; that such steps end in scipy's minimum is tested of what they are made of."""
    config = fc(
        *FREE, f"query.options.precondition={precondition}", "query.options.ridge=0.05", "train.steps=7",
        f"query.options.bias={bias}", "optimizer.learning_rate=3.0",
    )  # fmt: skip
    train(config, tmp_path)
    x, hot = rows(config, bias)
    if bias == 0:
        x = x[:, :-1]
    second = x.T @ x / len(x)
    inverse = np.linalg.inv(second + 0.05 * np.eye(len(second)))
    inverse /= np.trace(second @ inverse)
    weights = np.zeros((10, x.shape[1]))
    for _ in range(6):
        scores = x @ weights.T
        residual = np.exp(scores - logsumexp(scores, 1)[:, None]) - hot
        weights -= 3.0 * (residual.T @ x / len(x)) @ inverse
    weight, found = head(tmp_path)
    # The map of rows travels as float32.
    assert np.abs(weight - weights[:, : weight.shape[1]]).max() < 1e-6 * np.abs(weights).max()
    wanted = bias * weights[:, -1] if bias else np.zeros(10)
    assert np.abs(found - wanted).max() < 1e-6 * max(1.0, np.abs(wanted).max())


QUIET = {
    "newton": ("preset=dp_newton", "train.steps=2"),
    "before the clip": ("preset=dp_fc", "train.steps=4", "optimizer.learning_rate=20"),
    "after the noise": (
        "preset=dp_fc", "train.steps=4", "optimizer.learning_rate=20",
        "query.options.precondition=after_noise",
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", QUIET)


@kinds
@pytest.mark.parametrize("holders", [1, 10, 400])
def test_it_does_not_depend_on_the_partition(kind: str, holders: int, tmp_path: Path) -> None:
    config = [*QUIET[kind], "privacy.noise_multiplier=0.5", "privacy.clip_norm=5"]
    train(of(*config), tmp_path / "ten")
    other = [
        f"federation.holders={holders}",
        f"federation.nodes={min(3, holders)}",
        "federation.partition=iid",
    ]
    train(of(*config, *other), tmp_path / "other")
    for one, two in zip(head(tmp_path / "ten"), head(tmp_path / "other"), strict=True):
        assert np.abs(one - two).max() < 1e-8


@kinds
def test_shares_add_what_central_trust_adds(kind: str, tmp_path: Path) -> None:
    """What integers cannot hold of float64 is below 1e-5 of it; noise too small to see."""
    config = [*QUIET[kind], "privacy.noise_multiplier=1e-9", "privacy.clip_norm=5"]
    config += ["learner.options.ridge=0.01"] if kind == "newton" else ["query.options.ridge=0.01"]
    train(of(*config), tmp_path / "central")
    train(of(*config, "strategy=shares", "federation.nodes=3"), tmp_path / "shares")
    for one, two in zip(head(tmp_path / "central"), head(tmp_path / "shares"), strict=True):
        assert np.abs(one - two).max() < 1e-5 * max(1.0, np.abs(one).max())


def test_the_second_moments_get_their_share_of_the_budget() -> None:
    """sigma_0 of the second moments and sigma of T gradients: 1 / sigma_0^2 is the share of all of it."""
    for share in (0.15, 0.5):
        target = ["privacy.noise_multiplier=null", "privacy.target_epsilon=2", "train.steps=9"]
        mechanism = prepare(of("preset=dp_fc", *target, f"query.options.covariance_share={share}")).mechanism
        sigmas = [events.releases(mechanism.event_at(step))[0].noise_multiplier for step in range(9)]
        assert sigmas[1:] == [sigmas[1]] * 8
        spent = [1 / sigma**2 for sigma in sigmas]
        assert spent[0] / sum(spent) == pytest.approx(share)
        whole = accountant.epsilon(events.gaussian_step(sum(spent) ** -0.5, 1.0), 1e-5).value
        assert whole == pytest.approx(2.0, rel=1e-3), "together one Gaussian of the target"
        stds = [mechanism.release(step).noise_stds for step in (0, 1)]
        assert stds[0]["second"] == pytest.approx(sigmas[0] * 0.5**2)
        assert stds[1]["sum"] == pytest.approx(sigmas[1] * 0.3), "residuals of 0.3, mapped rows of 1"


def test_the_first_newton_step_has_one_hessian_and_later_ones_one_a_class() -> None:
    mechanism = prepare(of("preset=dp_newton", "train.steps=3")).mechanism
    packed = packing.length(50)
    lengths = [[part.length for part in mechanism.release(step).statistic.parts] for step in range(3)]
    assert lengths == [[500, packed], [500, 10 * packed], [500, 10 * packed]]
    weighted = prepare(
        of("preset=dp_newton", "query.options={loss: one_vs_all, alpha: 0.5}", "train.steps=1")
    ).mechanism
    assert weighted.release().statistic.parts[1].length == 10 * packed, "weights of classes: they differ"


def test_noise_of_steps_classes_and_parts_is_independent() -> None:
    """A draw that is used again, for another class, part or step, is correlated by 1. Bounds of six standard
    errors: false alarm 1e-7 in all."""
    mechanism = prepare(of("preset=dp_newton", "train.steps=3", "privacy.clip_norm=1")).mechanism
    drawn = []
    for step in range(3):
        release = mechanism.release(step)
        noise = mechanism.noise(release, Collected({}, []), Stream(), 7, step)
        drawn.append(noise["gradient"].reshape(10, -1) / release.noise_stds["gradient"])
        hessians = noise["hessian"].reshape(-1, packing.length(50)) / release.noise_stds["hessian"]
        drawn.append(hessians[:, :50])
    together = np.concatenate(drawn)
    correlations = np.corrcoef(together) - np.eye(len(together))
    assert np.abs(correlations).max() < 6 / math.sqrt(50)
    assert abs(correlations[np.triu_indices(len(together), 1)].mean()) < 6 / 50


def test_a_node_is_told_the_map_and_the_plan_counts_it() -> None:
    before, after = (
        prepare(of("preset=dp_fc", "train.steps=3", f"query.options.precondition={kind}")).mechanism
        for kind in ("before_clip", "after_noise")
    )
    told = 4 * packing.length(50)
    assert before.traffic()[0] - after.traffic()[0] == pytest.approx(told * 2 / 3), "in two steps of three"
    assert before.node_traffic(5)[0] - after.node_traffic(5)[0] == told


def test_what_a_node_keeps_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of(*QUIET["before the clip"], "privacy.clip_norm=5")
    train(config, tmp_path / "kept")
    monkeypatch.setattr(holder.Node, "kept", lambda self, name, key, make: make())
    train(config, tmp_path / "anew")
    for one, two in zip(head(tmp_path / "kept"), head(tmp_path / "anew"), strict=True):
        assert np.array_equal(one, two)


def test_a_node_that_is_told_another_map_takes_that() -> None:
    """As one that stays there for the next run."""
    config = of("preset=dp_fc", "train.steps=3")
    found = []
    for scales in ([1.0, 0.01], [0.01]):
        node = holder.Node(config, 0, config.seed)
        for scale in scales:
            told = {"map": packing.pack(scale * torch.eye(50, dtype=torch.float64)).float().numpy()}
            task = StepTask(1, 0, 1.0, node.method.keys(config.seed, 1), arrays=told)
            sums, _ = node.method.at.sums(node, task)
        found.append(sums["sum"])
    assert np.array_equal(*found)


def test_a_step_without_what_the_learner_takes_leaves_the_parameters() -> None:
    query = prepare(of("preset=dp_fc", "train.steps=2")).mechanism.method.at.query
    means = Means({"second": np.zeros(packing.length(50))}, "second", {"second": 1.0})
    assert "sum" not in query.for_learner({}, means).values


class Squashed(torch.nn.Linear):
    """Has the parameters of one linear layer, and is none."""

    def __init__(self) -> None:
        super().__init__(49, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.flatten(1).tanh())


class Frozen(torch.nn.Module):
    """A public layer of as many outputs as inputs before the one that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.public = torch.nn.Linear(49, 49).requires_grad_(False)
        self.head = torch.nn.Linear(49, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.public(inputs.flatten(1)))


class Away(torch.nn.Linear):
    """One linear layer that starts away from zero."""

    def __init__(self) -> None:
        super().__init__(49, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.flatten(1))


class Hinge(Classification):
    """Another loss."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().loss(outputs, targets).clamp(max=1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=dp_newton", "model.name=mlp"], "one linear layer.*data.features"),
        (
            ["preset=dp_fc", "model.name=mlp"],
            "one linear layer on the 49 numbers.*data.features",
        ),
        (["preset=dp_newton", "model.options.zero_init=false"], "starts at zero weights"),
        (["preset=dp_fc", f"model.name={__name__}:Squashed"], "one linear layer on the 49 numbers"),
        (["preset=dp_ls", f"model.name={__name__}:Frozen"], "one linear layer on the 49 numbers"),
        (["preset=dp_newton", f"model.name={__name__}:Away"], "parameters are not zero"),
        (
            ["preset=dp_ls", "task.options.label_smoothing=0.1"],
            "loss of its own, but .* smooths labels",
        ),
        (["preset=dp_ls", f"task={__name__}:Hinge"], "loss of its own, but .* defines one"),
        (
            ["preset=dp_fc", "train.steps=8", "privacy.noise_multiplier=2", "privacy.stop_at_epsilon=3"],
            "ends the run after 1 of 8 steps",
        ),
        (["preset=dp_newton", "optimizer.learning_rate=0.5"], "learner = newton does not read it"),
        (["preset=dp_newton", "query.options.alpha=0.5"], "softmax must have alpha=1"),
        (["preset=dp_newton", "query.options.hessian_share=1"], "hessian_share must be between"),
        (["preset=dp_newton", "learner.options.rate=0"], "rate must be a positive"),
        (["preset=dp_fc", "train.steps=1"], "one step for the second moments"),
        (["preset=dp_fc", "query.options.precondition=never"], "precondition must be"),
        (["preset=dp_fc", "query.options.covariance_share=0"], "covariance_share must be between"),
        (
            ["preset=dp_fc", "sampler=passes", "train.expected_batch_size=100"],
            "its noise multiplier changes from step to step",
        ),
        (
            ["preset=dp_fc", "query.options.precondition=after_noise", "query.options.mapped_clip=2"],
            "mapped_clip",
        ),
        (["preset=dp_fc", "privacy.clipping=normalised"], "clips rows of features flat"),
        (["preset=dp_fc", "task=regression"], "one class an example"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(of(*overrides))
