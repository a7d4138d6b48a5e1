"""The clip bound in bfloat16 and TF32, emulated on the CPU: by its autocast, and by rounding factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bound import reduced
from benchmarks.bound.reduced import MODELS, build
from benchmarks.emulated import Tf32, to_tf32
from fedsim.grads import FlatClip, clipped_gradient_sum, gpu
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.per_example import cross_entropy

BOUND = 1e-2
REDUCED = ("tf32", "bfloat16")


PLACES = ("on a CPU", "on a GPU")


@pytest.fixture(autouse=True)
def _in_any_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Options, "check_device", lambda *_: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go the ways of one of `PLACES`."""
    return lambda place: monkeypatch.setattr(gpu, "on", lambda _: place == "on a GPU")


def ordinary(seed: int = 2) -> Tensor:
    return torch.randn((5, 2, 3, 16, 16), generator=torch.Generator().manual_seed(seed))


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "an offset": lambda x: 100.0 + x,
    "views that cancel": lambda x: torch.stack([x[:, 0], 2.0 * x[:, 0].mean() - x[:, 0]], dim=1),
    "one longer": lambda x: x * torch.tensor([1.0, 1.0, 1e4, 1.0, 1.0]).view(5, 1, 1, 1, 1),
    "tiny": lambda x: 1e-4 * x,
}
TARGETS = torch.arange(5)


