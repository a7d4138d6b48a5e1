"""Attention: the projections of `nn.MultiheadAttention` are linear layers, its core has no parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.tape import Unsupported


def scaled_dot_product_attention(
    watch: Watch,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Shortcut of `F.scaled_dot_product_attention` on (..., places, width) for all examples at once."""
    level = watch.level
    options = {"is_causal": is_causal, "scale": scale}
    if dropout_p or enable_gqa or query.dim() < 2 or not query.dim() == key.dim() == value.dim():
        named = {"dropout_p": dropout_p, **options, "enable_gqa": enable_gqa}
        return func(query, key, value, attn_mask, **named)
    tensors = query, key, value
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
    with level:
        rows = [level.lower(t) for t in tensors]
        count = watch.tape.examples

        def spread(row: Tensor, logical: Tensor) -> Tensor:
            """One leading axis of examples and one of all others, each as long as it must be."""
            if not level.carries(logical):
                row = row.unsqueeze(0)
            row = row.expand(count, *lead, *row.shape[-2:]) if row.shape[:-2] != (count, *lead) else row
            return row.flatten(0, -4) if row.dim() > 4 else row

        mask = attn_mask
        if attn_mask is not None:
            mask = level.lower(attn_mask)
            if level.carries(attn_mask):
                own = attn_mask.shape[:-2]
                mask = mask.view(count, *[1] * (len(lead) - len(own)), *mask.shape[1:])
            if level.carries(attn_mask) or attn_mask.dim() > 2:
                mask = mask.expand(count, *lead, *mask.shape[-2:])
                mask = mask.flatten(0, -4) if mask.dim() > 4 else mask
        folded = [spread(row, t) for row, t in zip(rows, tensors, strict=True)]
        result = func(*folded, mask, **options)
        result = torch.ops.aten._unsafe_view(result, (count, *lead, *result.shape[-2:]))
    return level.lift(result)


def multi_head_attention(
    watch: Watch,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rule of `F.multi_head_attention_forward` on (places, rows, width) or (places, width).

    The arithmetic of torch's function, written in operations that are watched.
    """
    if static_k is not None or static_v is not None or (dropout_p and training):
        raise Unsupported("attention with static keys or dropout")
    if is_causal and attn_mask is None:
        raise Unsupported("attention with is_causal and without a mask")
    with watch:
        single = query.dim() == 2
        same_source, same_memory = key is query and value is query, value is key
        if single:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if use_separate_proj_weight:
            weights = [q_proj_weight, k_proj_weight, v_proj_weight]
            biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
            projected = [
                F.linear(t, w, b)  # type: ignore[arg-type]
                for t, w, b in zip((query, key, value), weights, biases, strict=True)
            ]
        else:
            assert in_proj_weight is not None
            counts = (3,) if same_source else (1, 2) if same_memory else (1, 1, 1)
            split = _parts(in_proj_weight, counts)
            offsets = [None] * len(counts) if in_proj_bias is None else list(_parts(in_proj_bias, counts))
            projected = []
            for tensor, weight, bias, count in zip((query, key, value), split, offsets, counts, strict=False):
                projected += F.linear(tensor, weight, bias).chunk(count, dim=2)
        rows, places = projected[0].shape[:2]
        mask, padding = attn_mask, key_padding_mask
        for added in (bias_k is not None, add_zero_attn):
            if added:
                mask = None if mask is None else F.pad(mask, (0, 1))
                padding = None if padding is None else F.pad(padding, (0, 1))
        if bias_k is not None and bias_v is not None:
            projected[1:] = [
                torch.cat([tensor, offset.expand(rows, 1, -1)], dim=1)
                for tensor, offset in zip(projected[1:], (bias_k, bias_v), strict=True)
            ]
        heads = [tensor.unflatten(2, (num_heads, -1)).transpose(1, 2) for tensor in projected]
        if add_zero_attn:
            heads[1:] = [F.pad(tensor, (0, 0, 0, 1)) for tensor in heads[1:]]
        added_mask = _mask(mask, padding, rows, num_heads, heads[0].dtype)
        probabilities = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(heads[0].shape[3])
            probabilities = (scores if added_mask is None else scores + added_mask).softmax(dim=3)
            core = probabilities @ heads[2]
        else:
            core = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=added_mask)
        result = F.linear(core.transpose(1, 2).reshape(rows, places, -1), out_proj_weight, out_proj_bias)
        result = result.transpose(0, 1)
        if probabilities is not None and average_attn_weights:
            probabilities = probabilities.mean(dim=1)
        if single:
            result = result.squeeze(1)
            probabilities = None if probabilities is None else probabilities.squeeze(0)
    return result, probabilities


def _parts(packed: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Split a packed weight or bias along its first axis into thirds times `counts`."""
    if len(counts) == 1:
        return (packed,)
    third = packed.shape[0] // 3
    return packed.split([third * count for count in counts])


def _mask(
    attention: Tensor | None, padding: Tensor | None, rows: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one number to add to the scores, broadcastable to (rows, heads, queries, keys)."""
    total = None
    if attention is not None:
        total = _added(attention, dtype)
        if total.dim() == 3:
            total = total.unflatten(0, (rows, heads))
    if padding is not None:
        added = _added(padding, dtype)[:, None, None, :]
        total = added if total is None else total + added
    return total


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask.to(dtype)


RULES: dict[Any, Rule] = {F.multi_head_attention_forward: multi_head_attention}
SHORTCUTS: dict[Any, Rule] = {F.scaled_dot_product_attention: scaled_dot_product_attention}
