"""Nothing is left on a model."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.grads import FlatClip, clipped_gradient_sum
from fedsim.grads.state import ChangesState, left_as_found
from fedsim.validate import InputError


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.names, self.table, self.kinds, self.count = ["a"], {"one": 1}, {int}, 0
        self.object, self.line = (
            SimpleNamespace(count=0, rows=[SimpleNamespace(mean=1)], empty=[]),
            deque([1, 2], 2),
        )
        self.defaults = defaultdict(list, {"a": [1]})
        self.register_buffer("mean", torch.tensor([1.0, float("nan")]))
        self.inner.weight.grad = torch.ones(3, 3)


def change_everything(model: Model) -> None:
    model.eval()
    model.inner.train()
    model.names.append("b")
    model.names[0] = "c"
    model.table["one"] = 2
    model.kinds.clear()
    model.count += 1
    model.object.count, model.object.new = 1, 2
    model.object.rows[0].mean = 2
    model.object.empty.append(1)
    model.line.append(3)
    model.defaults["b"].append(2)
    del model.defaults["a"]
    model.new = 3
    model.extra = nn.Linear(2, 2)
    model.register_buffer("cache", torch.ones(2))
    del model.norm
    model.inner.register_forward_hook(lambda *_: None)
    model.inner.register_full_backward_hook(lambda *_: None)
    model.inner.weight.grad = None
    model.inner.bias.grad = torch.ones(3)
    model.inner.weight.grad_sample = 1
    model.inner.bias = nn.Parameter(torch.zeros(3))


def view(model: Model) -> Any:
    modules = {
        path: (
            list(vars(module)),
            {k: id(v) for k, v in vars(module).items()},
            {
                k: repr(v)
                for k, v in vars(module).items()
                if not k.startswith("_") and not isinstance(v, Tensor)
            },
            {
                k: [(name, id(x)) for name, x in v.items()]
                for k, v in vars(module).items()
                if isinstance(v, dict)
            },
        )
        for path, module in model.named_modules()
    }
    parameters = [(n, id(p), id(p.grad), list(vars(p))) for n, p in model.named_parameters()]
    return modules, parameters


def test_everything_is_put_back() -> None:
    model = Model()
    before = view(model)
    with left_as_found(model):
        change_everything(model)
        assert view(model) != before
    assert view(model) == before
    with pytest.raises(OSError, match="from the block"):
        in_the_block(model, change_everything, OSError("from the block"))
    assert view(model) == before


def in_the_block(model: Model, change: Any, problem: Exception | None = None) -> None:
    with left_as_found(model):
        change(model)
        if problem is not None:
            raise problem


def test_writing_into_a_parameter_is_refused() -> None:
    """The values stay as written: copies of all parameters would cost as much as the parameters."""
    model = Model()
    with pytest.raises(InputError, match=r"writes to inner.weight"), left_as_found(model), torch.no_grad():
        model.inner.weight.fill_(7.0)


def test_other_memory_of_a_parameter_is_put_back_and_refused() -> None:
    model = Model()
    before = model.inner.weight.detach().clone()
    with pytest.raises(InputError, match=r"writes to inner.weight"), left_as_found(model):
        model.inner.weight.data = torch.full_like(before, 7.0)
    assert torch.equal(model.inner.weight, before)


def test_writing_into_a_tensor_among_the_attributes_is_refused() -> None:
    model = Model()
    kept = torch.zeros(2)
    for attribute in (kept, [kept], {"a": (kept, [kept])}, SimpleNamespace(own=kept)):
        model.average = attribute
        with pytest.raises(InputError, match=r"writes into a tensor among its attributes"):
            in_the_block(model, lambda _: kept.add_(1.0))
        in_the_block(model, lambda _: kept * 2.0)


CHANGES: dict[str, Any] = {
    "in place": lambda model: model.mean.add_(1.0),
    "through data": lambda model: model.mean.data.zero_(),
    "another tensor": lambda model: setattr(model, "mean", model.mean * 2),
    "another shape": lambda model: setattr(model, "mean", torch.ones(5)),
    "removed": lambda model: delattr(model, "mean"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_buffer_is_put_back_and_named(how: str) -> None:
    model = Model()
    buffer, copy = model.mean, model.mean.clone()
    with (
        pytest.raises(InputError, match=r"leave the model's buffers alone, but it changes mean:"),
        left_as_found(model),
    ):
        CHANGES[how](model)
    assert model.mean is buffer
    assert torch.equal(buffer.nan_to_num(5.0), copy.nan_to_num(5.0))


@pytest.mark.parametrize("value", [torch.tensor([1.0, float("nan")]), torch.tensor(2.0)])
def test_the_same_value_in_another_tensor_is_no_change(value: Tensor) -> None:
    model = Model()
    model.mean = value
    with left_as_found(model):
        model.mean = model.mean.clone()
    assert model.mean is value


def test_a_problem_of_the_block_goes_first() -> None:
    model = Model()
    copy = model.mean.clone()
    with pytest.raises(OSError, match="mine"):
        in_the_block(model, CHANGES["through data"], OSError("mine"))
    assert torch.equal(model.mean.nan_to_num(5.0), copy.nan_to_num(5.0))


class Counts(nn.Module):
    seen: Tensor

    def __init__(self, rebinds: bool) -> None:
        super().__init__()
        self.head, self.rebinds = nn.Linear(3, 2), rebinds
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.rebinds:
            self.seen = self.seen + x.detach().sum()
        else:
            self.seen += 1
        return self.head(x)


@pytest.mark.parametrize("rebinds", [False, True])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "opacus"])
def test_a_forward_pass_that_changes_a_buffer_is_refused(engine: str, rebinds: bool) -> None:
    model = Counts(rebinds)
    seen = model.seen
    for _ in range(2):
        with pytest.raises(InputError, match="changes seen: through it examples would reach one another"):
            clipped_gradient_sum(
                model, torch.ones(4, 1, 3), torch.zeros(4).long(), FlatClip(1.0), engine=engine
            )
        assert model.seen is seen
        assert seen == 0


def test_batch_norm_in_train_mode_is_refused_whatever_the_views() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for views in (1, 3):
        with pytest.raises(InputError, match=r"eval mode|one example alone"):
            clipped_gradient_sum(model, torch.randn(4, views, 3), torch.zeros(4).long(), FlatClip(1.0))
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "opacus"])
def test_engines_run_the_model_in_the_modes_it_is_in(engine: str) -> None:
    class Modal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) if self.head.training else self.head(2 * x)

    model, inputs, targets = Modal(), torch.randn(4, 1, 3), torch.zeros(4).long()
    in_training = clipped_gradient_sum(model, inputs, targets, FlatClip(9.0), engine=engine).norms
    model.head.eval()
    frozen = clipped_gradient_sum(model, inputs, targets, FlatClip(9.0), engine=engine).norms
    assert not torch.allclose(in_training, frozen)
    parameters = list(model.parameters())
    for row, norm in enumerate(frozen):
        value = nn.functional.cross_entropy(model(inputs[row]), targets[row : row + 1])
        parts = torch.autograd.grad(value, parameters)
        torch.testing.assert_close(torch.cat([g.flatten() for g in parts]).norm().double(), norm)


def test_a_sparse_buffer_is_served_and_put_back() -> None:
    class Graph(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.inner, self.writes = nn.Linear(3, 2), writes
            self.register_buffer("edges", torch.eye(3).to_sparse())

        def forward(self, inputs: Tensor) -> Tensor:
            if self.writes:
                self.edges.mul_(2.0)
            return self.inner(inputs)

    inputs = torch.randn(2, 3)
    with left_as_found(model := Graph(writes=False)):
        model(inputs)
    model = Graph(writes=True)
    with pytest.raises(ChangesState, match="edges"), left_as_found(model):
        model(inputs)
    assert torch.equal(model.edges.to_dense(), torch.eye(3))
