"""The bookkeeping engine against its oracle: vmap over one example's gradient, for every kind of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim.clipping.flat import FlatClip
from fedsim.grads import vmap
from fedsim.grads.bookkeeping import Options, choose, clipped_sum
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.bookkeeping.tape import Tape
from fedsim.models.wide_resnet import WideResNet, WideResNetOptions, WSConv2d

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DEFAULT = Options()
TIGHT = Options(memory_budget=0, scratch=1)  # nothing kept, one example at a time


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of every output entry, one value a view."""
    return (outputs.flatten(1) - targets.unsqueeze(1)).square().sum(1)


def assert_agrees(model: nn.Module, inputs: Tensor, dtype: torch.dtype, options: Options = DEFAULT) -> None:
    """Compare clipped sums and norms; some examples are clipped and some are not."""
    model = model.to(dtype)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    targets = torch.linspace(-1.0, 1.0, len(inputs), dtype=dtype)
    twin = copy.deepcopy(model)
    _, norms, _ = vmap.clipped_sum(twin, inputs, targets, loss, FlatClip(1.0))
    clip = FlatClip(float(norms.median()) * 0.9 + 1e-12)
    expected = vmap.clipped_sum(copy.deepcopy(model), inputs, targets, loss, clip)
    found = clipped_sum(model, inputs, targets, loss, clip, options)
    tolerance = TOLERANCE[dtype]
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float64
    torch.testing.assert_close(
        found[1], expected[1].double(), rtol=tolerance, atol=tolerance * float(norms.max())
    )
    error = (found[0] - expected[0]).norm()
    assert error <= tolerance * expected[0].norm() + 1e-12, f"relative error {error / expected[0].norm():.1e}"
    torch.testing.assert_close(found[2], expected[2], rtol=tolerance, atol=tolerance)


class Apply(nn.Module):
    """A module made of a function and the modules and parameters it uses."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.5)


def normal_(module: nn.Module) -> nn.Module:
    """Random values for gains and biases too, which start at one and zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def ws(*arguments: int, **named: int) -> nn.Module:
    module = WSConv2d(*arguments, **named)
    nn.init.normal_(module.gain, mean=1.0, std=0.3)
    return module


class StandardisedByHand(nn.Conv2d):
    """A standardised convolution no rule knows: the kernel's gradients are pulled back."""

    def forward(self, inputs: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(inputs, (self.weight - mean) / (variance + 1e-3).sqrt(), self.bias)


class Attention(nn.Module):
    def __init__(self, cross: bool, causal: bool = False, first: bool = True, **options: int) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(8, 2, batch_first=first, **options)
        self.memory = nn.Linear(8, options.get("kdim", 8))
        self.cross, self.causal, self.first = cross, causal, first

    def forward(self, inputs: Tensor) -> Tensor:
        memory = self.memory(inputs[:, 1:]) if self.cross else inputs
        mask = None
        if self.causal:
            mask = torch.ones(inputs.shape[1], memory.shape[1], dtype=torch.bool).triu(1)
        if not self.first:
            query, memory = inputs.transpose(0, 1), memory.transpose(0, 1)
        else:
            query = inputs
        if not self.cross:
            memory = query
        result, _ = self.core(query, memory, memory, attn_mask=mask, need_weights=not self.causal)
        return result if self.first else result.transpose(0, 1)


class Tied(nn.Module):
    """A language model whose embedding is its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.middle(self.table(ids))), self.table.weight)


class Recurrent(nn.Module):
    """One linear layer used at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        state = torch.zeros_like(inputs[:, 0])
        for place in range(inputs.shape[1]):
            state = torch.tanh(self.step(state + inputs[:, place]))
        return state


class TokenAndPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.scale = weight(1, 1, 6), weight(1, 6, 6), weight(6)
        self.linear = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(inputs), -1, -1), inputs], dim=1)
        return self.linear(tokens * self.scale + self.position)


def image(channels: int = 4, size: int = 7, other: int = 6) -> tuple[int, ...]:
    return (channels, size, other)


