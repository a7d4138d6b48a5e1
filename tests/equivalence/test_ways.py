"""Every kind of model, batch and loss gets the right sum by every engine: it follows, or the next way does.

The oracle takes one example at a time by plain autograd in float64 and clips by its own few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedsim.clipping.per_layer import PerLayerClip
from fedsim.grads import ENGINES, FlatClip, autograd, clipped_gradient_sum
from fedsim.grads.batch import Batch, take
from fedsim.grads.local_training import LocalTraining, local_update
from fedsim.grads.microbatch import Loss
from fedsim.grads.per_example import clipped_gradient_sums

B, K, C = 6, 2, 0.05


def one(batch: Batch, row: int) -> Any:
    return batch[row].clone() if isinstance(batch, Tensor) else {n: a[row].clone() for n, a in batch.items()}


def repeated(target: Any) -> Any:
    if isinstance(target, Tensor):
        return torch.stack([target] * K)
    return {name: torch.stack([array] * K) for name, array in target.items()}


def rows_by_autograd(
    model: nn.Module, run: Callable[[nn.Module, Any], Any], case: Case
) -> list[list[Tensor]]:
    """Gradients of each example by `.backward()` on a model of its own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row in range(B):
        for p in parameters:
            p.grad = None
        losses = case.loss(run(model, one(case.inputs, row)), repeated(one(case.targets, row)))
        (losses.sum() / K).backward()
        zeros = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found.append([g.to_dense() if g.is_sparse else g for g in zeros])
    return found


def clipped(gradients: list[list[Tensor]], bound: float) -> Tensor:
    """Scale each row to at most `bound` and add up."""
    rows = torch.stack([torch.cat([g.reshape(-1) for g in parts]) for parts in gradients])
    return sum(row * min(1.0, bound / (float(row.norm()) + 1e-6)) for row in rows)  # type: ignore[return-value]


@dataclass
class Case:
    make: Callable[[], nn.Module]
    inputs: Batch
    targets: Batch
    loss: Loss
    run: Callable[[nn.Module, Any], Any] = lambda model, views: model(views)


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_numbers(below: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


VECTORS, LABELS = numbers(B, K, 5), whole_numbers(4, B)
IDS = whole_numbers(20, B, K, 7)


class Tagger(nn.Module):
    """Named arrays in, a mapping out: ids, a mask of their own dtype, and floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        assert scale is not None
        assert (ids.dtype, mask.dtype, scale.dtype) == (torch.int64, torch.bool, self.mix.weight.dtype)
        words = torch.cat([self.embed(ids), scale[..., None]], dim=-1)
        hidden = torch.tanh(self.mix(words)).masked_fill(~mask[..., None], 0.0)
        return {"tags": self.head(hidden), "pooled": (hidden.mean(1), mask.sum(1))}


def tagging(outputs: Any, targets: Any) -> Tensor:
    assert targets["tags"].dtype == torch.int64
    tags = F.cross_entropy(outputs["tags"].flatten(0, 1), targets["tags"].flatten(), reduction="none")
    weighted = tags.view(targets["tags"].shape) * targets["weights"]
    return weighted.sum(1) + outputs["pooled"][0].square().sum(1)


class OneMapping(Tagger):
    """Takes the mapping itself."""

    def forward(self, batch: Mapping[str, Tensor]) -> Any:  # type: ignore[override]
        return super().forward(batch["ids"], batch["mask"], batch["scale"])


@dataclass
class Outputs:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Wrapped(nn.Module):
    """Returns an object of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Outputs:
        hidden = torch.tanh(self.inner(x))
        return Outputs(self.head(hidden), (hidden,))


class Net(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor] = lambda _, x: torch.tanh(x)) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.inner(x)))


