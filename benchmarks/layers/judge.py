"""The judge: one example at a time in float64, written without the package's own gradients.

A row is right when, at the first call and after five updates,
* the float64 sum is off by at most `DOUBLE` of the exact sum's length;
* the float32 sum is off by at most three times what plain float32 autograd, one example at a time, is off,
  or `SINGLE` where that is more;
* no example adds (the sum with it minus the sum without it) more than C (1 + `BOUND`), and `BOUND` of the
  sum's length for the rounding of the addition.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import Batch, Case
from fedsim.grads import FlatClip, clipped_gradient_sum
from fedsim.validate import FedsimError

UPDATES = 5
DOUBLE = 1e-9
SINGLE = 1e-5
BOUND = 1e-6


@dataclass(frozen=True)
class Moment:
    """What was seen at one moment of a case: before, or after the updates.

    Attributes:
        served: log lines of the engine.
        error64, error32: of the clipped sum, relative to the exact one's length.
        plain32: the same of plain float32 autograd, one example at a time.
        longest: longest contribution / C.
        rounding: of the addition, allowed beside the bound, / C.
    """

    served: tuple[str, ...]
    error64: float
    error32: float
    plain32: float
    longest: float
    rounding: float

    def wrong(self) -> list[str]:
        """Say which rules are broken."""
        out = []
        if not self.error64 <= DOUBLE:
            out.append(f"float64 error {self.error64:.1e}")
        if not self.error32 <= max(3 * self.plain32, SINGLE):
            out.append(f"float32 error {self.error32:.1e} (plain {self.plain32:.1e})")
        if not self.longest <= 1 + BOUND + self.rounding:
            out.append(f"contribution {self.longest:.7f} C")
        return out


def judge(case: Case, engine: str = "bookkeeping") -> dict[str, Any]:
    """Return the row of a case: its moments, and what is wrong, if anything."""
    row: dict[str, Any] = {"group": case.group, "name": case.name, "refused": False, "moments": []}
    wrong: list[str] = []
    try:
        for moment in moments(case, engine):
            row["moments"].append(asdict(moment))
            wrong += moment.wrong()
        if case.refused:
            wrong.append("must be refused: no gradient of one example is defined")
    except FedsimError as refusal:
        row["refused"], row["problem"] = True, str(refusal)
        if not case.refused:
            wrong.append(f"refused: {refusal}")
    except Exception as problem:
        row["problem"] = f"{type(problem).__name__}: {problem}"
        wrong.append(row["problem"])
    row["wrong"] = wrong
    row["served"] = served([line for moment in row["moments"] for line in moment["served"]])
    return row


def served(lines: Sequence[str]) -> str:
    """Say by the engines' log lines how the gradients came about; what is not logged is book-keeping."""
    if any("one example at a time" in line for line in lines):
        return "one example at a time"
    if any("vmap over the whole model" in line for line in lines):
        return "vmap"
    return "book-keeping, part by vmap" if any("come from vmap" in line for line in lines) else "book-keeping"


def moments(case: Case, engine: str) -> Iterator[Moment]:
    """Judge a case at its start, and with the same models after `UPDATES` plain SGD updates."""
    inputs, targets = case.batch()
    oracle, single, double = case.build(), case.build(), case.build()
    plain = case.build()
    oracle.double(), double.double()
    for updates in (0, UPDATES):
        for _ in range(updates):
            with float64():
                _update(oracle, alone(case, oracle, widened(inputs), widened(targets)).mean(0), case.rate)
        _adopt(oracle, (single, plain))  # rounded to float32, ...
        _adopt(single, (oracle, double))  # ... which all of them then hold exactly
        yield _moment(case, engine, inputs, targets, oracle, single, double, plain)