def alternating(outputs: Tensor, targets: Tensor) -> Tensor:
    """Losses of two views whose gradients cancel."""
    signs = torch.tensor([1.0, -1.0]).repeat(len(outputs) // 2)
    return signs * F.cross_entropy(outputs, targets, reduction="none")


def total(
    model: nn.Module, inputs: Tensor, rows: list[int], loss: Any, clip: FlatClip, precision: str
) -> tuple[Tensor, Tensor, Tf32]:
    with ExitStack() as stack:
        mode = stack.enter_context(Tf32())
        found, norms, _ = clipped_sum(
            model, inputs[rows], TARGETS[rows], loss, clip, Options(precision=precision)
        )
    return found, norms, mode


def test_tf32_keeps_eleven_bits() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e3
    error = (to_tf32(values) - values).abs() / values.abs()
    assert 2.0**-12 < float(error.max()) <= 2.0**-11
    assert torch.equal(to_tf32(to_tf32(values)), to_tf32(values))
    assert to_tf32(torch.tensor([float("inf")])).isinf().all()


# The rest on the ways of CPUs, which nobody goes in these precisions: `python -m benchmarks.bound --reduced`.
HARD = [
    *[("on a GPU", data, cross_entropy) for data in HOSTILE],
    *[("on a CPU", data, cross_entropy) for data in ("an offset", "views that cancel")],
    *[(place, "views that cancel", alternating) for place in PLACES],
]


@pytest.mark.parametrize(("place", "data", "loss"), HARD)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", REDUCED)
def test_contributions_are_within_the_bound(
    precision: str,
    name: str,
    place: str,
    data: str,
    loss: Any,
    go: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here, where an example's company changes nothing, without the margin that is kept for it."""
    go(place)
    monkeypatch.setattr(Options, "margin", 1.0)
    torch.manual_seed(7)
    model, inputs = build(name), HOSTILE[data](ordinary(7))
    every = list(range(5))
    _, norms, _ = total(model, inputs, every, loss, FlatClip(1.0), precision)
    clip = FlatClip(float(norms.median()) / 3.0)
    whole, norms, mode = total(model, inputs, every, loss, clip, precision)
    assert whole.dtype == torch.float32
    assert norms.dtype == torch.float64
    assert mode.rounded or precision == "bfloat16"
    assert mode.whole, "what the engine itself multiplies"
    rounding = 1e-6 * float(whole.norm())
    for example in every:
        rest = [other for other in every if other != example]
        added = float((whole.double() - total(model, inputs, rest, loss, clip, precision)[0].double()).norm())
        assert added <= clip.clip_norm * (1 + 1e-6) + rounding


def plain(model: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """The sum of gradients by ordinary autograd, one example at a time, in the same arithmetic."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = torch.zeros(sum(p.numel() for p in parameters))
    with Options(precision=precision).arithmetic(torch.device("cpu")), Tf32():
        for views, target in zip(inputs, TARGETS, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                outputs = model(views)
            loss = cross_entropy(outputs.float(), target.expand(len(views))).mean()
            sums += torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    return sums


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_ordinary_training_in_that_precision(
    name: str, precision: str, place: str, go: Callable[[str], None]
) -> None:
    go(place)
    model, inputs = build(name), ordinary()
    found, _, _ = total(model, inputs, list(range(5)), cross_entropy, FlatClip(1e9), precision)
    expected = plain(model, inputs, precision)
    margin = Options(precision=precision).margin
    assert (found / margin - expected).norm() < 0.02 * expected.norm()


def test_hostile_trials_of_whole_models() -> None:
    """Some of those of `python -m benchmarks.bound --reduced`."""
    trials = [reduced.trial(number) for number in range(2 * len(MODELS))]
    assert not [t for t in trials if t.wrong]
    assert max(t.longest for t in trials) > 0.999


def weighed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of labels (n, 2) with a weight each."""
    return F.cross_entropy(outputs, targets[:, 0].long(), reduction="none") * targets[:, 1]


# vmap and Opacus are in float32.
WAYS = [
    *[("bookkeeping", precision, count) for precision in ("float32", *REDUCED) for count in (2, 5)],
    ("vmap", "float32", 2),
    ("opacus", "float32", 2),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("engine", "precision", "examples"), WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_an_example_that_is_missing_changes_no_bit_of_the_others(
    name: str, engine: str, precision: str, examples: int, place: str, go: Callable[[str], None]
) -> None:
    """A piece has the size it would have with it: where single examples, and others, take other kernels."""
    go(place)
    model, inputs = build(name), HOSTILE["views that cancel"](ordinary(7))[:examples]
    targets = torch.stack([torch.arange(examples) % 5, torch.ones(examples)], dim=1)
    options = Options(precision=precision) if engine == "bookkeeping" else None

    def summed(kept: Tensor, labels: Tensor) -> Tensor:
        with Tf32():
            return clipped_gradient_sum(
                model,
                kept,
                labels,
                FlatClip(1e-3),
                loss=weighed,
                engine=engine,
                physical_batch_size=2 * examples,
                options=options,
            ).sum

    without = targets.clone()
    without[-1, 1] = 0.0
    there, missing = summed(inputs, without), summed(inputs[:-1], targets[:-1])
    if precision == "float32" and examples > 2 and place == "on a CPU":  # rounding of the addition
        assert (there - missing).norm() <= 1e-6 * missing.norm()
    else:
        assert torch.equal(there, missing)


def test_what_a_batch_is_filled_up_with_does_not_count() -> None:
    model, inputs = build("cnn"), ordinary(7)
    sums = [
        clipped_sum(model, inputs[:2], TARGETS[:2], cross_entropy, FlatClip(0.1), Options(fill=fill))
        for fill in (1, 5)
    ]
    for one, other in zip(*sums, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)


class _Direction(torch.autograd.Function):
    """A backward pass that is not linear: it gives the direction of the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / gradient.norm()


class Directed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.last(_Direction.apply(self.first(inputs)))
        return found


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_copies_have_gradients_like_any_other(examples: int) -> None:
    """Of weight zero they would be 0 / 0 here, and the whole sum with them."""
    model, inputs, targets = Directed(), torch.randn(examples, 1, 3), torch.zeros(examples).long()
    sums = [
        clipped_gradient_sum(model, inputs, targets, FlatClip(0.1), engine=engine).sum
        for engine in ("bookkeeping", "vmap")
    ]
    assert torch.isfinite(sums[0]).all()
    torch.testing.assert_close(sums[0], sums[1])