class Square(torch.autograd.Function):
    """A custom function in the old form, whose gradient is its own: three times, not twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x * gradient


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: torch.tanh(y @ model.square), x, use_reentrant=True)


def not_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: torch.tanh(y @ model.square), x, use_reentrant=False)


def with_square(between: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    model = Net(between)
    model.square = nn.Parameter(torch.randn(6, 6))
    return model


class Gathered(nn.Module):
    """Works on the marked positions only, of which examples have different numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = x.clone()
        marked = ids < 5
        y[marked] = torch.tanh(self.inner(x[marked]))
        return self.head(y.mean(1))


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.filter, self.head = nn.Linear(5, 8), nn.Parameter(torch.randn(5)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.inner(x)) * self.filter
        return self.head(torch.fft.irfft(spectrum, n=8) + spectrum.abs().sum(-1, keepdim=True))


class Scalars(nn.Module):
    """A parameter without axes, one without entries, one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.temperature = nn.Linear(5, 4), nn.Parameter(torch.tensor(0.3))
        self.nothing, self.unused = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.temperature.exp() + self.nothing.sum()


class ByValue(nn.Module):
    """Which layer is used depends on the example."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.head(torch.tanh((self.one if r.sum() > 0 else self.other)(r[None]))) for r in x]
        )


class PastTheModule(nn.Module):
    """Uses a parameter through a list that function transforms do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.held = [self.head.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + torch.tanh(x @ self.held[0].t())


class Remembers(nn.Module):
    """Leaves what it saw in attributes, a list and a mode, as hooks and caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last, self.seen = nn.Linear(5, 4), None, []
        self.quiet = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.append(x)
        self.quiet.eval()
        self.new = len(self.seen)
        return self.head(x)


def double_backward_hook() -> nn.Module:
    model = Net()
    model.inner.register_full_backward_hook(
        lambda _, before, after: tuple(2 * g if g is not None else g for g in before)
    )
    model.head.register_full_backward_hook(lambda _, before, after: tuple(3 * g for g in before))
    return model


def hooked_parameter() -> nn.Module:
    model = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(28, 4))
    mask = torch.ones(20, 1)
    mask[:8] = 0
    model[0].weight.register_hook(lambda g: g * mask)
    return model


def hooked_activation() -> nn.Module:
    def between(_: nn.Module, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        y.register_hook(lambda g: -5 * g)
        return y

    return Net(between)


def own_forward() -> nn.Module:
    model = Tagger()
    inner = model.forward
    model.forward = lambda **named: inner(**named)  # type: ignore[method-assign]
    return model


def frozen_norm() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    model[1].running_mean.copy_(torch.randn(8))
    model[1].running_var.copy_(torch.rand(8) + 0.5)
    model[1].eval()
    return model


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.ELU(inplace=True),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (4, 2)),
        nn.Conv1d(4, 4, 1),
        nn.SiLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Writes(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0).add_(1.0)
        return self.head(x)


def writing_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    targets = targets.clone() if 0 in targets.stride() else targets
    targets[targets == 3] = 0
    return cross_entropy(outputs, targets)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 1:
            return self.head(torch.tanh(self.inner(x)))
        return x


def named(model: nn.Module, views: Any) -> Any:
    return model(**views)