IDS = "ids"
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | str]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "ten outputs": (
        lambda: Apply(lambda m, x: m.b(m.a(x).tanh_()), a=nn.Linear(5, 9, bias=False), b=nn.Linear(9, 10)),
        (5,),
    ),
    "linear on places": (lambda: nn.Linear(6, 3), (5, 6)),
    "linear on a grid": (lambda: nn.Linear(6, 3), (2, 4, 6)),
    "linear on places, wide": (lambda: nn.Linear(6, 40), (2, 6)),
    "linear on merged places": (
        lambda: Apply(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]), a=nn.Linear(6, 3)),
        (5, 6),
    ),
    "matrix products": (
        lambda: Apply(
            lambda m, x: torch.addmm(m.c, x @ m.a, m.b), a=weight(5, 4), b=weight(4, 3), c=weight(3)
        ),
        (5,),
    ),
    "two linear layers": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)), (5,)),
    "conv2d": (lambda: nn.Conv2d(4, 5, 3), image()),
    "conv2d strided": (lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(1, 2)), image()),
    "conv2d dilated": (lambda: nn.Conv2d(4, 5, 3, dilation=2, padding=2, bias=False), image()),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 5, 1, stride=2), image()),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), image()),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1), image()),
    "conv2d same": (lambda: nn.Conv2d(4, 5, (3, 4), padding="same", dilation=(1, 1)), image()),
    "conv2d valid": (lambda: nn.Conv2d(4, 5, 3, padding="valid"), image()),
    "conv2d circular": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), image()),
    "conv2d reflect": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), image()),
    "conv2d replicate": (lambda: nn.Conv2d(4, 5, 3, padding=2, padding_mode="replicate"), image()),
    "conv2d wide": (lambda: nn.Conv2d(20, 30, 3, padding=1), image(20, 3, 3)),
    "conv2d turned": (lambda: nn.Conv2d(3, 16, 3, stride=(2, 1), padding=1), image(3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv1d same, grouped": (lambda: nn.Conv1d(4, 4, 4, padding="same", groups=2), (4, 9)),
    "conv1d circular": (lambda: nn.Conv1d(3, 4, 3, padding=1, dilation=2, padding_mode="circular"), (3, 9)),
    "conv3d (no rule)": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "transposed conv (no rule)": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), image(3, 3, 3)),
    "ws conv": (lambda: ws(4, 5, 3, padding=1), image()),
    "ws conv wide": (lambda: ws(20, 30, 3, padding=1), image(20, 3, 3)),
    "ws conv turned": (lambda: ws(3, 16, 3), image(3)),
    "ws conv, then in place": (lambda: Apply(lambda m, x: m.a(x).tanh_(), a=ws(20, 30, 3)), image(20, 4, 3)),
    "ws conv stack": (
        lambda: nn.Sequential(
            ws(3, 8, 3, padding=1),
            nn.ReLU(),
            ws(8, 8, 3, stride=2, padding=1),
            nn.GroupNorm(2, 8),
            ws(8, 4, 1),
        ),
        image(3),
    ),
    "ws conv tied": (lambda: Apply(lambda m, x: m.a(torch.tanh(m.a(x))), a=ws(4, 4, 3, padding=1)), image()),
    "ws conv clamped": (lambda: _tiny(ws(4, 5, 3)), image()),
    "ws conv by hand": (
        lambda: nn.Sequential(StandardisedByHand(4, 5, 3), nn.Tanh(), StandardisedByHand(5, 3, 2)),
        image(),
    ),
    "group norm": (lambda: normal_(nn.GroupNorm(2, 4)), image()),
    "group norm on places": (lambda: normal_(nn.GroupNorm(3, 6)), (6, 5)),
    "group norm of vectors": (lambda: normal_(nn.GroupNorm(3, 6)), (6,)),
    "layer norm": (lambda: normal_(nn.LayerNorm(6)), (5, 6)),
    "layer norm of vectors": (lambda: normal_(nn.LayerNorm(6)), (6,)),
    "layer norm of two axes": (lambda: normal_(nn.LayerNorm((5, 6))), (5, 6)),
    "layer norm without bias": (lambda: normal_(nn.LayerNorm(6, bias=False)), (2, 5, 6)),
    "instance norm 1d": (lambda: normal_(nn.InstanceNorm1d(4, affine=True)), (4, 7)),
    "instance norm 2d": (lambda: normal_(nn.InstanceNorm2d(4, affine=True)), image()),
    "rms norm": (lambda: normal_(nn.RMSNorm(6)), (5, 6)),
    "rms norm of two axes": (lambda: normal_(nn.RMSNorm((5, 6))), (2, 5, 6)),
    "embedding": (lambda: nn.Embedding(11, 5), IDS),
    "embedding with padding": (lambda: nn.Embedding(11, 5, padding_idx=-1), IDS),
    "embedding, position ids": (
        lambda: Apply(
            lambda m, x: m.a(x) + m.b(torch.arange(x.shape[1])), a=nn.Embedding(11, 5), b=nn.Embedding(9, 5)
        ),
        IDS,
    ),
    "tied embedding and output": (Tied, IDS),
    "tied linear layers": (lambda: Apply(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(6, 6)), (5, 6)),
    "tied, transposed": (
        lambda: Apply(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=nn.Linear(6, 4)),
        (5, 6),
    ),
    "tied convolutions": (
        lambda: Apply(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Conv2d(4, 4, 3, padding=1)),
        image(),
    ),
    "tied gain and matrix": (lambda: Apply(lambda m, x: F.linear(x, m.w) * m.w[0], w=weight(6, 6)), (5, 6)),
    "recurrent": (Recurrent, (4, 6)),
    "slices of one parameter": (
        lambda: Apply(lambda m, x: F.linear(x, m.w[:3]) * F.linear(x, m.w[3:]), w=weight(6, 5)),
        (5,),
    ),
    "overlapping slices": (
        lambda: Apply(lambda m, x: F.linear(x, m.w[:4]) * F.linear(x, m.w[2:]), w=weight(6, 5)),
        (5,),
    ),
    "repeated entries": (lambda: Apply(lambda m, x: F.linear(x, m.w[[0, 0, 1]]), w=weight(2, 5)), (5,)),
    "scalar gain": (lambda: Apply(lambda m, x: m.a(x) * m.gain, a=nn.Linear(6, 3), gain=weight(1)), (5, 6)),
    "gains of several kinds": (
        lambda: Apply(
            lambda m, x: (x - m.a) / (1.5 + m.b.square()) + torch.exp(m.c),
            a=weight(6),
            b=weight(5, 1),
            c=weight(1, 1, 1),
        ),
        (5, 6),
    ),
    "gain in place": (lambda: Apply(lambda m, x: m.a(x).add_(m.b), a=nn.Linear(6, 3), b=weight(3)), (5, 6)),
    "token and position": (TokenAndPosition, (5, 6)),
    "token repeated and moved": (
        lambda: Apply(
            lambda m, x: torch.cat([m.t.expand(len(x), 1, 6) * 2.0, x], 1) + m.p,
            t=weight(1, 1, 6),
            p=weight(6, 6),
        ),
        (5, 6),
    ),
    "masked token": (lambda: Apply(lambda m, x: torch.where(x[..., :1] > 0, x, m.t), t=weight(6)), (5, 6)),
    "prelu (no rule)": (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(5)), (5, 6)),
    "bilinear (no rule)": (lambda: Apply(lambda m, x: m.b(x, torch.tanh(x)), b=nn.Bilinear(6, 6, 3)), (6,)),
    "einsum (no rule)": (
        lambda: Apply(lambda m, x: torch.einsum("ntd,hde->nthe", x, m.w), w=weight(2, 6, 3)),
        (5, 6),
    ),
    "matrix on the left (no rule)": (lambda: Apply(lambda m, x: m.w @ x, w=weight(3, 5)), (5, 6)),
    "self-attention": (lambda: Attention(cross=False), (5, 8)),
    "self-attention, causal": (lambda: Attention(cross=False, causal=True), (5, 8)),
    "self-attention, places first": (lambda: Attention(cross=False, causal=True, first=False), (5, 8)),
    "cross-attention": (lambda: Attention(cross=True), (5, 8)),
    "cross-attention, causal": (lambda: Attention(cross=True, causal=True), (5, 8)),
    "cross-attention, other widths": (lambda: Attention(cross=True, kdim=7, vdim=7), (5, 8)),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        (5, 8),
    ),
    "transformer decoder": (
        lambda: Apply(
            lambda m, x: m.d(x, m.l(x[:, 1:])),
            d=nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
            l=nn.Linear(8, 8),
        ),
        (5, 8),
    ),
    "frozen layer": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 2)
        ),
        (5,),
    ),
    "frozen weight": (
        lambda: _freeze(
            nn.Sequential(nn.Conv2d(4, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(100, 2))
        ),
        image(),
    ),
    "frozen ws weight": (lambda: _freeze(nn.Sequential(ws(4, 5, 3), nn.Tanh(), ws(5, 3, 2))), image()),
    "unused parameter": (lambda: Apply(lambda m, x: m.a(x), a=nn.Linear(5, 3), b=nn.Linear(5, 3)), (5,)),
    "wide resnet": (lambda: _wrn(), (3, 8, 8)),
    "constant mask on a weight": (
        lambda: Apply(lambda m, x: F.linear(x, m.w * torch.eye(6)), w=weight(6, 6)),
        (5, 6),
    ),
}


