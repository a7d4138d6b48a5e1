"""Embeddings and bags of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.layers.case import (
    Call,
    Case,
    classified,
    ids,
)


def embeddings() -> Iterator[Case]:
    """Embeddings and bags of them."""
    group = "embeddings"
    for name, given in {
        "": {},
        ", padding index": {"padding_idx": 0},
        ", gradients by frequency": {"scale_grad_by_freq": True},
        ", sparse gradients": {"sparse": True},
        ", largest length": {"max_norm": 100.0},
    }.items():
        case = classified(
            group, f"Embedding{name}", lambda given=given: nn.Embedding(9, 4, **given), ids(6, 9)
        )
        # Its forward pass writes into the rows that were looked up.
        yield dataclasses.replace(case, refused="max_norm" in given)
    for mode in ("sum", "mean", "max"):
        yield classified(
            group, f"EmbeddingBag, {mode}", lambda mode=mode: nn.EmbeddingBag(9, 4, mode=mode), ids(6, 9)
        )
    yield classified(
        group, "EmbeddingBag, padding index", lambda: nn.EmbeddingBag(9, 4, padding_idx=2), ids(6, 9)
    )
    yield classified(
        group,
        "EmbeddingBag, sparse gradients",
        lambda: nn.EmbeddingBag(9, 4, mode="sum", sparse=True),
        ids(6, 9),
    )

    def offsets(m: nn.Module, x: Tensor) -> Tensor:
        return m.bag(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))

    def all_offsets(m: nn.Module, x: Tensor) -> Tensor:
        return m.bag(x.flatten(), torch.arange(0, x.numel() + 1, x.shape[1]))

    for mode in ("sum", "mean", "max"):
        yield classified(
            group,
            f"EmbeddingBag, {mode}, offsets",
            lambda mode=mode: Call(offsets, bag=nn.EmbeddingBag(9, 4, mode=mode)),
            ids(6, 9),
        )
    yield classified(
        group,
        "EmbeddingBag, last offset included",
        lambda: Call(all_offsets, bag=nn.EmbeddingBag(9, 4, include_last_offset=True)),
        ids(6, 9),
    )

    def weighted(examples: int, views: int) -> dict[str, Tensor]:
        return {"ids": ids(6, 9)(examples, views), "weights": torch.rand(examples, views, 6)}

    yield classified(
        group,
        "EmbeddingBag, weights from the data",
        lambda: Call(
            lambda m, ids, weights: m.bag(ids, per_sample_weights=weights),
            bag=nn.EmbeddingBag(9, 4, mode="sum"),
        ),
        weighted,
    )
    yield classified(
        group,
        "EmbeddingBag, learned weights, offsets",
        lambda: Call(
            lambda m, x: m.bag(
                x.flatten(),
                torch.arange(0, x.numel(), x.shape[1]),
                per_sample_weights=m.gate(x).squeeze(-1).exp().flatten(),
            ),
            bag=nn.EmbeddingBag(9, 4, mode="sum"),
            gate=nn.Embedding(9, 1),
        ),
        ids(6, 9),
    )
    yield classified(
        group,
        "Embedding beside a frozen one",
        lambda: Call(
            lambda m, x: m.own(x) + m.given(x),
            own=nn.Embedding(9, 4),
            given=nn.Embedding.from_pretrained(torch.linspace(-1, 1, 36).reshape(9, 4)),
        ),
        ids(6, 9),
    )
