"""timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.layers.case import CLASSES, Case, architecture, group_norm, numbers


def of_timm() -> Iterator[Case]:
    """timm's."""
    import timm

    def made(name: str, **settings: Any) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)

    def mixer(block: str, ratio: Any, **settings: str) -> Callable[[], nn.Module]:
        from timm.models import mlp_mixer as mixers

        chosen = {key: getattr(mixers, value) for key, value in {**settings, "block_layer": block}.items()}
        return lambda: mixers.MlpMixer(
            CLASSES, 16, patch_size=4, num_blocks=2, embed_dim=12, mlp_ratio=ratio, **chosen
        )

    def poolformer() -> nn.Module:
        from timm.models import metaformer as m

        return m.MetaFormer(
            depths=(1, 1), dims=(8, 12), num_classes=CLASSES, downsample_norm=None, mlp_act=nn.GELU,
            mlp_bias=True, norm_layers=m.GroupNorm1, layer_scale_init_values=1e-5, res_scale_init_values=None,
            use_mlp_head=False,
        )  # fmt: skip

    def nfnet() -> nn.Module:
        from timm.models import nfnet as nf

        return nf.NormFreeNet(
            nf.NfCfg(
                depths=(1, 1),
                channels=(16, 24),
                stem_type="3x3",
                stem_chs=8,
                num_features=32,
                skipinit=True,
                attn_layer="se",
                attn_kwargs={"rd_ratio": 0.5},
            ),
            num_classes=CLASSES,
        )

    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    rows: list[tuple[str, str, dict[str, Any], int, tuple[str, ...]]] = [
        ("ViT", "vit_tiny_patch16_224", vit, 16, ("head.*",)),
        (
            "ViT with registers and layer scale",
            "vit_small_patch14_reg4_dinov2",
            vit,
            16,
            ("head.*", "*.gamma"),
        ),
        ("DeiT, distilled", "deit_tiny_distilled_patch16_224", vit, 16, ("head.*", "head_dist.*")),
        ("BEiT", "beit_base_patch16_224", vit, 16, ("head.*", "*gamma_1", "*gamma_2")),
        ("CaiT", "cait_xxs24_224", vit, 16, ("head.*", "*gamma_1", "*gamma_2")),
        ("EVA", "eva02_tiny_patch14_224", {**vit, "embed_dim": 16}, 16, ("head.*",)),
        ("XCiT", "xcit_nano_12_p16_224", {**vit, "patch_size": 8, "embed_dim": 16}, 16, ("head.*",)),
        (
            "Swin",
            "swin_tiny_patch4_window7_224",
            {
                "img_size": 16,
                "patch_size": 2,
                "window_size": 2,
                "embed_dim": 8,
                "depths": (2, 2),
                "num_heads": (2, 2),
                "drop_path_rate": 0.0,
            },
            16,
            ("head.*",),
        ),
        (
            "ConvNeXt",
            "convnext_atto",
            {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12)},
            32,
            ("head.fc.*", "*.gamma"),
        ),
        (
            "ResNet-D, group norm",
            "resnet18d",
            {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16), "stem_width": 4, "norm_layer": group_norm},
            16,
            ("fc.*", "layer*.bn2.*"),
        ),
        (
            "SE-ResNet, frozen batch norm",
            "seresnet18",
            {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16)},
            16,
            ("fc.*", "layer*.bn2.*"),
        ),
        ("LCNet, frozen batch norm", "lcnet_035", {}, 32, ("classifier.*",)),
        (
            "LeViT, frozen batch norm",
            "levit_128s",
            {"img_size": 32, "embed_dim": (16, 24), "depth": (1, 1), "num_heads": (1, 2), "key_dim": 8},
            32,
            ("head.linear.*", "head_dist.linear.*"),
        ),
    ]
    for title, name, settings, size, zero in rows:
        yield architecture("timm", title, made(name, **settings), numbers(3, size, size), zero)
    for title, make, size, zero in (
        ("MLP-Mixer", mixer("MixerBlock", (0.5, 4.0)), 16, ("head.*",)),
        ("gMLP", mixer("SpatialGatingBlock", 4, mlp_layer="GatedMlp"), 16, ("head.*",)),
        ("ResMLP", mixer("ResBlock", 4, norm_layer="Affine"), 16, ("head.*", "*.ls1", "*.ls2")),
        ("PoolFormer", poolformer, 16, ("head.fc.*", "*.scale")),
        ("NFNet, standardised kernels", nfnet, 16, ("head.fc.*", "*.skipinit_gain")),
    ):
        yield architecture("timm", title, make, numbers(3, size, size), zero)