def _tiny(module: nn.Module) -> nn.Module:
    """So small a spread that the standardisation of two channels is clamped."""
    with torch.no_grad():
        module.get_parameter("weight")[:2] *= 1e-3
    return module


def _freeze(module: nn.Module) -> nn.Module:
    next(module.parameters()).requires_grad_(False)
    return module


def _wrn() -> nn.Module:
    model = WideResNet((3, 8, 8), 5, WideResNetOptions(depth=10, width=1))
    model.reset(torch.Generator().manual_seed(3))
    return model


def make(case: str, examples: int, views: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    build, shape = CASES[case]
    model = build()
    if shape == IDS:
        ids = torch.randint(0, 11, (examples, views, 6))
        ids[:, :, 1] = ids[:, :, 0]  # twice in an example
        ids[0, 0, 2] = 10  # the last one, which may be padding
        return model, ids
    return model, torch.randn((examples, views, *shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_kind_agrees_with_the_oracle(case: str, views: int, dtype: torch.dtype) -> None:
    model, inputs = make(case, 4, views)
    assert_agrees(model, inputs, dtype)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_when_memory_is_tight(case: str, views: int) -> None:
    model, inputs = make(case, 5, views)
    assert_agrees(model, inputs, torch.float64, TIGHT)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    "case", [name for name, (_, shape) in CASES.items() if len(shape) == 3 and shape != IDS]
)
def test_channels_last_agrees(case: str, views: int) -> None:
    model, inputs = make(case, 3, views)
    assert_agrees(model, inputs, torch.float64, Options(channels_last=True))
    assert_agrees(model, inputs, torch.float32, Options(channels_last=True, memory_budget=0))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("plan", ["loop", "grouped", "shifts", "patches", "slices", "gram"])
@pytest.mark.parametrize("case", [name for name in CASES if "conv" in name])
def test_every_way_of_a_convolution_agrees(
    case: str, plan: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forced(tape: Tape, kernel: Any, inputs: Tensor, geometry: Geometry, *_: Any) -> Any:
        if geometry.groups > 1 and plan in ("shifts", "patches", "slices", "gram"):
            return "loop", keep
        return plan, keep and plan != "gram"

    monkeypatch.setattr(choose, "convolution", forced)
    for views in (1, 2):
        model, inputs = make(case, 3, views)
        assert_agrees(model, inputs, torch.float64)
        assert_agrees(model, inputs, torch.float64, Options(channels_last=True))
        assert_agrees(model, inputs, torch.float64, Options(channels_last=True, scratch=1))


def conv_layers(
    draw: st.DrawFn, channels: int, size: tuple[int, int]
) -> tuple[nn.Module, int, tuple[int, int]]:
    """A random convolution that fits, its output channels and size."""
    groups = draw(st.sampled_from([1, 1, channels, 2 if channels % 2 == 0 else 1]))
    out = groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, min(3, edge))) for edge in size)
    stride = tuple(draw(st.integers(1, 2)) for _ in size)
    dilation = tuple(
        1 if k * 2 - 1 > edge else draw(st.integers(1, 2)) for k, edge in zip(kernel, size, strict=True)
    )
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    mode = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    bias = draw(st.booleans())
    standardised: WSConv2d | None = None
    if draw(st.booleans()):
        groups = 1
        standardised = WSConv2d(channels, out, kernel[0], stride[0], padding[0])
        nn.init.normal_(standardised.gain, mean=1.0, std=0.2)
        if kernel[0] > min(size) or channels * kernel[0] == 1:
            standardised = None
    options: Any = (kernel, stride, padding, dilation, groups, bias, mode)
    module = standardised or nn.Conv2d(channels, out, *options)
    with torch.no_grad():
        produced = module(torch.zeros(1, channels, *size)).shape
    return module, out, tuple(produced[2:])


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A random small network of mixed layers, and a batch (examples, views, ...) for it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    examples, views = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        channels = draw(st.integers(1, 4))
        size = (draw(st.integers(2, 6)), draw(st.integers(2, 6)))
        inputs = torch.randn(examples, views, channels, *size)
        for _ in range(draw(st.integers(1, 3))):
            layer, channels, size = conv_layers(draw, channels, size)
            layers.append(layer)
            if draw(st.booleans()) and size[0] * size[1] > 2:
                layers.append(normal_(nn.GroupNorm(draw(st.sampled_from([1, channels])), channels)))
            layers.append(draw(st.sampled_from([nn.Tanh(), nn.ReLU(), nn.Identity()])))
            if draw(st.booleans()) and len(layers) > 2 and isinstance(layers[0], nn.Conv2d):
                same = nn.Conv2d(channels, channels, 1)
                layers += [same, nn.Tanh(), same]
        layers.append(nn.Flatten(2))
        width = size[0] * size[1]
    else:
        width, places = draw(st.integers(1, 6)), draw(st.integers(1, 4))
        inputs = torch.randn(examples, views, places, width)
    shared: nn.Linear | None = None
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["linear", "norm", "rms", "gain", "position", "shared", "attention"]))
        if kind == "linear":
            out = draw(st.integers(1, 6))
            layers.append(nn.Linear(width, out, bias=draw(st.booleans())))
            width, shared = out, None
        elif kind == "norm" and width > 2:
            layers.append(normal_(nn.LayerNorm(width)))
        elif kind == "rms":
            layers.append(normal_(nn.RMSNorm(width)))
        elif kind == "gain":
            layers.append(Apply(lambda m, x: x * m.gain, gain=weight(draw(st.sampled_from([1, width])))))
        elif kind == "position":
            layers.append(Apply(lambda m, x: x + m.offset, offset=weight(1, 1, width)))
        elif kind == "shared":
            shared = shared or nn.Linear(width, width)
            layers += [shared, nn.Tanh()]
        elif kind == "attention" and width % 2 == 0:
            layers.append(
                Apply(lambda m, x: m.core(x, x, x)[0], core=nn.MultiheadAttention(width, 2, batch_first=True))
            )
    layers.append(nn.Linear(width, 2))
    return nn.Sequential(*layers), inputs


def oracle_error(model: nn.Module, inputs: Tensor) -> float:
    """Relative error of the float32 oracle itself: large for networks that divide by tiny deviations."""
    sums = []
    for dtype in (torch.float32, torch.float64):
        targets = torch.linspace(-1.0, 1.0, len(inputs), dtype=dtype)
        sums.append(
            vmap.clipped_sum(copy.deepcopy(model).to(dtype), inputs.to(dtype), targets, loss, FlatClip(1e9))[
                0
            ]
        )
    return float((sums[0] - sums[1]).norm() / sums[1].norm())


@given(networks(), st.sampled_from([Options(), TIGHT, Options(channels_last=True)]))
@settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_two_hundred_random_networks_agree_with_the_oracle(
    drawn: tuple[nn.Module, Tensor], options: Options
) -> None:
    model, inputs = drawn
    assume(oracle_error(model, inputs) < 1e-6)
    assert_agrees(model, inputs, torch.float32, options)
    assert_agrees(model, inputs, torch.float64, options)
