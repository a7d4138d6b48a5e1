"""The model of bags of words: what it computes, its start, and gradients by every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import models
from fedsim.config import ModelConfig
from fedsim.grads import FlatClip, clipped_gradient_sum, cross_entropy, get_flat, set_flat
from fedsim.validate import InputError

TEXT, TOKENS = (6,), 11
IDS = torch.tensor([[3, 3, 7, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0]])


def built(dtype: str = "float64", **options: Any) -> nn.Module:
    return models.build(ModelConfig("bag_of_words", options, dtype), TEXT, 3, 1, TOKENS)


def noisy(model: nn.Module) -> nn.Module:
    flat = get_flat(model)
    set_flat(model, torch.randn(flat.shape, generator=torch.Generator().manual_seed(2), dtype=flat.dtype))
    return model


def test_starts_at_zero_or_drawn() -> None:
    assert torch.equal(built()(IDS), torch.zeros(4, 3, dtype=torch.float64))
    assert torch.equal(built(width=5)(IDS), torch.zeros(4, 3, dtype=torch.float64))
    assert built(width=5).vectors.weight.std() > 0.5
    assert (built(zero_init=False)(IDS)[:2] != 0).all()
    assert get_flat(built()).numel() == TOKENS * 3 + 3
    assert get_flat(built(width=5)).numel() == TOKENS * 5 + 5 * 3 + 3


@pytest.mark.parametrize(("pooling", "divisor"), [("mean", 3.0), ("root", 3.0**0.5), ("sum", 1.0)])
def test_the_sum_of_tokens_is_pooled_and_padding_counts_nowhere(pooling: str, divisor: float) -> None:
    model = noisy(built(pooling=pooling))
    table, bias = model.vectors.weight, model.bias
    found = model(IDS)
    torch.testing.assert_close(found[0], (2 * table[3] + table[7]) / divisor + bias)
    torch.testing.assert_close(found[2], bias)
    wider = torch.cat([IDS, torch.zeros(4, 2, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(wider), found)


@pytest.mark.parametrize("width", [None, 5])
def test_wrong_use_is_refused(width: int | None) -> None:
    config = ModelConfig("bag_of_words", {"width": width})
    with pytest.raises(InputError, match="takes token ids"):
        models.build(config, TEXT, 3, 1)
    with pytest.raises(InputError, match=r"model\.options\.pooling"):
        built(pooling="max", width=width)
    with pytest.raises(InputError, match=r"model\.options\.width"):
        built(width=0)
    with pytest.raises(InputError, match=r"model\.name=bag_of_words or transformers"):
        models.build(ModelConfig("linear"), TEXT, 3, 1, TOKENS)


@pytest.mark.parametrize("options", [{}, {"width": 5}, {"width": 5, "pooling": "root"}])
def test_clipped_sums_are_right_and_fast(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """By the bookkeeping engine, by vmap, and by a plain loop; none of them falls back to a slower way."""
    model, targets = noisy(built(**options)), torch.tensor([0, 1, 2, 0])
    alone = torch.stack([_gradient(model, IDS[[row]], targets[[row]]) for row in range(4)])
    lengths = alone.norm(dim=1)
    clip = FlatClip(float(lengths.median()))
    expected = (alone * (clip.clip_norm / (lengths + 1e-6)).clamp(max=1.0)[:, None]).sum(0)
    for engine in ("bookkeeping", "vmap"):
        found = clipped_gradient_sum(model, IDS[:, None], targets, clip, engine=engine)
        torch.testing.assert_close(found.sum, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.norms, lengths, rtol=1e-10, atol=0)
    assert not [r for r in caplog.records if r.name == "fedsim.grads.ways"], caplog.messages


def _gradient(model: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
    loss = cross_entropy(model(ids), target).sum()
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])
