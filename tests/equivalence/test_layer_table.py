"""Rows of `benchmarks.layers` that need no package of their own, and a judge that notices what is wrong."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import judge as judging
from benchmarks.layers.case import Case
from benchmarks.layers.judge import judge
from benchmarks.layers.rows import layers
from fedsim.grads import clipped_gradient_sum
from fedsim.types import ClippedSum
from fedsim.validate import InputError

CASES = layers()
EVERY = 4  # all rows take two minutes
# Kinds that broke once: a check that is not repeated, an axis that is guessed, norms, modes, batches.
ALWAYS = (
    "GRU", "LSTM, time first", "layer applied at marked positions", "without axes", "learned queries",
    "hook that freezes rows", "BatchNorm2d, frozen", "GRU on packed sequences", "EmbeddingBag, mean, offsets",
    "checkpoint, reentrant", "own function of the old form", "TorchScript, traced", "complex intermediates",
    "written through a view", "named arrays, mapping out", "boxes and kinds, mappings", "branch on the data",
    "a loss that mixes examples", "a model that centres over the batch",
    "BatchNorm1d in train mode mixes examples",
)  # fmt: skip
TESTED = [case for place, case in enumerate(CASES) if place % EVERY == 0 or case.name in ALWAYS]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.name)
def test_a_row_is_right_at_the_first_call_and_after_updates(case: Case) -> None:
    assert judge(case)["wrong"] == []


def test_names_are_unique_and_those_always_tested_exist() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 120
    assert set(ALWAYS) <= set(names)


def _owns_parameters(kind: type[nn.Module]) -> bool:
    """Whether torch.nn's class itself, or one it is made from, makes parameters."""
    bases = [
        base
        for base in kind.__mro__
        if base.__module__.startswith("torch.nn.modules") and base is not nn.Module
    ]
    return any("Parameter(" in inspect.getsource(base.__init__) for base in bases if "__init__" in vars(base))


def test_every_layer_of_torch_nn_with_parameters_has_a_row() -> None:
    own = {
        kind
        for kind in vars(nn).values()
        if inspect.isclass(kind)
        and issubclass(kind, nn.Module)
        and kind is not nn.Module
        and _owns_parameters(kind)
    }
    assert {nn.Linear, nn.GRUCell, nn.ConvTranspose3d, nn.MultiheadAttention, nn.RMSNorm} <= own
    containers = {nn.AdaptiveLogSoftmaxWithLoss, nn.Transformer, nn.TransformerDecoder, nn.TransformerEncoder}
    lazy = {kind for kind in own if issubclass(kind, nn.modules.lazy.LazyModuleMixin)}
    bases = {nn.RNNBase, nn.RNNCellBase}
    with torch.random.fork_rng(devices=[]):
        seen = {type(part) for case in CASES for part in case.build().modules()}
    missing = (own | containers) - lazy - bases - {nn.ParameterList, nn.ParameterDict} - seen
    assert not {kind.__name__ for kind in missing}
    assert {nn.ParameterList, nn.ParameterDict} <= seen


def _refusing(*_: Any, **__: Any) -> ClippedSum:
    raise InputError("no.")


def _changed(change: Callable[[Tensor], Tensor]) -> Callable[..., ClippedSum]:
    def engine(*arguments: Any, **named: Any) -> ClippedSum:
        answer = clipped_gradient_sum(*arguments, **{**named, "engine": "vmap"})
        return ClippedSum(change(answer.sum), *list(vars(answer).values())[1:])

    return engine


def _once(change: Callable[[Tensor], Tensor]) -> Callable[..., ClippedSum]:
    """Right in the first call, and wrong where the last layer's weights have moved."""

    def engine(model: nn.Module, *arguments: Any, **named: Any) -> ClippedSum:
        moved = any(bool(p.any()) for name, p in model.named_parameters() if name.startswith("head"))
        wrong = _changed(change if moved else lambda total: total)
        return wrong(model, *arguments, **named)

    return engine


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (_changed(lambda total: total * (1 + 1e-4)), "float32 error"),
        (_changed(lambda total: total.float().to(total.dtype)), "float64 error"),
        (_changed(lambda total: total * 1.00001), "contribution"),
        (
            _changed(lambda total: torch.where(torch.arange(len(total)) == 3, 0 * total, total)),
            "float32 error",
        ),
        (_once(lambda total: total * 1.1), "float64 error"),
        (_refusing, "refused"),
    ],
    ids=["a little too much", "float32 only", "longer than C", "one entry", "second call", "refusal"],
)
def test_the_judge_notices(
    engine: Callable[..., ClippedSum], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = named("Linear")
    assert judge(case, "vmap")["wrong"] == []
    monkeypatch.setattr(judging, "clipped_gradient_sum", engine)
    assert any(said in wrong for wrong in judge(case)["wrong"])


def test_the_judge_wants_a_refusal_where_examples_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("a loss that mixes examples")
    monkeypatch.setattr(judging, "clipped_gradient_sum", _refusing)
    assert judge(case)["wrong"] == []
    served = dataclasses.replace(named("Linear"), refused=True)
    monkeypatch.undo()
    assert judge(served)["wrong"]
