"""torchvision's classifiers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.layers.case import CLASSES, Case, architecture, group_norm, numbers


def of_torchvision() -> Iterator[Case]:
    """torchvision's classifiers."""
    from torchvision import models as tv

    def resnet(block: Any, **settings: Any) -> nn.Module:
        return tv.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES, **settings)

    def densenet() -> nn.Module:
        return tv.DenseNet(4, (2, 2), 8, num_classes=CLASSES)

    def mobilenet3() -> nn.Module:
        from torchvision.models.mobilenetv3 import InvertedResidualConfig

        make = functools.partial(InvertedResidualConfig, width_mult=1.0)
        rows = [
            make(8, 3, 8, 8, True, "RE", 2, 1),
            make(8, 3, 16, 12, False, "RE", 1, 1),
            make(12, 5, 24, 12, True, "HS", 2, 1),
        ]
        return tv.MobileNetV3(rows, 24, num_classes=CLASSES, dropout=0.0)

    def efficientnet() -> nn.Module:
        from torchvision.models.efficientnet import MBConvConfig

        rows = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 12, 2)]
        return tv.EfficientNet(rows, 0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=24)

    def regnet() -> nn.Module:
        from torchvision.models.regnet import BlockParams

        return tv.RegNet(
            BlockParams.from_init_params(depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25),
            num_classes=CLASSES,
            stem_width=8,
        )

    def convnext() -> nn.Module:
        from torchvision.models.convnext import CNBlockConfig

        return tv.ConvNeXt(
            [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], 0.0, 1.0, num_classes=CLASSES
        )

    def swin(block: Any, downsample: Any) -> nn.Module:
        return tv.SwinTransformer(
            [2, 2], 8, [1, 1], [2, 2], [2, 2], 2.0, 0.0, 0.0, 0.0, CLASSES,
            block=block, downsample_layer=downsample,
        )  # fmt: skip

    def swins() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
        from torchvision.models import swin_transformer as s

        yield "Swin", lambda: swin(s.SwinTransformerBlock, s.PatchMerging)
        yield "Swin V2", lambda: swin(s.SwinTransformerBlockV2, s.PatchMergingV2)

    def maxvit() -> nn.Module:
        return tv.MaxVit(
            (16, 16), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=CLASSES,
            norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3), mlp_ratio=2,
        )  # fmt: skip

    rows: list[tuple[str, Callable[[], nn.Module], int, tuple[str, ...]]] = [
        (
            "ResNet, basic blocks, group norm",
            lambda: resnet(tv.resnet.BasicBlock, norm_layer=group_norm),
            16,
            ("fc.*", "layer*.bn2.*"),
        ),
        (
            "ResNeXt, frozen batch norm",
            lambda: resnet(tv.resnet.Bottleneck, groups=2, width_per_group=4),
            16,
            ("fc.*", "layer*.bn3.*"),
        ),
        ("DenseNet, frozen batch norm", densenet, 16, ("classifier.*",)),
        (
            "MobileNetV2, group norm",
            lambda: tv.MobileNetV2(
                num_classes=CLASSES,
                width_mult=0.1,
                dropout=0.0,
                norm_layer=group_norm,
                inverted_residual_setting=[[1, 16, 1, 1], [4, 24, 2, 2]],
            ),
            16,
            ("classifier.*",),
        ),
        ("MobileNetV3, frozen batch norm", mobilenet3, 16, ("classifier.3.*",)),
        (
            "ShuffleNetV2, frozen batch norm",
            lambda: tv.ShuffleNetV2([1, 1, 1], [8, 12, 16, 24, 32], num_classes=CLASSES),
            32,
            ("fc.*",),
        ),
        ("SqueezeNet", lambda: tv.SqueezeNet("1_1", num_classes=CLASSES, dropout=0.0), 32, ()),
        ("EfficientNet, frozen batch norm", efficientnet, 16, ("classifier.1.*",)),
        ("RegNet, frozen batch norm", regnet, 32, ("fc.*",)),
        ("MNASNet, frozen batch norm", lambda: tv.MNASNet(0.05, CLASSES, 0.0), 32, ("classifier.1.*",)),
        ("ConvNeXt", convnext, 16, ("classifier.2.*", "*layer_scale")),
        ("ViT", lambda: tv.VisionTransformer(16, 4, 2, 2, 12, 24, num_classes=CLASSES), 16, ("heads.*",)),
        *((name, make, 16, ("head.*",)) for name, make in swins()),
        ("MaxViT, frozen batch norm", maxvit, 16, ("classifier.5.*",)),
    ]
    for name, make, size, zero in rows:
        yield architecture("torchvision", name, make, numbers(3, size, size), zero)
