"""One trial: a tiny model, a hostile batch, a clip rule, an engine; what does each example add?

The loss is the sum of outputs times targets, so that the targets are the gradient of the outputs: any
gradient can be had. What an example adds is the sum with it minus the sum without it. Its length, and
for rules with groups that of each group's part, may be at most the bound times 1 + `BOUND`, and `BOUND` times
the length of the longer sum for the rounding of the addition. Every example of every trial is one case.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.bound.hostile import FILLS, inputs, kinds
from benchmarks.bound.rules import RULES
from fedsim.clipping.grouped import ClipGroup, GroupedClip
from fedsim.clipping.per_layer import PerLayerClip
from fedsim.grads import ClipRule, FlatClip, NormalisedClip, clipped_gradient_sum, trainable_names
from fedsim.grads.per_example import clipped_gradient_sums

BOUND = 1e-6
MOST = 8  # examples of a batch
CLIPS = ("flat", "flat", "normalised", "per_layer", "grouped")
WAYS = ("bookkeeping",) * 6 + ("vmap", "by owner")
OWNERS = 2

Sum = Callable[[nn.Module, Tensor, Tensor, ClipRule], Tensor]
"""(model, inputs, targets, clip) -> the sum (owners, P)."""


@dataclass(frozen=True)
class Trial:
    """What was drawn, and the largest part of its bound that an example took.

    Attributes:
        number: of the trial; draws it again.
        cases: examples judged.
        excess: of the longest contribution: its length less what is allowed, / C; at most 0 is right.
        longest: its length / C.
        problem: what the engine raised, or "".
    """

    number: int
    rule: str
    inputs: str
    gradients: str
    clip: str
    way: str
    cases: int
    excess: float
    longest: float
    problem: str = ""

    @property
    def wrong(self) -> bool:
        """Whether a contribution is too long, or there is none."""
        return bool(self.problem) or not self.excess <= 0


def by_engine(name: str) -> Sum:
    """The public function with an engine."""
    return lambda model, inputs, targets, clip: clipped_gradient_sum(
        model, inputs, targets, clip, loss=product, engine=name
    ).sum[None]


def by_owner(model: nn.Module, inputs: Tensor, targets: Tensor, clip: ClipRule) -> Tensor:
    """The sums of `OWNERS` owners, to whom the examples belong in turn."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    totals = torch.zeros(OWNERS, parameters)
    # The last examples keep their owner when one before them is left out.
    owners = torch.arange(len(inputs)) % OWNERS
    clipped_gradient_sums(model, inputs, targets, clip, owners, totals, loss=product)
    return totals


SUMS: dict[str, Sum] = {
    "bookkeeping": by_engine("bookkeeping"),
    "vmap": by_engine("vmap"),
    "by owner": by_owner,
}


def product(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of outputs times targets, (n,)."""
    return (outputs * targets).flatten(1).sum(1)


def trial(number: int, sums: dict[str, Sum] = SUMS) -> Trial:
    """Draw trial `number` and judge it.

    Args:
        sums: by way, what is judged; another one shows that the judge notices.
    """
    draw = random.Random(number)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        rule = list(RULES)[number % len(RULES)]
        drawn = RULES[rule](draw)
        examples, views = draw.randint(1, MOST), draw.choice((1, 1, 2))
        kind, steep = kinds(draw, rule == "standardised")
        batch = inputs(draw, drawn, kind, examples, views)
        with torch.no_grad():
            shape = drawn.model(batch.flatten(0, 1)[:1]).shape[1:]
        targets = FILLS[steep](draw, (examples, *shape))
        clip_name, way = draw.choice(CLIPS), draw.choice(WAYS)
    clip = clip_of(
        clip_name, drawn.model, scale(drawn.model, batch, targets) * 10 ** draw.uniform(-2, 0.3), draw
    )
    found = rule, kind, steep, clip_name, way, examples
    try:
        excess, longest = contributions(
            drawn.model,
            batch,
            targets,
            clip,
            sums[way],
            stays=sums[way] is by_owner,  # so that the others keep their owners
        )
    except Exception as problem:
        return Trial(number, *found, math.inf, math.inf, f"{type(problem).__name__}: {problem}"[:200])
    return Trial(number, *found, excess, longest)


def contributions(
    model: nn.Module, inputs: Tensor, targets: Tensor, clip: ClipRule, sums: Sum, stays: bool
) -> tuple[float, float]:
    """Return the largest excess, and the largest length, of what examples add to the parts of the sum.

    Args:
        stays: an example is left out by giving its gradient the weight zero, and stays in the batch.
    """
    everyone = torch.arange(len(inputs))
    pieces = _pieces(model, clip)
    with_all = sums(model, inputs, targets, clip).double()
    worst, longest = -math.inf, 0.0
    for example in everyone:
        if stays:
            rest = targets.clone()
            rest[example] = 0.0
            without = sums(model, inputs, rest, clip).double()
        else:
            kept = everyone[everyone != example]
            without = sums(model, inputs[kept], targets[kept], clip).double()
        for piece, bound in pieces:
            change = float((with_all - without)[:, piece].norm()) / bound
            sum_of_all = max(float(with_all[:, piece].norm()), float(without[:, piece].norm())) / bound
            excess = change - (1 + BOUND + BOUND * sum_of_all)
            if not excess <= worst:
                worst, longest = excess, change
    return worst, longest


def _pieces(model: nn.Module, clip: ClipRule) -> list[tuple[Tensor, float]]:
    """Return the entries and the bound of each group of parameters that are clipped together."""
    groups = clip.group_of(trainable_names(model))
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    if groups is None:
        return [(torch.arange(sum(sizes)), clip.sensitivity)]
    assert isinstance(clip, PerLayerClip | GroupedClip)
    of_entry = torch.tensor(groups).repeat_interleave(torch.tensor(sizes))
    bounds = clip.bounds(max(groups) + 1)
    return [((of_entry == group).nonzero().flatten(), bound) for group, bound in enumerate(bounds)]


def scale(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Length of a typical gradient, by plain autograd, one example at a time; 1 where there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    lengths = []
    for views, target in zip(inputs, targets, strict=True):
        value = product(model(views), target.expand(len(views), *target.shape)).mean()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        lengths.append(math.hypot(*(float(g.double().norm()) for g in found if g is not None)))
    middle = sorted(lengths)[len(lengths) // 2]
    return middle if math.isfinite(middle) and middle > 1e-30 else 1.0


def clip_of(name: str, model: nn.Module, bound: float, draw: random.Random) -> ClipRule:
    names = trainable_names(model)
    if name == "normalised":
        return NormalisedClip(bound, bound * draw.choice((1e-3, 1.0)))
    if name == "per_layer":
        return PerLayerClip(bound)
    if name == "grouped" and len(names) > 1:
        return GroupedClip(bound, {"first": ClipGroup([names[0]], 2.0), "rest": ClipGroup(list(names[1:]))})
    return FlatClip(bound)
