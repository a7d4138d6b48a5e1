"""Parameters on their own, tied, frozen, hooked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import Call, Case, classified, ids, numbers


def parameters() -> Iterator[Case]:
    """Parameters on their own, tied, frozen, hooked."""
    group = "parameters"
    one = nn.Parameter

    def tied_embedding(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.inner(m.embed(x))), m.embed.weight)

    def tied_layers() -> nn.Module:
        body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        body[2].weight = body[0].weight
        return body

    def tied_convolutions() -> nn.Module:
        body = nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=2, dilation=2)
        )
        body[2].weight = body[0].weight
        return body

    def hooked() -> nn.Module:
        body = nn.Embedding(9, 4)
        mask = (torch.arange(9) > 4).float()[:, None]
        body.weight.register_hook(lambda gradient: gradient * mask.to(gradient.dtype))
        return body

    def doubled() -> nn.Module:
        body = nn.Linear(5, 6)
        body.bias.register_hook(lambda gradient: 2 * gradient)
        return body

    def module_hook() -> nn.Module:
        body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        body[0].register_forward_hook(lambda module, arguments, out: out * 1.5)
        return body

    def backward_hook() -> nn.Module:
        body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
        body[2].register_full_backward_hook(lambda module, before, after: (before[0] * 0.5,))
        return body

    def tensor_hook(m: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.inner(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * 0.5)
        return hidden

    for name, body, inputs in (
        (
            "ParameterList",
            lambda: Call(
                lambda m, x: torch.tanh(x @ m.list[0]) @ m.list[1] + m.list[2],
                list=nn.ParameterList([torch.randn(5, 6), torch.randn(6, 4), torch.randn(4)]),
            ),
            numbers(5),
        ),
        (
            "ParameterDict",
            lambda: Call(
                lambda m, x: x * m.dict["gain"] + m.dict["shift"],
                dict=nn.ParameterDict({"gain": torch.randn(5), "shift": torch.randn(3, 1)}),
            ),
            numbers(3, 5),
        ),
        ("tied Linear layers", tied_layers, numbers(5)),
        ("tied Conv2d layers", tied_convolutions, numbers(3, 5, 4)),
        (
            "embedding tied to the output",
            lambda: Call(tied_embedding, embed=nn.Embedding(9, 4), inner=nn.Linear(4, 4)),
            ids(6, 9),
        ),
        (
            "one Linear used three times",
            lambda: Call(
                lambda m, x: m.inner(torch.tanh(m.inner(torch.tanh(m.inner(x))))), inner=nn.Linear(5, 5)
            ),
            numbers(5),
        ),
        (
            "one Linear at 6 and at 2 positions",
            lambda: Call(
                lambda m, x: torch.cat([m.inner(x), m.inner(torch.tanh(x[:, :2] * x[:, 2:4]))], 1),
                inner=nn.Linear(5, 5),
            ),
            numbers(6, 5),
        ),
        (
            "without axes",
            lambda: Call(
                lambda m, x: m.inner(x) * m.temperature.exp(),
                inner=nn.Linear(5, 6),
                temperature=one(torch.tensor(0.3)),
            ),
            numbers(5),
        ),
        (
            "frozen beside trainable",
            lambda: nn.Sequential(nn.Linear(5, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 6)),
            numbers(5),
        ),
        ("frozen weight, trainable bias", _bias_only, numbers(5)),
        (
            "one that is not used",
            lambda: Call(lambda m, x: m.inner(x), inner=nn.Linear(5, 6), unused=nn.Linear(3, 3)),
            numbers(5),
        ),
        (
            "positions and a class token",
            lambda: Call(
                lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1) * m.gain + m.position,
                token=one(torch.randn(1, 1, 5)),
                position=one(torch.randn(1, 7, 5)),
                gain=one(torch.randn(5)),
            ),
            numbers(6, 5),
        ),
        (
            "learned queries",
            lambda: Call(_queries, queries=one(torch.randn(1, 3, 5)), project=nn.Linear(5, 5)),
            numbers(7, 5),
        ),
        (
            "used transposed",
            lambda: Call(lambda m, x: torch.tanh(x @ m.w) @ m.w.t(), w=one(torch.randn(5, 6))),
            numbers(3, 5),
        ),
        (
            "sliced, reshaped and indexed",
            lambda: Call(
                lambda m, x: x @ m.w[:, :4].reshape(5, 4) + m.w[torch.tensor([0, 2]), 4:].flatten()[:4],
                w=one(torch.randn(5, 8)),
            ),
            numbers(3, 5),
        ),
        ("hook that freezes rows", hooked, ids(6, 9)),
        ("hook that doubles", doubled, numbers(3, 5)),
        ("forward hook of a module", module_hook, numbers(5)),
        ("backward hook of a module", backward_hook, numbers(5)),
        ("hook of a tensor", lambda: Call(tensor_hook, inner=nn.Linear(5, 6)), numbers(5)),
        (
            "a penalty beside the output",
            lambda: Call(
                lambda m, x: torch.tanh(m.inner(x)) + 0.1 * m.inner.weight.square().sum(),
                inner=nn.Linear(5, 6),
            ),
            numbers(5),
        ),
    ):
        yield classified(group, name, body, inputs)


def _bias_only() -> nn.Module:
    layer = nn.Linear(5, 6)
    layer.weight.requires_grad_(False)
    return layer


def _queries(m: nn.Module, x: Tensor) -> Tensor:
    asked = m.project(m.queries.expand(len(x), -1, -1))
    return torch.softmax(asked @ x.transpose(1, 2), -1) @ x
