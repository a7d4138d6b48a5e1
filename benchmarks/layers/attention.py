"""Attention and the layers built from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import (
    Call,
    Case,
    classified,
    numbers,
)


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