TAGS = {"ids": IDS, "mask": whole_numbers(2, B, K, 7, seed=1).bool(), "scale": numbers(B, K, 7)}
TAGGED = {"tags": whole_numbers(3, B, 7), "weights": numbers(B, 7).abs()}
CASES = {
    "named arrays": Case(Tagger, TAGS, TAGGED, tagging, named),
    "mapping as one argument": Case(OneMapping, TAGS, TAGGED, tagging),
    "forward of its own": Case(own_forward, TAGS, TAGGED, tagging, named),
    "output object": Case(
        Wrapped, VECTORS, LABELS, lambda o, t: cross_entropy(o.logits, t) + o.hidden[0].sum(1)
    ),
    "regression targets": Case(
        Net, VECTORS, numbers(B, 4).float(), lambda o, t: F.mse_loss(o, t, reduction="none").sum(1)
    ),
    "custom function": Case(lambda: Net(lambda _, x: Square.apply(x)), VECTORS, LABELS, cross_entropy),
    "re-entrant checkpoint": Case(lambda: with_square(reentrant), VECTORS, LABELS, cross_entropy),
    "checkpoint": Case(lambda: with_square(not_reentrant), VECTORS, LABELS, cross_entropy),
    "boolean mask": Case(Gathered, IDS, LABELS, cross_entropy),
    "sparse embedding": Case(
        lambda: nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(28, 4)),
        IDS,
        LABELS,
        cross_entropy,
    ),
    "complex numbers": Case(Spectrum, VECTORS, LABELS, cross_entropy),
    "parameters without axes or entries": Case(Scalars, VECTORS, LABELS, cross_entropy),
    "branches by value": Case(ByValue, VECTORS, LABELS, cross_entropy),
    "parameter past its module": Case(PastTheModule, VECTORS, LABELS, cross_entropy),
    "model that remembers": Case(Remembers, VECTORS, LABELS, cross_entropy),
    "module backward hooks": Case(double_backward_hook, VECTORS, LABELS, cross_entropy),
    "parameter hook": Case(hooked_parameter, IDS, LABELS, cross_entropy),
    "activation hook": Case(hooked_activation, VECTORS, LABELS, cross_entropy),
    "frozen batch norm": Case(frozen_norm, VECTORS, LABELS, cross_entropy),
    "in-place layers": Case(in_place, VECTORS, LABELS, cross_entropy),
    "writes into its input": Case(Writes, VECTORS, LABELS, cross_entropy),
    "loss writes into targets": Case(Net, VECTORS, LABELS, writing_loss),
    "TorchScript": Case(lambda: torch.jit.script(Scripted()), VECTORS, LABELS, cross_entropy),
    "traced": Case(lambda: torch.jit.trace(Scripted(), torch.ones(2, 5)), VECTORS, LABELS, cross_entropy),
}


