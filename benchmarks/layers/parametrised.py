"""Weights that are computed from others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from benchmarks.layers.case import Call, Case, classified, numbers


class Symmetric(nn.Module):
    """A matrix made symmetric."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Mean of a matrix and its transpose."""
        return (matrix + matrix.mT) / 2


class Positive(nn.Module):
    """Entries made positive."""

    def forward(self, weight: Tensor) -> Tensor:
        """Softplus of the entries."""
        return F.softplus(weight)


def parametrised() -> Iterator[Case]:
    """Weights that are computed from others."""
    group = "parametrised weights"

    def spectral() -> nn.Module:
        return parametrizations.spectral_norm(nn.Linear(5, 6)).eval()

    def old_spectral() -> nn.Module:
        layer = nn.utils.spectral_norm(nn.Linear(5, 6))
        layer(torch.randn(2, 5))
        return layer.eval()

    def pruned() -> nn.Module:
        return prune.l1_unstructured(nn.Linear(5, 6), "weight", amount=0.4)

    def twice() -> nn.Module:
        layer = nn.Linear(6, 6)
        parametrize.register_parametrization(layer, "weight", Symmetric())
        parametrize.register_parametrization(layer, "weight", Positive())
        parametrize.register_parametrization(layer, "bias", Positive())
        return nn.Sequential(nn.Linear(5, 6), layer)

    for name, body, shape in (
        ("weight norm", lambda: parametrizations.weight_norm(nn.Linear(5, 6)), (5,)),
        ("weight norm of a Conv2d", lambda: parametrizations.weight_norm(nn.Conv2d(3, 5, 3)), (3, 6, 5)),
        ("weight norm, by hook", lambda: nn.utils.weight_norm(nn.Linear(5, 6)), (5,)),
        (
            "orthogonal, matrix exponential",
            lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="matrix_exp"),
            (5,),
        ),
        (
            "orthogonal, Householder",
            lambda: parametrizations.orthogonal(nn.Linear(5, 3), orthogonal_map="householder"),
            (5,),
        ),
        (
            "orthogonal, Cayley",
            lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley"),
            (5,),
        ),
        ("spectral norm, frozen", spectral, (5,)),
        ("spectral norm by hook, frozen", old_spectral, (5,)),
        ("pruned", pruned, (5,)),
        ("own parametrisations, one on another, and of a bias", twice, (5,)),
    ):
        frozen = "frozen" in name
        yield classified(
            group,
            name,
            lambda body=body, frozen=frozen: Evaluating(body()) if frozen else body(),
            numbers(*shape),
        )
    yield classified(
        group,
        "weights made by another layer",
        lambda: Call(
            lambda m, x: torch.einsum("nij,nj->ni", m.maker(x).unflatten(1, (4, 5)), x),
            maker=nn.Linear(5, 20),
        ),
        numbers(5),
    )
    yield classified(
        group,
        "low-rank update of a frozen layer",
        lambda: Call(
            lambda m, x: m.frozen(x) + m.up(m.down(x)),
            frozen=nn.Linear(5, 6).requires_grad_(False),
            down=nn.Linear(5, 2, bias=False),
            up=nn.Linear(2, 6, bias=False),
        ),
        numbers(3, 5),
        zero=("head.*", "body.up.*"),
    )


class Evaluating(nn.Module):
    """A module that stays in eval mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def train(self, mode: bool = True) -> Evaluating:
        """Leave the module inside as it is."""
        self.training = mode
        self.inner.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """What the module inside gives."""
        return self.inner(x)
