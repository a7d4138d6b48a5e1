"""Layers of torch.nn that have parameters, with their options."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import (
    Call,
    Case,
    classified,
    ids,
    labels,
    numbers,
    with_frozen_statistics,
)
from fedsim.models.layers import WSConv2d


def cases() -> Iterator[Case]:
    """Every row of this file."""
    yield from dense()
    yield from convolutions()
    yield from norms()
    yield from embeddings()
    yield from recurrent()
    yield from attention()
    yield from adaptive_softmax()


def dense() -> Iterator[Case]:
    """Linear layers and the like."""
    group = "dense"
    yield Case(group, "Linear, zero", lambda: nn.Linear(5, 4), numbers(5), zero=("weight", "bias"))
    for name, body, shape in (
        ("Linear", lambda: nn.Linear(5, 7), (5,)),
        ("Linear, no bias", lambda: nn.Linear(5, 7, bias=False), (5,)),
        ("Linear at 6 positions", lambda: nn.Linear(5, 7), (6, 5)),
        ("Linear at 2 positions, wide", lambda: nn.Linear(64, 48), (2, 64)),
        ("Linear at 3 x 2 positions", lambda: nn.Linear(5, 7), (3, 2, 5)),
        ("LazyLinear, materialised", lambda: nn.LazyLinear(7), (5,)),
        ("PReLU, one slope", lambda: nn.Sequential(nn.Linear(5, 7), nn.PReLU()), (5,)),
        ("PReLU, a slope a channel", lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.PReLU(3)), (2, 8)),
    ):
        yield classified(group, name, body, numbers(*shape))
    for name, bias, shape in (("Bilinear", True, (8,)), ("Bilinear at positions, no bias", False, (3, 8))):
        yield classified(
            group,
            name,
            lambda bias=bias: Call(
                lambda m, x: m.layer(x[..., :5], x[..., 5:]), layer=nn.Bilinear(5, 3, 6, bias=bias)
            ),
            numbers(*shape),
        )


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
        yield classified(
            group, f"Embedding{name}", lambda given=given: nn.Embedding(9, 4, **given), ids(6, 9)
        )
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


def recurrent() -> Iterator[Case]:
    """Recurrent layers and cells."""
    group = "recurrent"
    variants: dict[str, dict[str, object]] = {
        "": {},
        ", two layers": {"num_layers": 2},
        ", both directions": {"bidirectional": True},
        ", two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
    }
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        for name, given in variants.items():
            yield classified(
                group,
                f"{kind.__name__}{name}",
                lambda kind=kind, given=given: kind(4, 5, batch_first=True, **given),
                numbers(6, 4),
            )
        yield classified(
            group,
            f"{kind.__name__}, time first",
            lambda kind=kind: Call(
                lambda m, x: m.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=kind(4, 5)
            ),
            numbers(6, 4),
        )
    yield classified(
        group, "RNN, ReLU", lambda: nn.RNN(4, 5, nonlinearity="relu", batch_first=True), numbers(6, 4)
    )
    yield classified(
        group, "LSTM, projection", lambda: nn.LSTM(4, 5, proj_size=3, batch_first=True), numbers(6, 4)
    )
    yield classified(
        group,
        "LSTM, projection, two layers, both directions",
        lambda: nn.LSTM(4, 5, 2, proj_size=3, bidirectional=True, batch_first=True),
        numbers(6, 4),
    )

    def started(m: nn.Module, x: Tensor) -> Tensor:
        start = m.start.expand(1, len(x), 5).contiguous()
        return m.layer(x, (start, torch.zeros_like(start)))[0]

    yield classified(
        group,
        "LSTM, learned start state",
        lambda: Call(
            started, layer=nn.LSTM(4, 5, batch_first=True), start=nn.Parameter(torch.randn(1, 1, 5))
        ),
        numbers(6, 4),
    )

    def packed(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.layer(sequence)[1][-1]

    yield classified(
        group,
        "GRU on packed sequences",
        lambda: Call(packed, layer=nn.GRU(4, 5, batch_first=True)),
        lambda examples, views: {
            "x": numbers(6, 4)(examples, views),
            "lengths": torch.randint(2, 7, (examples, views)),
        },
    )

    def stepped(m: nn.Module, x: Tensor) -> Tensor:
        state = None
        for moment in x.unbind(1):
            state = m.cell(moment, state)
        return state if isinstance(state, Tensor) else state[0]

    for name, cell in (
        ("RNNCell", lambda: nn.RNNCell(4, 5)),
        ("RNNCell, ReLU, no bias", lambda: nn.RNNCell(4, 5, bias=False, nonlinearity="relu")),
        ("LSTMCell", lambda: nn.LSTMCell(4, 5)),
        ("GRUCell", lambda: nn.GRUCell(4, 5)),
    ):
        yield classified(group, name, lambda cell=cell: Call(stepped, cell=cell()), numbers(6, 4))


def attention() -> Iterator[Case]:
    """Attention and the layers built from it."""
    group = "attention"

    def own(m: nn.Module, x: Tensor) -> Tensor:
        return m.layer(x, x, x)[0]

    def crossed(m: nn.Module, x: Tensor) -> Tensor:
        return m.layer(x, x[..., :6], x[..., :4], need_weights=False)[0]

    def causal(m: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return m.layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    def weights(m: nn.Module, x: Tensor) -> Tensor:
        return m.layer(x, x, x, average_attn_weights=False)[1]

    def time_first(m: nn.Module, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        return m.layer(turned, turned, turned)[0].transpose(0, 1)

    attend = nn.MultiheadAttention
    for name, function, layer in (
        ("", own, lambda: attend(8, 2, batch_first=True)),
        (", no bias", own, lambda: attend(8, 2, bias=False, batch_first=True)),
        (", learned key and value", own, lambda: attend(8, 2, add_bias_kv=True, batch_first=True)),
        (", zero key and value", own, lambda: attend(8, 2, add_zero_attn=True, batch_first=True)),
        (
            ", keys and values of other widths",
            crossed,
            lambda: attend(8, 2, kdim=6, vdim=4, batch_first=True),
        ),
        (", causal", causal, lambda: attend(8, 2, batch_first=True)),
        (", its weights", weights, lambda: attend(8, 2, batch_first=True)),
        (", time first", time_first, lambda: attend(8, 2)),
    ):
        yield classified(
            group,
            f"MultiheadAttention{name}",
            lambda function=function, layer=layer: Call(function, layer=layer()),
            numbers(5, 8),
        )

    def masked(examples: int, views: int) -> dict[str, Tensor]:
        mask = torch.arange(5) >= torch.randint(2, 6, (examples, views, 1))
        return {"x": numbers(5, 8)(examples, views), "mask": mask}

    yield classified(
        group,
        "MultiheadAttention, padding mask",
        lambda: Call(
            lambda m, x, mask: m.layer(x, x, x, key_padding_mask=mask)[0],
            layer=attend(8, 2, batch_first=True),
        ),
        masked,
    )
    settings = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
    encoder, decoder = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer

    def decoded(m: nn.Module, x: Tensor) -> Tensor:
        return m.layer(x, torch.tanh(x.flip(1)))

    def both(m: nn.Module, x: Tensor) -> Tensor:
        return m.layer(x[:, :3], x[:, 2:])

    for name, body in (
        ("TransformerEncoderLayer", lambda: encoder(**settings)),
        (
            "TransformerEncoderLayer, norm first, GELU",
            lambda: encoder(**settings, norm_first=True, activation="gelu"),
        ),
        ("TransformerEncoderLayer, no bias", lambda: encoder(**settings, bias=False)),
        (
            "TransformerEncoder, 2 layers and a norm",
            lambda: nn.TransformerEncoder(encoder(**settings), 2, norm=nn.LayerNorm(8)),
        ),
        ("TransformerDecoderLayer", lambda: Call(decoded, layer=decoder(**settings))),
        (
            "TransformerDecoderLayer, norm first",
            lambda: Call(decoded, layer=decoder(**settings, norm_first=True)),
        ),
        (
            "TransformerDecoder, 2 layers",
            lambda: Call(decoded, layer=nn.TransformerDecoder(decoder(**settings), 2)),
        ),
        (
            "Transformer",
            lambda: Call(
                both, layer=nn.Transformer(8, 2, 1, 1, dim_feedforward=12, dropout=0.0, batch_first=True)
            ),
        ),
    ):
        yield classified(group, name, body, numbers(5, 8))
    yield classified(
        group,
        "TransformerEncoder, padding mask",
        lambda: Call(
            lambda m, x, mask: m.layer(x, src_key_padding_mask=mask).masked_fill(mask[..., None], 0.0),
            layer=nn.TransformerEncoder(encoder(**settings), 2),
        ),
        masked,
    )

    def grouped(m: nn.Module, x: Tensor) -> Tensor:
        q = m.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (m.k, m.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    yield classified(
        group,
        "scaled_dot_product_attention, grouped queries",
        lambda: Call(grouped, q=nn.Linear(8, 8), k=nn.Linear(8, 4), v=nn.Linear(8, 4)),
        numbers(5, 8),
    )


def adaptive_softmax() -> Iterator[Case]:
    """AdaptiveLogSoftmaxWithLoss, which sees the targets in the model."""
    layer = nn.AdaptiveLogSoftmaxWithLoss

    def log_probabilities(m: nn.Module, x: Tensor) -> Tensor:
        return m.head.log_prob(torch.tanh(m.inner(x)))

    yield Case(
        "dense",
        "AdaptiveLogSoftmaxWithLoss, log probabilities",
        lambda: Call(log_probabilities, inner=nn.Linear(5, 6), head=layer(6, 8, [2, 5], div_value=2.0)),
        numbers(5),
        lambda examples: torch.randint(0, 8, (examples,)),
        lambda outputs, targets: F.nll_loss(outputs, targets, reduction="none"),
        zero=("head.head.*",),
    )
    yield Case(
        "dense",
        "AdaptiveLogSoftmaxWithLoss, targets as inputs",
        lambda: Call(
            lambda m, x, y: m.head(torch.tanh(m.inner(x)), y).output,
            inner=nn.Linear(5, 6),
            head=layer(6, 8, [2, 5], div_value=2.0, head_bias=True),
        ),
        lambda examples, views: {
            "x": numbers(5)(examples, views),
            "y": torch.randint(0, 8, (examples, views)),
        },
        labels,
        lambda outputs, targets: -outputs,
        zero=("head.head.*",),
    )