def built(case: Case, dtype: torch.dtype) -> nn.Module:
    """The case's model; the same values in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return case.make().to(dtype)


def copied(batch: Batch) -> Batch:
    return (
        batch.clone() if isinstance(batch, Tensor) else {name: array.clone() for name, array in batch.items()}
    )


def same(one: Batch, other: Batch) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)  # type: ignore[arg-type]
    return all(torch.equal(one[name], other[name]) for name in one)  # type: ignore[index]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("name", CASES)
def test_every_engine_ends_in_the_right_sum(name: str, engine: str) -> None:
    case = CASES[name]
    gradients = rows_by_autograd(built(case, torch.float64), case.run, case)
    norms = torch.tensor([math.hypot(*(float(g.norm()) for g in parts)) for parts in gradients])
    assert (norms > 2 * C).any(), "clipping must matter"
    wanted = clipped(gradients, C)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = built(case, dtype)
        inputs, targets = copied(case.inputs), copied(case.targets)
        for physical in (256, 2 * K, 1):
            found = clipped_gradient_sum(
                model,
                inputs,
                targets,
                FlatClip(C),
                loss=case.loss,
                engine=engine,
                physical_batch_size=physical,
            )
            error = float((found.sum.double() - wanted).norm() / wanted.norm())
            assert error <= tolerance, (dtype, physical, error)
            torch.testing.assert_close(found.norms.float(), norms, rtol=1e-4, atol=1e-6)
            assert same(inputs, case.inputs), "the caller's data"
            assert same(targets, case.targets), "the caller's data"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_sums_by_owner_are_right(name: str) -> None:
    case = CASES[name]
    gradients = rows_by_autograd(built(case, torch.float64), case.run, case)
    owners = torch.tensor([2, 0, 2, 2, 0, 0])
    model = built(case, torch.float64)
    length = sum(p.numel() for p in model.parameters())
    totals = torch.ones(3, length, dtype=torch.float64)
    norms, losses, _ = clipped_gradient_sums(
        model, copied(case.inputs), copied(case.targets), FlatClip(C), owners, totals, case.loss
    )
    for owner in range(3):
        own = [parts for parts, place in zip(gradients, owners, strict=True) if place == owner]
        wanted = clipped(own, C) if own else torch.zeros(length, dtype=torch.float64)
        torch.testing.assert_close(totals[owner], wanted + 1.0, rtol=1e-9, atol=1e-11)
    assert norms.shape == losses.shape == (B,)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("name", ["boolean mask", "custom function", "re-entrant checkpoint", "named arrays"])
def test_clipping_by_layer_on_every_way(name: str, engine: str) -> None:
    case = CASES[name]
    model = built(case, torch.float64)
    gradients = rows_by_autograd(built(case, torch.float64), case.run, case)
    layers = [n.rpartition(".")[0] for n, _ in model.named_parameters()]
    kinds = sorted(set(layers))
    bound = C / math.sqrt(len(kinds))
    parts = {
        layer: [[g for g, own in zip(row, layers, strict=True) if own == layer] for row in gradients]
        for layer in kinds
    }
    found = clipped_gradient_sum(
        model, case.inputs, case.targets, PerLayerClip(C), loss=case.loss, engine=engine
    )
    sizes = [p.numel() for p in model.parameters()]
    for layer in kinds:
        own = torch.cat([g for g, n in zip(found.sum.split(sizes), layers, strict=True) if n == layer])
        torch.testing.assert_close(own, clipped(parts[layer], bound), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize(
    "name", ["custom function", "re-entrant checkpoint", "complex numbers", "writes into its input"]
)
def test_an_example_that_is_not_finite_adds_nothing_on_every_way(name: str, engine: str) -> None:
    case = CASES[name]
    inputs = VECTORS.clone()
    inputs[2, 1, 3] = math.nan
    gradients = rows_by_autograd(built(case, torch.float64), case.run, case)
    wanted = clipped(gradients[:2] + gradients[3:], C)
    model = built(case, torch.float64)
    found = clipped_gradient_sum(model, inputs, LABELS, FlatClip(C), loss=case.loss, engine=engine)
    assert torch.isfinite(found.norms).tolist() == [True, True, False, True, True, True]
    torch.testing.assert_close(found.sum, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["named arrays", "mapping as one argument", "sparse embedding", "frozen batch norm"]
)
def test_local_training_takes_batches_of_any_form(name: str) -> None:
    """Against SGD written out: two passes of two batches, in the order that is given."""
    case = CASES[name]
    first = take(case.inputs, (slice(None), 0))
    how, order = LocalTraining(epochs=2, batch_size=4, learning_rate=0.3), np.random.default_rng(5)
    model = built(case, torch.float64)
    update, _ = local_update(model, first, case.targets, how, order, case.loss)
    wanted, shuffles = built(case, torch.float64), np.random.default_rng(5)
    start = torch.cat([p.detach().clone().reshape(-1) for p in wanted.parameters()])
    for _ in range(2):
        shuffled = torch.from_numpy(shuffles.permutation(B))
        for rows in (shuffled[:4], shuffled[4:]):
            wanted.zero_grad()
            case.loss(case.run(wanted, take(first, rows)), take(case.targets, rows)).mean().backward()
            with torch.no_grad():
                for p in wanted.parameters():
                    p -= 0.3 * (p.grad.to_dense() if p.grad.is_sparse else p.grad)
    end = torch.cat([p.detach().reshape(-1) for p in wanted.parameters()])
    torch.testing.assert_close(update, start - end, rtol=1e-9, atol=1e-12)
    assert update.any()


class Tokens(nn.Module):
    """Places as tokens behind a frozen batch norm, of torch or written out."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 2), nn.BatchNorm2d(6).eval(), nn.Linear(6, 4)
        self.written_out = written_out
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, inputs: Tensor) -> Tensor:
        maps, norm = self.conv(inputs), self.norm
        if self.written_out:
            mean, var, gain, offset = (
                t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
            maps = (maps - mean) / (var + norm.eps).sqrt() * gain + offset
        else:
            maps = norm(maps)
        return self.head(torch.tanh(maps.flatten(2).transpose(1, 2)).mean(1))


def test_a_single_view_behind_a_frozen_batch_norm() -> None:
    """torch's own backward pass is wrong for one row whose gradient comes transposed."""
    sums = []
    for written_out in (True, False):
        torch.manual_seed(0)
        model = Tokens(written_out).double()
        inputs, targets = numbers(3, 1, 3, 5, 5).double(), torch.arange(3)
        sums.append(autograd.clipped_sum(model, inputs, targets, cross_entropy, FlatClip(0.5))[0])
    torch.testing.assert_close(sums[1], sums[0])
