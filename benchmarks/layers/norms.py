"""Normalisation with learned gains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from benchmarks.layers.case import (
    Case,
    classified,
    numbers,
    with_frozen_statistics,
)


def norms() -> Iterator[Case]:
    """Normalisation with learned gains."""
    group = "normalisation"
    for name, layer, shape in (
        ("GroupNorm", lambda: nn.GroupNorm(2, 6), (6, 4, 3)),
        ("GroupNorm, one group", lambda: nn.GroupNorm(1, 6), (6, 4)),
        ("GroupNorm, a group a channel", lambda: nn.GroupNorm(6, 6), (6, 5)),
        ("LayerNorm", lambda: nn.LayerNorm(6), (6,)),
        ("LayerNorm at positions, no bias", lambda: nn.LayerNorm(6, bias=False), (5, 6)),
        ("LayerNorm over two axes", lambda: nn.LayerNorm((4, 3)), (5, 4, 3)),
        ("RMSNorm", lambda: nn.RMSNorm(6), (6,)),
        ("RMSNorm over two axes at positions", lambda: nn.RMSNorm((4, 3), eps=1e-5), (5, 4, 3)),
        ("InstanceNorm1d", lambda: nn.InstanceNorm1d(6, affine=True), (6, 5)),
        ("InstanceNorm2d", lambda: nn.InstanceNorm2d(6, affine=True), (6, 4, 3)),
        ("InstanceNorm3d", lambda: nn.InstanceNorm3d(6, affine=True), (6, 3, 2, 3)),
        (
            "InstanceNorm1d, frozen statistics",
            lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
            (6, 5),
        ),
        (
            "InstanceNorm2d, frozen statistics",
            lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            (6, 4, 3),
        ),
        ("BatchNorm1d, frozen", lambda: nn.BatchNorm1d(6), (6,)),
        ("BatchNorm1d at positions, frozen", lambda: nn.BatchNorm1d(6), (6, 5)),
        ("BatchNorm2d, frozen", lambda: nn.BatchNorm2d(6), (6, 4, 3)),
        ("BatchNorm3d, frozen", lambda: nn.BatchNorm3d(6), (6, 3, 2, 3)),
        ("SyncBatchNorm, frozen", lambda: nn.SyncBatchNorm(6), (6, 4, 3)),
    ):
        yield classified(group, name, lambda layer=layer: with_frozen_statistics(layer()), numbers(*shape))
    for name, body, shape in (
        (
            "LocalResponseNorm around a Conv2d",
            lambda: nn.Sequential(nn.Conv2d(3, 6, 2), nn.LocalResponseNorm(3, alpha=0.1)),
            (3, 5, 4),
        ),
        (
            "Conv2d, BatchNorm2d frozen, Conv2d",
            lambda: nn.Sequential(nn.Conv2d(3, 6, 2), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 2)),
            (3, 5, 4),
        ),
        (
            "Linear, BatchNorm1d frozen without gains, Linear",
            lambda: nn.Sequential(
                nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 4)
            ),
            (5,),
        ),
        (
            "Conv1d, InstanceNorm1d, LayerNorm",
            lambda: nn.Sequential(nn.Conv1d(3, 6, 2), nn.InstanceNorm1d(6, affine=True), nn.LayerNorm(5)),
            (3, 6),
        ),
    ):
        yield classified(group, name, lambda body=body: with_frozen_statistics(body()), numbers(*shape))
    yield Case(
        group,
        "BatchNorm1d in train mode mixes examples",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)),
        numbers(5),
        zero=(),
        refused=True,
    )
