"""Model registry, initialisation, and the fitness check for per-example gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim import models, seeds
from fedsim.config import ModelConfig
from fedsim.models.initialise import fan_in_truncated_normal_, initialise
from fedsim.models.wide_resnet import WSConv2d
from fedsim.validate import InputError

CASES = [
    ("small_cnn", {}, (1, 28, 28), 26_010),
    ("small_cnn", {"activation": "relu"}, (1, 14, 14), 10_650),
    ("small_cnn", {}, (3, 32, 37), None),
    ("small_cnn", {"convolution": "weight_standardised"}, (1, 28, 28), 26_010 + 48),
    ("small_cnn", {"normalisation": "group", "groups": 4}, (1, 28, 28), 26_010 + 2 * 48),
    ("cifar_cnn", {}, (3, 32, 32), 131_466),
    ("cifar_cnn", {"activation": "tanh"}, (1, 8, 9), None),
    ("linear", {}, (1280,), 12_810),
    ("mlp", {"hidden": [7, 5], "activation": "gelu"}, (3, 4, 4), 49 * 7 + 8 * 5 + 6 * 10),
    ("mlp", {"hidden": []}, (4,), 50),
    ("wide_resnet", {}, (3, 32, 32), 2_753_818),
    ("wide_resnet", {"depth": 10, "width": 1, "groups": 4, "convolution": "plain"}, (1, 8, 8), None),
]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(("name", "options", "shape", "parameters"), CASES)
def test_family_builds_runs_and_keeps_examples_apart(
    name: str, options: dict[str, object], shape: tuple[int, ...], parameters: int | None
) -> None:
    model = models.build(ModelConfig(name, options), shape, 10, seed=1)
    assert model(torch.zeros(2, *shape)).shape == (2, 10)
    assert parameters is None or flat(model).numel() == parameters
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    assert torch.isfinite(flat(model)).all()
    assert models.examples_are_independent(model, shape)
    assert model.training


@pytest.mark.parametrize("name", ["small_cnn", "wide_resnet", "mlp"])
def test_same_seed_same_values_and_no_global_generator(name: str) -> None:
    options = {"depth": 10, "width": 1} if name == "wide_resnet" else {}
    before = torch.get_rng_state(), repr(np.random.get_state(legacy=False)["state"])  # noqa: NPY002
    first, again, other = (
        flat(models.build(ModelConfig(name, options), (1, 28, 28), 10, seed=s)) for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state(legacy=False)["state"]) == before[1]  # noqa: NPY002
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_float64_model() -> None:
    model = models.build(ModelConfig("small_cnn", dtype="float64"), (1, 28, 28), 10, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_default_initialisation_has_pytorch_bounds() -> None:
    model = models.build(ModelConfig("small_cnn"), (1, 28, 28), 10, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # kaiming_uniform with a = sqrt(5)
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert module.bias is not None
            assert 0.5 * bound < module.bias.abs().max() <= bound


def test_linear_starts_at_zero_unless_told() -> None:
    assert not flat(models.build(ModelConfig("linear"), (5,), 3, seed=0)).any()
    assert flat(models.build(ModelConfig("linear", {"zero_init": False}), (5,), 3, seed=0)).all()


def test_wide_resnet_initialisation() -> None:
    model = models.build(ModelConfig("wide_resnet", {"depth": 10, "width": 2}), (3, 32, 32), 10, seed=0)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert (p == expected).all(), name
    largest = max((p.detach() for p in model.parameters() if p.dim() == 4), key=torch.numel)
    fan_in = largest[0].numel()
    # 147,456 entries: the sample standard deviation is within 1 % except with probability below 1e-6
    assert largest.std().item() * math.sqrt(fan_in) == pytest.approx(1.0, rel=0.01)
    weight = torch.empty(1000, 25)
    fan_in_truncated_normal_(weight, seeds.torch_stream(0, "test"))
    assert weight.abs().max() <= 2 / 5 / 0.8796


def test_weight_standardised_kernel() -> None:
    conv = WSConv2d(3, 4, 3).double()
    with torch.no_grad():
        initial = torch.randn(
            conv.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        conv.weight.copy_(initial)
        conv.gain.copy_(torch.tensor([1.0, 2.0, 0.5, 3.0]))
        conv.bias.zero_()  # type: ignore[union-attr]
    taps = torch.eye(27, dtype=torch.float64).reshape(27, 3, 3, 3)
    kernel = conv(taps).reshape(27, 4).T  # the response to each unit input is the kernel
    torch.testing.assert_close(kernel.mean(1), torch.zeros(4).double(), atol=1e-12, rtol=0)
    # mean square 1 / fan in before the gain: unit norm
    torch.testing.assert_close(kernel.norm(dim=1), conv.gain.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("convolution", ["weight_standardised", "plain"])
def test_wide_resnet_relu_comes_before_every_norm(convolution: str) -> None:
    """Each norm sees what a ReLU left; no convolution after the first, nor the head, does."""
    options = {"depth": 10, "width": 1, "convolution": convolution}
    model = models.build(ModelConfig("wide_resnet", options), (3, 16, 16), 10, seed=0)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm | nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    norms = [name for name in seen if "norm" in name]
    assert len(norms) == 3 * 2 + 3 + 1  # two a block, one for the projection of each stage, the last
    for name, value in seen.items():
        assert bool((value < 0).any()) != (name in norms), name


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ModelConfig("smal_cnn"), (1, 28, 28), "Did you mean 'small_cnn'"),
        (ModelConfig("small_cnn", {"activatoin": "relu"}), (1, 28, 28), "Did you mean 'activation'"),
        (ModelConfig("small_cnn", {"activation": "rleu"}), (1, 28, 28), "Did you mean 'relu'"),
        (ModelConfig("small_cnn"), (1, 13, 28), "at least 14x14"),
        (ModelConfig("small_cnn"), (784,), r"got \(784,\)"),
        (ModelConfig("wide_resnet", {"depth": 15}), (3, 32, 32), r"6 n \+ 4"),
        (ModelConfig("wide_resnet", {"groups": 3}), (3, 32, 32), "model.options.groups"),
        (ModelConfig("wide_resnet", {"convolution": "plane"}), (3, 32, 32), "Did you mean 'plain'"),
        (ModelConfig("mlp", {"hidden": [0]}), (4,), "model.options.hidden"),
        (ModelConfig("mlp", dtype="float16"), (4,), "model.dtype"),
    ],
)
def test_wrong_configuration_is_refused(config: ModelConfig, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.build(config, shape, 10, seed=0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4), r"BatchNorm2d at '0\.1': it mixes examples.*GroupNorm"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm"),
        (nn.LazyBatchNorm1d(), "mixes examples"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "track_running_stats=False"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "buffers change"),
        (nn.Dropout(0.1), r"masks \(p = 0\.1\)"),
        (nn.AlphaDropout(0.1), "masks"),
        (nn.LSTM(3, 3, 2, dropout=0.2), "masks"),
        (nn.MultiheadAttention(4, 2, dropout=0.2), "masks"),
        (nn.RReLU(), "global generator"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
    ],
)
def test_check_names_layer_and_remedy(layer: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.check(nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), layer)))


def test_check_accepts_layers_that_keep_examples_apart() -> None:
    models.check(
        nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4),
            nn.LayerNorm(4),
            nn.Dropout(0.0),
            nn.ReLU(inplace=True),
        )
    )
    with pytest.raises(InputError, match="at least one trainable"):
        models.check(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.Dropout(0.1),
        nn.LSTM(3, 3, 2, dropout=0.2),
        nn.RReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_eval_mode_freezes_is_accepted_in_eval_mode_only(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer)
    layer.eval()
    models.check(model)
    model.train()
    with pytest.raises(InputError, match=r"model contains .* at '1"):
        models.check(model)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.FractionalMaxPool2d(2, 2),
        nn.Embedding(3, 3, max_norm=1),
    ],
)
def test_what_eval_mode_does_not_freeze_is_refused_there_too(layer: nn.Module) -> None:
    with pytest.raises(InputError, match="model contains"):
        models.check(nn.Sequential(nn.Linear(4, 4), layer.eval()))


def test_models_train_in_the_modes_they_were_built_in() -> None:
    def parts() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Dropout(0.0))

    as_loaded = models.for_training(parts().eval())
    assert [m.training for m in as_loaded] == [True, False, True, True], "running statistics stay frozen"
    on_purpose = parts()
    on_purpose[2].eval()
    assert [m.training for m in models.for_training(on_purpose)] == [True, True, False, True]


class _MixesByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs - inputs.mean(0))


class _Counts(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        return self.linear(inputs)


def test_behaviour_check_finds_what_the_layer_list_cannot() -> None:
    assert not models.examples_are_independent(_MixesByHand(), (3,))
    assert not models.examples_are_independent(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (1, 5, 5)
    )
    counting = _Counts().eval()
    assert not models.examples_are_independent(counting, (3,))
    assert counting.seen == 0
    assert not counting.linear.training
    assert models.examples_are_independent(nn.Linear(3, 3).double(), (3,))


def test_initialise_refuses_what_it_does_not_know() -> None:
    generator = seeds.torch_stream(0, "test")
    with pytest.raises(TypeError, match="LSTM holds parameters"):
        initialise(nn.LSTM(2, 2), generator)
    with pytest.raises(TypeError, match="_Counts holds buffers"):
        initialise(_Counts(), generator)


def test_initialise_embedding_keeps_padding_row_zero() -> None:
    table = nn.Embedding(5, 3, padding_idx=2)
    initialise(table, seeds.torch_stream(0, "test"))
    assert not table.weight[2].any()
    assert table.weight[0].all()
