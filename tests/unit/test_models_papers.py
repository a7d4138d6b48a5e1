"""The papers' models: parameter counts by hand, signal at initialisation, exact per-example gradients
(budget: 40 s)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedsim import models, seeds
from fedsim.clipping.flat import FlatClip
from fedsim.config import ModelConfig
from fedsim.grads import bookkeeping, vmap
from fedsim.grads.flat import get_flat, set_flat
from fedsim.grads.per_example import cross_entropy
from fedsim.models.nf_resnet import GAMMA, NfResNet50
from fedsim.validate import InputError


def built(
    name: str, shape: tuple[int, ...], classes: int = 10, dtype: str = "float32", **options: object
) -> nn.Module:
    return models.build(ModelConfig(name, dict(options), dtype), shape, classes, seed=3)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta_count(name: str, shape: tuple[int, ...], classes: int, **options: object) -> int:
    """Parameters of a model too large to fill in a unit test."""
    family = models.FAMILIES[name]
    with torch.device("meta"):
        return count(family.make(shape, classes, family.options(**options)))


# --- parameter counts, written out


def ws(channels: int, out: int, kernel: int) -> int:
    return out * channels * kernel**2 + 2 * out  # kernel, bias and gain


@pytest.mark.parametrize(("depth", "width", "million"), [(16, 4, 2.75), (40, 4, 8.9), (28, 10, 36.5)])
def test_wide_resnet_parameters(depth: int, width: int, million: float) -> None:
    blocks = (depth - 4) // 6
    total, channels = ws(3, 16, 3), 16
    for stage in range(3):
        out = 16 * width * 2**stage
        total += 2 * channels + ws(channels, out, 1)  # norm and convolution of the projection
        for _ in range(blocks):
            total += 2 * channels + ws(channels, out, 3) + 2 * out + ws(out, out, 3)
            channels = out
    total += 2 * channels + channels * 10 + 10
    assert meta_count("wide_resnet", (3, 32, 32), 10, depth=depth, width=width) == total
    assert total / 1e6 == pytest.approx(million, rel=0.01)


def test_nf_resnet_50_parameters() -> None:
    convolutions, outputs, channels = 3 * 64 * 49, 64, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, out = 64 * 2**stage, 256 * 2**stage
        for index in range(blocks):
            convolutions += channels * inner + inner * inner * 9 + inner * out
            outputs += 2 * inner + out
            if index == 0:
                convolutions += channels * out
                outputs += out
            channels = out
    # a ResNet-50 with BatchNorm has 25,557,032: a scale and a shift an output, as here gain and bias
    assert convolutions + 2 * outputs + 2048 * 1000 + 1000 == 25_557_032
    expected = 25_557_032 - 64 + 16  # no bias in the stem, one skip gain a block
    assert meta_count("nf_resnet_50", (3, 224, 224), 1000) == expected


def test_resnet_18_v2_parameters() -> None:
    convolutions, norms, channels = 3 * 64 * 49, 0, 64
    for out in (64, 128, 256, 512):
        convolutions += channels * out * 9 + 3 * out * out * 9 + (channels * out if channels != out else 0)
        norms += channels + 3 * out
        channels = out
    expected = convolutions + 2 * (norms + 512) + 512 * 1000 + 1000
    assert expected == 11_687_720
    assert meta_count("resnet_18_v2", (3, 224, 224), 1000) == expected


def test_scatter_heads_parameters() -> None:
    assert count(built("scatter_linear", (81, 7, 7))) == 81 * 49 * 10 + 10
    convolutions = 16 * (81 * 9 + 1) + 32 * (16 * 9 + 1)
    assert count(built("scatter_cnn", (81, 7, 7))) == convolutions + (32 * 16 + 1) * 32 + 33 * 10
    assert count(built("scatter_cnn", (81, 7, 7), hidden=0)) == convolutions + (32 * 16 + 1) * 10
    wide = built("scatter_cnn", (243, 8, 8), channels=[8], strides=[1], activation="relu")
    assert count(wide) == 8 * (243 * 9 + 1) + (8 * 64 + 1) * 32 + 330


# --- what the layers do


def test_feature_norm_is_of_one_example_and_its_groups() -> None:
    model = built("scatter_linear", (81, 7, 7), zero_init=False)
    features = torch.rand(4, 81, 7, 7, generator=torch.Generator().manual_seed(0)) + 2.0
    normed = model.norm(features).reshape(4, 27, 3 * 49)  # type: ignore[operator]
    torch.testing.assert_close(normed.mean(2), torch.zeros(4, 27), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(2, correction=0), torch.ones(4, 27), atol=1e-3, rtol=0)
    scaled = features * torch.tensor([1.0, 10.0, 1.0, 1.0]).view(4, 1, 1, 1)
    moved = model(scaled) - model(features)
    assert moved[[0, 2, 3]].abs().max() == 0.0
    assert moved[1].abs().max() < 1e-2  # and one example's scale does not matter to itself
    plain = built("scatter_linear", (81, 7, 7), zero_init=False, groups=0)
    assert (plain(scaled) - plain(features))[1].abs().max() > 1.0


def test_zero_init_head_starts_at_log_classes() -> None:
    model = built("scatter_linear", (81, 7, 7))
    loss = cross_entropy(model(torch.rand(3, 81, 7, 7)), torch.tensor([0, 5, 9]))  # values do not matter
    torch.testing.assert_close(loss, torch.full((3,), math.log(10.0)))


def test_scaled_relu_keeps_the_variance() -> None:
    signal = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # the sample variance's standard error is below 0.005: five of them
    assert float((GAMMA * signal.relu()).var()) == pytest.approx(1.0, abs=0.025)
    assert float(signal.relu().var()) < 0.4


def test_nf_blocks_divide_by_the_expected_deviation() -> None:
    model = built("nf_resnet_50", (3, 32, 32), stem="small", width=4)
    assert isinstance(model, NfResNet50)
    expected = [1.0, 1.04, 1.08]  # grows by alpha^2 a block
    expected += [1.12, 1.04, 1.08, 1.12]  # a projection starts anew, counting its own branch
    expected += [1.16, 1.04, 1.08, 1.12, 1.16, 1.20]
    expected += [1.24, 1.04, 1.08]
    assert [block.beta**-2 for block in model.blocks] == pytest.approx(expected)


def test_nf_resnet_starts_as_its_shortcuts() -> None:
    """With skip gains at 0 the branches are silent; with gains at 1 the signal grows as planned."""
    model = built("nf_resnet_50", (3, 32, 32), stem="small", width=16, dtype="float64")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = model(images)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reduce." in name:
                parameter.mul_(3.0)
        torch.testing.assert_close(model(images), before)
        model = built("nf_resnet_50", (3, 32, 32), stem="small", width=16, dtype="float64")
        for name, parameter in model.named_parameters():
            if name.endswith("skip_gain"):
                parameter.fill_(1.0)
        assert (model(images) - before).abs().max() > 1e-6
        hidden = model.stem(images)  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            inputs, hidden = hidden, block(hidden)
        assert 0.5 < float(inputs.std()) < 2.0
        assert 0.5 < float(hidden.std()) < 2.0


def test_resnet_v2_keeps_every_second_pixel_where_it_only_halves() -> None:
    model = built("resnet_18_v2", (3, 32, 32), stem="small", width=8, groups=4, dtype="float64")
    block = model.stages[1][1]  # type: ignore[index,union-attr]
    assert block.project is None
    with torch.no_grad():
        block.conv2.weight.zero_()
    inputs = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(block(inputs), inputs[:, :, ::2, ::2])
    shapes = []
    for stage in model.stages:  # type: ignore[union-attr]
        stage.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert shapes == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    imagenet = built("resnet_18_v2", (3, 64, 64), width=8, groups=4)
    assert imagenet.stem(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 16, 16)  # type: ignore[operator]


def test_wide_resnet_options_switch_parts_off() -> None:
    shape = (3, 16, 16)
    full = built("wide_resnet", shape, depth=10, width=1)
    none = built("wide_resnet", shape, depth=10, width=1, normalisation="none")
    plain = built("wide_resnet", shape, depth=10, width=1, convolution="plain")
    names = {name for name, _ in full.named_parameters()}
    assert {n for n, _ in none.named_parameters()} == {n for n in names if "norm" not in n}
    assert {n for n, _ in plain.named_parameters()} == {n for n in names if not n.endswith("gain")}
    tanh = built("wide_resnet", shape, depth=10, width=1, activation="tanh")
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(get_flat(tanh), get_flat(full))
    assert not torch.allclose(tanh(images), full(images))


# --- exact in the bookkeeping engine

SMALL: list[tuple[str, tuple[int, ...], dict[str, object]]] = [
    ("scatter_linear", (81, 3, 3), {}),
    ("scatter_linear", (6, 3, 3), {"groups": 0}),
    ("scatter_cnn", (81, 5, 5), {}),
    ("scatter_cnn", (9, 4, 4), {"groups": 3, "channels": [4, 4, 4], "strides": [1, 2, 1], "hidden": 0}),
    ("nf_resnet_50", (3, 8, 8), {"stem": "small", "width": 4}),
    ("nf_resnet_50", (2, 32, 32), {"width": 4}),
    ("resnet_18_v2", (3, 8, 8), {"stem": "small", "width": 4, "groups": 2}),
    ("resnet_18_v2", (1, 32, 32), {"width": 4, "groups": 4}),
    ("wide_resnet", (1, 8, 8), {"depth": 10, "width": 1, "normalisation": "none"}),
    ("wide_resnet", (1, 8, 8), {"depth": 10, "width": 1, "groups": 1, "activation": "tanh"}),
]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("name", "shape", "options"), SMALL)
def test_bookkeeping_equals_vmap(
    name: str, shape: tuple[int, ...], options: dict[str, object], views: int
) -> None:
    """The engine itself never falls back, so equality shows that the engine itself follows the model."""
    model = built(name, shape, 4, "float64", **options)
    generator = seeds.torch_stream(5, "test", views)
    start = get_flat(model)
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    set_flat(model, start + 0.1 * noise)  # no gain or bias is left at 0, where gradients would vanish
    inputs = torch.randn(5, views, *shape, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 0])
    norms: Tensor = vmap.clipped_sum(model, inputs, targets, cross_entropy, FlatClip(1.0))[1]
    clip = FlatClip(float(norms.median()))  # some are clipped, some are not
    oracle = vmap.clipped_sum(model, inputs, targets, cross_entropy, clip)
    answer = bookkeeping.clipped_sum(model, inputs, targets, cross_entropy, clip)
    for mine, theirs in zip(answer, oracle, strict=True):
        assert (mine - theirs).norm() <= 1e-10 * theirs.norm()
    assert models.examples_are_independent(model, shape)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ModelConfig("scatter_linear"), (784,), "data.features=scattering"),
        (ModelConfig("scatter_cnn", {"groups": 5}), (81, 7, 7), "must divide the 81 channels"),
        (ModelConfig("scatter_cnn", {"strides": [1]}), (81, 7, 7), "one number a convolution"),
        (ModelConfig("scatter_cnn", {"activation": "tahn"}), (81, 7, 7), "Did you mean 'tanh'"),
        (ModelConfig("nf_resnet_50"), (3, 28, 28), "at least 32x32"),
        (ModelConfig("nf_resnet_50", {"stem": "smal"}), (3, 32, 32), "Did you mean 'small'"),
        (ModelConfig("resnet_18_v2", {"groups": 48}), (3, 224, 224), "must divide model.options.width"),
        (ModelConfig("wide_resnet", {"normalisation": "batch"}), (3, 32, 32), "one of group, none"),
    ],
)
def test_wrong_options_are_refused(config: ModelConfig, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.build(config, shape, 10, seed=0)
