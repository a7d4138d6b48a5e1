"""Server optimizers against torch.optim, schedules, the weight average, exact resume; and evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.config import OptimizerConfig, TrainConfig
from fedsim.data.targets import Targets
from fedsim.engine.evaluate import evaluate
from fedsim.grads.flat import FlatSpec
from fedsim.learners import optimizer as optim
from fedsim.learners.optimizer import Ema, ServerOptimizer
from fedsim.merging import Choice
from fedsim.optimizers import OPTIMIZERS
from fedsim.optimizers.adam import Lamb
from fedsim.tasks.classification import Classification
from fedsim.validate import InputError

SPEC = FlatSpec(("a", "b", "c"), ((3, 4), (4,), (2, 2)), (12, 4, 4))
STEPS = 20


def gradients(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(20, generator=generator, dtype=torch.float64).to(dtype)
    return start, torch.randn((STEPS, 20), generator=generator, dtype=torch.float64).to(dtype)


def run(config: OptimizerConfig, train: TrainConfig | None = None) -> list[Tensor]:
    params, grads = gradients()
    optimizer = ServerOptimizer(config, train or TrainConfig(steps=STEPS), SPEC)
    optimizer.init(params)
    path = []
    for step in range(STEPS):
        params = optimizer.step(params, grads[step], step)
        path.append(params)
    return path


TorchRule = Callable[[list[Tensor]], torch.optim.Optimizer]
PEERS: list[tuple[OptimizerConfig, TorchRule]] = [
    (OptimizerConfig("sgd", {}, 0.3), lambda p: torch.optim.SGD(p, 0.3)),
    (OptimizerConfig("sgd", {}, 0.3, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.1)),
    (
        OptimizerConfig("momentum", {"momentum": 0.9}, 0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    ),
    (
        OptimizerConfig("nesterov", {"momentum": 0.8}, 0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    (
        OptimizerConfig("adam", {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}, 0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    ),
    (
        OptimizerConfig("adamw", {}, 0.1, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2),
    ),
]


@pytest.mark.parametrize(("config", "peer"), PEERS, ids=lambda v: getattr(v, "name", ""))
def test_equals_torch_optim(config: OptimizerConfig, peer: TorchRule) -> None:
    start, grads = gradients()
    parameter = nn.Parameter(start.clone())
    reference = peer([parameter])
    for step, ours in enumerate(run(config)):
        parameter.grad = grads[step].clone()
        reference.step()
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-12, atol=1e-12)


def lamb_reference(start: Tensor, grads: Tensor, c: OptimizerConfig, o: Lamb) -> Tensor:
    """You et al. 2020, algorithm 2, one scalar of bookkeeping at a time."""
    layers = [start[:12].tolist(), start[12:16].tolist(), start[16:].tolist()]
    m = [[0.0] * len(x) for x in layers]
    v = [[0.0] * len(x) for x in layers]
    for t, gradient in enumerate(grads.tolist(), start=1):
        parts = [gradient[:12], gradient[12:16], gradient[16:]]
        for i, part in enumerate(parts):
            update = []
            for j, g in enumerate(part):
                m[i][j] = o.beta1 * m[i][j] + (1 - o.beta1) * g
                v[i][j] = o.beta2 * v[i][j] + (1 - o.beta2) * g * g
                ratio = (m[i][j] / (1 - o.beta1**t)) / (math.sqrt(v[i][j] / (1 - o.beta2**t)) + o.epsilon)
                update.append(ratio + c.weight_decay * layers[i][j])
            trust = math.hypot(*layers[i]) / math.hypot(*update)
            layers[i] = [x - c.learning_rate * trust * u for x, u in zip(layers[i], update, strict=True)]
    return torch.tensor([x for layer in layers for x in layer], dtype=torch.float64)


def test_lamb_equals_hand_written_reference() -> None:
    config = OptimizerConfig("lamb", {"epsilon": 1e-6}, 0.05, weight_decay=0.1)
    expected = lamb_reference(*gradients(), config, Lamb(epsilon=1e-6))
    torch.testing.assert_close(run(config)[-1], expected, rtol=1e-12, atol=1e-12)
    adam_like = run(dataclasses.replace(config, name="adam"))[-1]
    assert not torch.allclose(adam_like, expected, rtol=1e-3)


def test_lamb_moves_zero_weights() -> None:
    config = OptimizerConfig("lamb", {}, 0.05)
    optimizer = ServerOptimizer(config, TrainConfig(steps=5), SPEC)
    zero = torch.zeros(20, dtype=torch.float64)
    optimizer.init(zero)
    moved = optimizer.step(zero, torch.ones_like(zero), 0)
    torch.testing.assert_close(moved, torch.full_like(zero, -0.05), rtol=1e-6, atol=0)
    assert torch.isfinite(optimizer.step(moved, torch.zeros_like(zero), 1)).all()


@pytest.mark.parametrize("name", OPTIMIZERS.own())
def test_step_changes_no_argument(name: str) -> None:
    config = OptimizerConfig(name, {}, 0.1)
    params, grads = gradients()
    optimizer = ServerOptimizer(config, TrainConfig(steps=STEPS), SPEC)
    optimizer.init(params)
    before, gradient = params.clone(), grads[0].clone()
    optimizer.step(params, grads[0], 0)
    assert torch.equal(params, before)
    assert torch.equal(grads[0], gradient)


@pytest.mark.parametrize("name", OPTIMIZERS.own())
def test_resume_is_bit_for_bit(name: str) -> None:
    config = OptimizerConfig(
        name,
        {},
        0.1,
        weight_decay=0.01,
        schedule=Choice("cosine"),
        warmup_steps=4,
    )
    train = TrainConfig(steps=STEPS, ema_decay=0.9)
    params, grads = gradients(torch.float32)
    unbroken = ServerOptimizer(config, train, SPEC)
    unbroken.init(params)
    for step in range(8):
        params = unbroken.step(params, grads[step], step)
    tensors, numbers = unbroken.state_dict()
    resumed = ServerOptimizer(config, train, SPEC)
    resumed.load_state_dict({k: v.clone() for k, v in tensors.items()}, dict(numbers))
    one, two = params.clone(), params.clone()
    for step in range(8, STEPS):
        one = unbroken.step(one, grads[step], step)
        two = resumed.step(two, grads[step], step)
    assert torch.equal(one, two)
    first, second = unbroken.average(), resumed.average()
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    fresh = ServerOptimizer(config, train, SPEC)  # a state that is lost must show
    fresh.init(params)
    three = params.clone()
    for step in range(8, STEPS):
        three = fresh.step(three, grads[step], step)
    lost = fresh.average()
    assert lost is not None
    assert not torch.equal(first, lost)
    assert name == "sgd" or not torch.equal(one, three)


def test_wrong_state_is_refused() -> None:
    adam = ServerOptimizer(OptimizerConfig("adam"), TrainConfig(steps=5), SPEC)
    with pytest.raises(InputError, match="must hold"):
        adam.load_state_dict({}, {"updates": 1})
    with pytest.raises(InputError, match=r"must have shape \(20,\)"):
        adam.load_state_dict({"first": torch.zeros(20), "second": torch.zeros(3)}, {"updates": 1})
    with pytest.raises(InputError, match="init"):
        adam.step(torch.zeros(20), torch.zeros(20), 0)
    adam.init(torch.zeros(20))
    with pytest.raises(InputError, match="gradient_mean"):
        adam.step(torch.zeros(20), torch.zeros(19), 0)
    with pytest.raises(InputError, match="float64"):
        adam.step(torch.zeros(20), torch.zeros(20, dtype=torch.float64), 0)


def rates(steps: int, **settings: object) -> list[float]:
    config = dataclasses.replace(OptimizerConfig(learning_rate=2.0), **settings)  # type: ignore[arg-type]
    return [optim.learning_rate(config, steps, t) for t in range(steps + 2)]


def test_schedules() -> None:
    assert rates(3) == [2.0] * 5
    assert rates(4, schedule=Choice("linear")) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    assert rates(4, schedule=Choice("linear", {"final_fraction": 0.5})) == pytest.approx(
        [2, 1.75, 1.5, 1.25, 1, 1]
    )
    cosine = [1 + math.cos(math.pi * t / 4) for t in range(5)]
    assert rates(4, schedule=Choice("cosine")) == pytest.approx([*cosine, 0.0], abs=1e-12)
    assert rates(6, schedule=Choice("linear"), warmup_steps=2) == pytest.approx([1, 2, 2, 1.5, 1, 0.5, 0, 0])
    assert rates(4, warmup_steps=3) == pytest.approx([2 / 3, 4 / 3, 2, 2, 2, 2])
    assert all(rate > 0 for rate in rates(50, schedule=Choice("cosine"), warmup_steps=7)[:50])


def test_schedule_reaches_the_update() -> None:
    params, grads = gradients()
    path = run(OptimizerConfig("sgd", {}, 0.5, schedule=Choice("linear")))
    expected = params
    for step in range(STEPS):
        expected = expected - 0.5 * (1 - step / STEPS) * grads[step]
    torch.testing.assert_close(path[-1], expected, rtol=1e-12, atol=1e-12)


def test_ema_warm_up() -> None:
    ema = Ema(0.9)
    ema.init(torch.zeros(1, dtype=torch.float64))
    expected = 0.0
    for t in range(200):
        ema.update(torch.full((1,), float(t + 1), dtype=torch.float64), t)
        d = min(0.9, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * (t + 1)
        assert ema.value.item() == pytest.approx(expected, rel=1e-12)
    off = ServerOptimizer(OptimizerConfig(), TrainConfig(steps=3), SPEC)
    off.init(torch.zeros(20))
    assert off.average() is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig("adma"), "Did you mean 'adam'"),
        (OptimizerConfig(schedule=Choice("cosin")), "Did you mean 'cosine'"),
        (OptimizerConfig("sgd", {"momentum": 0.9}), "optimizer.options of sgd: unknown key 'momentum'"),
        (OptimizerConfig("nesterov", {"momentum": 0.0}), "optimizer.options.momentum must be"),
        (
            OptimizerConfig(schedule=Choice("constant", {"final_fraction": 0.1})),
            "optimizer.schedule.options of constant: unknown key 'final_fraction'",
        ),
        (OptimizerConfig("adam", {"beta2": 1.0}), "optimizer.options.beta2"),
        (OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay"),
        (OptimizerConfig(warmup_steps=100), "below train.steps"),
    ],
)
def test_wrong_configuration_is_refused(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServerOptimizer(config, TrainConfig(steps=100), SPEC)


def test_evaluate_does_not_depend_on_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5)).train()
    inputs, labels = torch.randn(50, 6, generator=generator), torch.randint(0, 5, (50,), generator=generator)
    whole = evaluate(model, [(inputs, labels)], Classification(top_k=3))
    split = evaluate(
        model,
        [(inputs[:0], labels[:0]), (inputs[:7], labels[:7]), (inputs[7:], labels[7:])],
        Classification(top_k=3),
    )
    logits = model[0](inputs).detach()
    assert whole["accuracy"] == split["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    top = (logits.argsort(1, descending=True)[:, :3] == labels[:, None]).any(1).double().mean().item()
    assert whole["top_3_accuracy"] == split["top_3_accuracy"] == top > whole["accuracy"]
    assert whole["loss"] == pytest.approx(split["loss"], rel=1e-6)
    assert whole["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert model.training
    assert model[1].training
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_counts_non_finite_logits_as_wrong() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    result = evaluate(model, [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))], Classification())
    assert result["accuracy"] == 0.0
    assert math.isnan(result["loss"])


def test_evaluate_refuses_nothing_and_too_large_k() -> None:
    with pytest.raises(InputError, match="at least one example"):
        evaluate(nn.Linear(2, 2), [], Classification())
    with pytest.raises(InputError, match="top_k must be between 1 and 2, got 3"):
        Classification(top_k=3).check(Targets("class", 2))
