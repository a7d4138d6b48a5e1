"""Convolutions, transposed ones and what works on patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.layers.case import (
    Case,
    classified,
    numbers,
)
from fedsim.models.layers import WSConv2d


def convolutions() -> Iterator[Case]:
    """Convolutions, transposed ones and what works on patches."""
    group = "convolutions"
    options: dict[str, dict[str, object]] = {
        "": {},
        ", stride 2, no bias": {"stride": 2, "bias": False},
        ", padding same, dilation 2": {"padding": "same", "dilation": 2},
        ", 2 groups": {"groups": 2, "padding": 1},
        ", depthwise": {"groups": 4, "out_channels": 8, "padding": 1},
        ", reflect": {"padding": 1, "padding_mode": "reflect"},
        ", replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
        ", circular": {"padding": 2, "padding_mode": "circular"},
        ", kernel 1": {"kernel_size": 1},
    }
    sizes = {1: (9,), 2: (6, 5), 3: (4, 5, 4)}
    for axes, size in sizes.items():
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        for name, given in options.items():
            settings = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **given}
            yield classified(
                group,
                f"Conv{axes}d{name}",
                lambda kind=kind, settings=settings: kind(**settings),
                numbers(4, *size),
            )
    for axes, size in {1: (5,), 2: (4, 3), 3: (3, 2, 3)}.items():
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        for name, given in {
            "": {},
            ", stride 2, output padding": {"stride": 2, "output_padding": 1, "padding": 1},
            ", 2 groups, dilation 2, no bias": {"groups": 2, "dilation": 2, "bias": False},
        }.items():
            yield classified(
                group,
                f"ConvTranspose{axes}d{name}",
                lambda kind=kind, given=given: kind(4, 6, 3, **given),
                numbers(4, *size),
            )
    for name, body, shape in (
        ("LazyConv2d, materialised", lambda: nn.LazyConv2d(5, 3), (3, 6, 5)),
        ("Conv2d on patches, kernel = stride", lambda: nn.Conv2d(3, 8, 4, stride=4), (3, 8, 8)),
        ("Conv2d, kernel = image", lambda: nn.Conv2d(3, 8, 5), (3, 5, 5)),
        ("WSConv2d, standardised kernel", lambda: WSConv2d(3, 6, 3, 1, 1), (3, 6, 5)),
        ("WSConv2d, stride 2, no bias", lambda: WSConv2d(3, 6, 3, 2, 1, bias=False), (3, 7, 7)),
        (
            "Unfold, Linear, Fold",
            lambda: nn.Sequential(
                nn.Unfold(2, stride=2), nn.Linear(9, 9), nn.Fold(output_size=(6, 6), kernel_size=2, stride=2)
            ),
            (3, 6, 6),
        ),
        (
            "Conv2d, pooling, in-place ReLU, Conv2d",
            lambda: nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Conv2d(6, 5, 2)
            ),
            (3, 8, 8),
        ),
        (
            "max-pooling, Conv2d, PixelShuffle",
            lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2)),
            (3, 8, 8),
        ),
    ):
        yield classified(group, name, lambda body=body: _filled(body()), numbers(*shape))


def _filled(module: nn.Module) -> nn.Module:
    """Give weight-standardised layers, which come unfilled, their start."""
    for part in module.modules():
        if isinstance(part, WSConv2d):
            part.reset(torch.Generator().manual_seed(0))
    return module
