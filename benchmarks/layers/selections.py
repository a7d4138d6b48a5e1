"""What is computed depends on the data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.layers.case import Call, Case, classified, ids, numbers


def selections() -> Iterator[Case]:
    """What is computed depends on the data."""
    group = "selections"

    def gathered(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.embed(x)
        out = hidden.clone()
        out[x == 0] = torch.tanh(m.inner(hidden[x == 0]))
        return out

    def selected(m: nn.Module, x: Tensor) -> Tensor:
        chosen = torch.gather(m.inner(x), 1, x[..., :1].argsort(1).expand(-1, -1, 6)[:, :2])
        return chosen * torch.where(chosen > 0, 1.0, 0.5)

    def branched(m: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([m.left(row) if row.sum() > 0 else m.right(row) for row in x])

    def counted(m: nn.Module, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            for _ in range(1 + int(row.abs().mean().item() > 0.7)):
                row = torch.tanh(m.inner(row))
            rows.append(row)
        return torch.stack(rows)

    def experts(m: nn.Module, x: Tensor) -> Tensor:
        weight, place = torch.softmax(m.router(x), -1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(m.experts):
            chosen = place == number
            out[chosen] = weight[chosen][:, None] * expert(x[chosen])
        return out

    def soft_experts(m: nn.Module, x: Tensor) -> Tensor:
        weight = torch.softmax(m.router(x), -1)
        return torch.stack([expert(x) for expert in m.experts], -1) @ weight[..., None]

    def averaged(m: nn.Module, x: Tensor) -> Tensor:
        slots = (torch.arange(6) % 3).to(x.device)
        return torch.zeros(len(x), 3, 5, dtype=x.dtype).index_add(1, slots, m.inner(x))

    def pointwise(m: nn.Module, x: Tensor) -> Tensor:
        return m.inner(x.topk(3, dim=1).values.transpose(1, 2)).sort(-1).values

    def mixture() -> nn.Module:
        return Call(experts, router=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))

    for name, body, inputs in (
        (
            "layer applied at marked positions",
            lambda: Call(gathered, embed=nn.Embedding(4, 5), inner=nn.Linear(5, 5)),
            ids(6, 4),
        ),
        ("gather, sort, where", lambda: Call(selected, inner=nn.Linear(4, 6)), numbers(5, 4)),
        (
            "branch on the data",
            lambda: Call(branched, left=nn.Linear(4, 5), right=nn.Linear(4, 5)),
            numbers(4),
        ),
        ("number of rounds from the data", lambda: Call(counted, inner=nn.Linear(4, 4)), numbers(4)),
        ("mixture of experts, hard", mixture, numbers(4)),
        (
            "mixture of experts, soft",
            lambda: Call(
                soft_experts, router=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
            ),
            numbers(3, 4),
        ),
        ("index_add", lambda: Call(averaged, inner=nn.Linear(4, 5)), numbers(6, 4)),
        ("top values", lambda: Call(pointwise, inner=nn.Linear(3, 5)), numbers(5, 4)),
    ):
        yield classified(group, name, body, inputs)
