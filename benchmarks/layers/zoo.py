"""Architectures of torchvision, timm and transformers: tiny, random weights, no dropout, norms frozen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import CLASSES, Batch, Case, ids, numbers, with_frozen_statistics

GROUPS = 2
EXAMPLES = 4


def cases() -> Iterator[Case]:
    """Every row of this file."""
    yield from of_torchvision()
    yield from of_timm()
    yield from of_transformers()


def _group_norm(channels: int, **_: Any) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels)


def _case(
    group: str,
    name: str,
    model: Callable[[], nn.Module],
    inputs: Callable[[int, int], Batch],
    zero: tuple[str, ...],
    **settings: Any,
) -> Case:
    def made() -> nn.Module:
        return with_frozen_statistics(model())

    chosen = {"examples": EXAMPLES, "views": 1, "rate": 0.05, "slow": True, **settings}
    return Case(group, name, made, inputs, zero=zero, **chosen)


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
            lambda: resnet(tv.resnet.BasicBlock, norm_layer=_group_norm),
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
                norm_layer=_group_norm,
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
        yield _case("torchvision", name, make, numbers(3, size, size), zero)


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
            {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16), "stem_width": 4, "norm_layer": _group_norm},
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
        yield _case("timm", title, made(name, **settings), numbers(3, size, size), zero)
    for title, make, size, zero in (
        ("MLP-Mixer", mixer("MixerBlock", (0.5, 4.0)), 16, ("head.*",)),
        ("gMLP", mixer("SpatialGatingBlock", 4, mlp_layer="GatedMlp"), 16, ("head.*",)),
        ("ResMLP", mixer("ResBlock", 4, norm_layer="Affine"), 16, ("head.*", "*.ls1", "*.ls2")),
        ("PoolFormer", poolformer, 16, ("head.fc.*", "*.scale")),
        ("NFNet, standardised kernels", nfnet, 16, ("head.fc.*", "*.skipinit_gain")),
    ):
        yield _case("timm", title, make, numbers(3, size, size), zero)


def of_transformers() -> Iterator[Case]:
    """transformers'."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    vocabulary, length = 17, 6
    common = {
        "vocab_size": vocabulary, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 16, "num_labels": CLASSES, "pad_token_id": 0,
    }  # fmt: skip
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    llama = {**common, "num_key_value_heads": 1, "head_dim": 6}
    gpt = {"vocab_size": vocabulary, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16,
           "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0,
           "num_labels": CLASSES, "pad_token_id": 0}  # fmt: skip
    t5 = {"vocab_size": vocabulary, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_heads": 2,
          "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0}  # fmt: skip
    bart = {"vocab_size": vocabulary, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16, "max_position_embeddings": 16, "dropout": 0.0, "num_labels": CLASSES,
            "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
    pictures = {
        "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 8, "patch_size": 4, "num_labels": CLASSES, **no_dropout,
    }  # fmt: skip

    def text(examples: int, views: int) -> dict[str, Tensor]:
        lengths = torch.randint(2, length + 1, (examples, views, 1))
        mask = (torch.arange(length) < lengths).long()
        return {"input_ids": ids(length, vocabulary, 3)(examples, views) * mask, "attention_mask": mask}

    def whole_text(examples: int, views: int) -> dict[str, Tensor]:
        return {"input_ids": ids(length, vocabulary, 3)(examples, views)}

    def both(examples: int, views: int) -> dict[str, Tensor]:
        return {**text(examples, views), "decoder_input_ids": ids(length, vocabulary, 3)(examples, views)}

    def images(examples: int, views: int) -> dict[str, Tensor]:
        return {"pixel_values": numbers(3, 8, 8)(examples, views)}

    def logits(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets, reduction="none")

    def tokens(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits.transpose(1, 2), targets, reduction="none").mean(1)

    def words(examples: int) -> Tensor:
        return torch.randint(0, vocabulary, (examples, length))

    def classifier(model: str, config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            made = getattr(hf, config)(**settings, use_cache=False)
            # The grouped products of experts have no float64.
            more = {"experts_implementation": "eager"} if "num_local_experts" in settings else {}
            return getattr(hf, model)._from_config(made, attn_implementation="eager", **more)

        return make

    encoders: list[tuple[str, str, str, dict[str, Any], Callable[[int, int], Batch], tuple[str, ...]]] = [
        (
            "BERT",
            "BertForSequenceClassification",
            "BertConfig",
            {**common, **no_dropout},
            text,
            ("classifier.*",),
        ),
        (
            "RoBERTa",
            "RobertaForSequenceClassification",
            "RobertaConfig",
            {**common, **no_dropout},
            text,
            ("classifier.out_proj.*",),
        ),
        (
            "DistilBERT",
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            {
                "vocab_size": vocabulary,
                "dim": 12,
                "n_layers": 2,
                "n_heads": 2,
                "hidden_dim": 16,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "seq_classif_dropout": 0.0,
                "max_position_embeddings": 16,
                "num_labels": CLASSES,
            },
            text,
            ("classifier.*",),
        ),
        (
            "ALBERT, layers shared",
            "AlbertForSequenceClassification",
            "AlbertConfig",
            {**common, **no_dropout, "embedding_size": 8, "classifier_dropout_prob": 0.0},
            text,
            ("classifier.*",),
        ),
        (
            "ELECTRA",
            "ElectraForSequenceClassification",
            "ElectraConfig",
            {**common, **no_dropout, "embedding_size": 8},
            text,
            ("classifier.out_proj.*",),
        ),
        (
            "DeBERTa V2",
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            {
                **common,
                **no_dropout,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "pooler_dropout": 0.0,
                "pooler_hidden_size": 12,
            },
            text,
            ("classifier.*",),
        ),
        ("ViT", "ViTForImageClassification", "ViTConfig", pictures, images, ("classifier.*",)),
        (
            "Swin",
            "SwinForImageClassification",
            "SwinConfig",
            {
                "image_size": 8,
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [2, 2],
                "window_size": 2,
                "num_labels": CLASSES,
                "drop_path_rate": 0.0,
                **no_dropout,
            },
            images,
            ("classifier.*",),
        ),
        (
            "BART",
            "BartForSequenceClassification",
            "BartConfig",
            bart,
            _ended(text),
            ("classification_head.out_proj.*",),
        ),
        ("GPT-2 as a classifier", "GPT2ForSequenceClassification", "GPT2Config", gpt, text, ("score.*",)),
    ]
    for title, model, config, settings, inputs, zero in encoders:
        yield _case("transformers", title, classifier(model, config, settings), inputs, zero, loss=logits)
    decoders: list[tuple[str, str, str, dict[str, Any], Callable[[int, int], Batch], tuple[str, ...]]] = [
        ("GPT-2, tied head", "GPT2LMHeadModel", "GPT2Config", gpt, whole_text, ()),
        (
            "GPT-Neo",
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            {
                "vocab_size": vocabulary,
                "hidden_size": 12,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 16,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 4,
                "max_position_embeddings": 16,
                "resid_dropout": 0.0,
                "embed_dropout": 0.0,
                "attention_dropout": 0.0,
            },
            whole_text,
            (),
        ),
        (
            "OPT",
            "OPTForCausalLM",
            "OPTConfig",
            {
                "vocab_size": vocabulary,
                "hidden_size": 12,
                "num_hidden_layers": 2,
                "ffn_dim": 16,
                "num_attention_heads": 2,
                "max_position_embeddings": 16,
                "dropout": 0.0,
                "word_embed_proj_dim": 12,
            },
            text,
            (),
        ),
        ("Llama", "LlamaForCausalLM", "LlamaConfig", llama, text, ("lm_head.*",)),
        (
            "Mistral",
            "MistralForCausalLM",
            "MistralConfig",
            {**llama, "sliding_window": 3},
            whole_text,
            ("lm_head.*",),
        ),
        ("Qwen 2", "Qwen2ForCausalLM", "Qwen2Config", llama, text, ("lm_head.*",)),
        ("Gemma", "GemmaForCausalLM", "GemmaConfig", llama, whole_text, ()),
        (
            "Mixtral, experts",
            "MixtralForCausalLM",
            "MixtralConfig",
            {**llama, "num_local_experts": 3, "num_experts_per_tok": 2},
            text,
            ("lm_head.*",),
        ),
        (
            "Mamba",
            "MambaForCausalLM",
            "MambaConfig",
            {"vocab_size": vocabulary, "hidden_size": 12, "state_size": 4, "num_hidden_layers": 2},
            whole_text,
            (),
        ),
        (
            "BLOOM",
            "BloomForCausalLM",
            "BloomConfig",
            {
                "vocab_size": vocabulary,
                "hidden_size": 12,
                "n_layer": 2,
                "n_head": 2,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
            },
            text,
            (),
        ),
        ("T5", "T5ForConditionalGeneration", "T5Config", t5, both, ()),
    ]
    for title, model, config, settings, inputs, zero in decoders:
        yield _case(
            "transformers",
            title,
            classifier(model, config, settings),
            inputs,
            zero,
            targets=words,
            loss=tokens,
        )


def _ended(text: Callable[[int, int], dict[str, Tensor]]) -> Callable[[int, int], dict[str, Tensor]]:
    """End every text with the token that says so, which the model reads at."""

    def make(examples: int, views: int) -> dict[str, Tensor]:
        batch = text(examples, views)
        last = batch["attention_mask"].sum(-1, keepdim=True) - 1
        batch["input_ids"] = batch["input_ids"].scatter(-1, last, 2)
        return batch

    return make
