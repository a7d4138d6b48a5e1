"""Checkpointing, functions and graphs of one's own, compiled models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.layers.case import Call, Case, classified, numbers


class Straight(torch.autograd.Function):
    """Sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sign of x."""
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Straight through."""
        return gradient


class OwnLinear(torch.autograd.Function):
    """x @ w.t(), with a backward pass of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        """The product."""
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Keep both."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of both."""
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class OldLinear(torch.autograd.Function):
    """The same in the old form, which no transform understands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of both."""
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class Scripted(nn.Module):
    """What TorchScript compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Two layers."""
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def autograd() -> Iterator[Case]:
    """Checkpointing, functions and graphs of one's own, compiled models."""
    group = "autograd"

    def checkpointed(reentrant: bool) -> nn.Module:
        return Call(
            lambda m, x: checkpoint(m.inner, m.before(x), use_reentrant=reentrant),
            before=nn.Linear(5, 6),
            inner=nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
        )

    def energy(m: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            return torch.autograd.grad(m.inner(point).tanh().sum(), point, create_graph=True)[0]

    def jacobian(m: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda row: torch.tanh(m.inner(row))))(x)

    def traced() -> nn.Module:
        return torch.jit.trace(Scripted(), torch.randn(2, 5))

    def traced_cnn() -> nn.Module:
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2))
        return torch.jit.trace(body, torch.randn(2, 3, 6, 6))

    def detached(m: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.inner(x))
        return m.outer(hidden.detach()) + hidden.mean(-1, keepdim=True)

    def without_gradient(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(m.inner(x))
        return m.outer(x) * gate

    def fixed_point(m: nn.Module, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(4):
            state = torch.tanh(m.inner(state) + x)
        return state

    linear = {"w": lambda: nn.Parameter(torch.randn(6, 5))}
    for name, body, shape in (
        ("checkpoint, reentrant", lambda: checkpointed(True), (3, 5)),
        ("checkpoint, not reentrant", lambda: checkpointed(False), (3, 5)),
        (
            "own function, straight through",
            lambda: Call(
                lambda m, x: m.outer(Straight.apply(m.inner(x))), inner=nn.Linear(5, 6), outer=nn.Linear(6, 6)
            ),
            (5,),
        ),
        (
            "own function with a vmap rule",
            lambda: Call(lambda m, x: OwnLinear.apply(x, m.w), w=linear["w"]()),
            (3, 5),
        ),
        (
            "own function of the old form",
            lambda: Call(lambda m, x: OldLinear.apply(x, m.w), w=linear["w"]()),
            (3, 5),
        ),
        ("TorchScript, scripted", lambda: torch.jit.script(Scripted()), (3, 5)),
        ("TorchScript, traced", traced, (5,)),
        ("TorchScript, traced convolutions", traced_cnn, (3, 6, 6)),
        ("gradient of an energy", lambda: Call(energy, inner=nn.Linear(5, 6)), (5,)),
        ("Jacobian", lambda: Call(jacobian, inner=nn.Linear(5, 4)), (5,)),
        ("detached branch", lambda: Call(detached, inner=nn.Linear(5, 6), outer=nn.Linear(6, 6)), (5,)),
        (
            "branch without gradient",
            lambda: Call(without_gradient, inner=nn.Linear(5, 6), outer=nn.Linear(5, 6)),
            (5,),
        ),
        ("fixed point of four rounds", lambda: Call(fixed_point, inner=nn.Linear(5, 5)), (5,)),
        (
            "functional_call with other weights",
            lambda: Call(
                lambda m, x: torch.func.functional_call(m.inner, {"weight": m.w, "bias": m.inner.bias}, (x,)),
                inner=nn.Linear(5, 6),
                w=linear["w"](),
            ),
            (5,),
        ),
    ):
        yield classified(group, name, body, numbers(*shape))