def _moment(
    case: Case,
    engine: str,
    inputs: Batch,
    targets: Batch,
    oracle: nn.Module,
    single: nn.Module,
    double: nn.Module,
    plain: nn.Module,
) -> Moment:
    wide = widened(inputs), widened(targets)
    with float64():
        rows = alone(case, oracle, *wide)
    norms = rows.norm(dim=1)
    bound = float(norms.median()) or 1.0  # half of the examples are clipped
    wanted = clipped(rows, bound)
    rule = FlatClip(bound)

    def engine_sum(model: nn.Module, inputs: Batch, targets: Batch, keep: Tensor) -> Tensor:
        return clipped_gradient_sum(
            model, taken(inputs, keep), taken(targets, keep), rule, loss=case.loss, engine=engine
        ).sum.double()

    everyone = torch.arange(case.examples)
    with listened() as lines:
        total = engine_sum(single, inputs, targets, everyone)
    added = [total - engine_sum(single, inputs, targets, everyone[everyone != i]) for i in everyone]
    with float64():
        exact = engine_sum(double, *wide, everyone)
    own = alone(case, plain, inputs, targets)
    return Moment(
        tuple(dict.fromkeys(lines)),
        error(exact, wanted),
        error(total, wanted),
        error(clipped(own.double(), bound), wanted),
        max(float(change.norm()) for change in added) / bound,
        BOUND * float(total.norm()) / bound,
    )


def alone(case: Case, model: nn.Module, inputs: Batch, targets: Batch) -> Tensor:
    """Gradients (B, P), each example on its own by plain autograd: of its mean loss over its views."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    count = len(next(iter(arrays(inputs))))
    rows = []
    for example in range(count):
        views = taken(inputs, example)
        target = taken(targets, example)
        each = len(next(iter(arrays(views))))
        repeated = mapped(lambda array, each=each: array.expand(each, *array.shape), target)
        with written_out_batch_norm():
            outputs = model(views) if case.whole or isinstance(views, Tensor) else model(**views)
        for parameter in parameters:
            parameter.grad = None
        case.loss(outputs, repeated).mean().backward()
        rows.append(torch.cat([_dense(p).flatten() for p in parameters]))
        for parameter in parameters:
            parameter.grad = None
    return torch.stack(rows).detach()


def clipped(rows: Tensor, bound: float) -> Tensor:
    """Sum of rows (B, P), each scaled down to `bound` where it is longer."""
    return (bound / (rows.norm(dim=1) + 1e-6)).clamp(max=1.0) @ rows


def error(found: Tensor, wanted: Tensor) -> float:
    """Distance relative to the length of what is wanted."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def arrays(batch: Batch) -> Iterator[Tensor]:
    """The arrays of a batch."""
    yield from [batch] if isinstance(batch, Tensor) else batch.values()


def mapped(function: Any, batch: Batch) -> Any:
    """The batch with every array replaced."""
    if isinstance(batch, Tensor):
        return function(batch)
    return {name: function(array) for name, array in batch.items()}


def taken(batch: Batch, rows: Tensor | int) -> Any:
    """Some examples of a batch."""
    return mapped(lambda array: array[rows], batch)


def widened(batch: Batch) -> Any:
    """The batch with floating arrays in float64."""
    return mapped(lambda array: array.double() if array.is_floating_point() else array, batch)


@contextmanager
def float64() -> Iterator[None]:
    """Let float64 be the default, for models that make tensors of their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def written_out_batch_norm() -> Iterator[None]:
    """Let frozen batch norms be plain arithmetic.

    On the CPU torch's own backward pass of them (2.14) is wrong for a batch of one row where the gradient
    comes transposed, which would make the judge wrong.
    """
    own = F.batch_norm

    def batch_norm(
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training or mean is None or variance is None:
            return own(x, mean, variance, weight, bias, training, momentum, eps)
        shape = (1, -1, *[1] * (x.dim() - 2))
        out = (x - mean.view(shape)) / (variance.view(shape) + eps).sqrt()
        out = out if weight is None else out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)

    F.batch_norm = batch_norm
    try:
        yield
    finally:
        F.batch_norm = own


@contextmanager
def listened() -> Iterator[list[str]]:
    """Collect what the gradient engines log."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, keep = logging.getLogger("fedsim.grads"), Keep()
    before = log.propagate
    log.addHandler(keep)
    log.propagate = False
    try:
        yield lines
    finally:
        log.removeHandler(keep)
        log.propagate = before


def _dense(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


def _update(model: nn.Module, gradient: Tensor, rate: float) -> None:
    start = 0
    with torch.no_grad():
        for p in [p for p in model.parameters() if p.requires_grad]:
            p -= rate * gradient[start : start + p.numel()].view_as(p)
            start += p.numel()


def _adopt(source: nn.Module, models: tuple[nn.Module, ...]) -> None:
    state: Mapping[str, Tensor] = {
        name: copy.deepcopy(value.detach()) for name, value in source.state_dict(keep_vars=True).items()
    }
    for model in models:
        own = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
