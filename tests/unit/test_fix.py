"""model.fix: what it replaces, by what, and what it leaves alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedsim import models
from fedsim.config import ModelConfig
from fedsim.models.fix import fix
from fedsim.validate import InputError


class _Own(nn.BatchNorm2d):
    """Computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class _WithAct(nn.BatchNorm2d):
    """As timm's, which norms, drops and activates in one."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class DropPath(nn.Module):
    drop_prob = 0.2

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 32), (48, 24), (40, 20), (32, 16), (7, 1), (1, 1), (2, 1), (96, 32), (35, 7)],
)
def test_groups_divide_the_channels_and_hold_at_least_two(channels: int, groups: int) -> None:
    norm = nn.BatchNorm2d(channels)
    (line,) = models.fixed(fix(nn.Sequential(nn.Sequential(nn.Conv2d(1, channels, 1), norm))))
    assert line == f"0.1: BatchNorm2d({channels}) -> GroupNorm({groups}, {channels})"


def test_a_fixed_model_is_accepted_and_keeps_gains_and_shifts(caplog: pytest.LogCaptureFixture) -> None:
    norm, shared = nn.BatchNorm2d(4, eps=1e-3), nn.BatchNorm2d(4, affine=False)
    nn.init.normal_(norm.weight)
    norm.bias.requires_grad_(False)
    gain, shift = norm.weight, norm.bias
    parts = nn.Conv2d(1, 4, 3), norm, nn.ReLU(inplace=True), shared, _WithAct(4), nn.Dropout(0.3), DropPath()
    model = nn.Sequential(*parts, shared, nn.Flatten(), nn.LSTM(4, 4, 2, dropout=0.1), nn.BatchNorm1d(4))
    with caplog.at_level(logging.INFO):
        fixed = fix(model)
    assert fixed is model
    models.check(model)
    assert models.fixed(model) == (
        "1: BatchNorm2d(4) -> GroupNorm(2, 4)",
        "2: ReLU(inplace=True) -> ReLU()",
        "3: BatchNorm2d(4) -> GroupNorm(2, 4)",
        "4: _WithAct(4) -> GroupNormAct(2, 4)",
        "4.act: ReLU(inplace=True) -> ReLU()",
        "5: Dropout(p=0.3) -> Dropout(p=0)",
        "6: DropPath(drop_prob=0.2) -> DropPath(drop_prob=0)",
        "9: LSTM(dropout=0.1) -> LSTM(dropout=0)",
        "10: BatchNorm1d(4) -> GroupNorm(1, 4)",
    )
    assert "; ".join(models.fixed(model)) in caplog.text
    assert model[1].weight is gain
    assert model[1].bias is shift
    assert not model[1].bias.requires_grad
    assert model[1].eps == 1e-3
    assert model[3] is model[7]
    assert model[3].weight is None
    inputs = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    kept = inputs.clone()
    expected = torch.relu(nn.functional.group_norm(inputs, 2))
    torch.testing.assert_close(model[4](inputs), expected)
    assert torch.equal(model[2](inputs), torch.relu(kept))
    assert torch.equal(inputs, kept)


def test_what_is_frozen_or_unknown_is_left_alone() -> None:
    frozen, without, own = (
        nn.BatchNorm2d(4).eval(),
        nn.BatchNorm2d(4, track_running_stats=False).eval(),
        _Own(4),
    )
    model = fix(nn.Sequential(nn.Conv2d(1, 4, 3), frozen, nn.Dropout(0.5).eval(), own, without))
    assert model[1] is frozen
    assert model[2].p == 0.5
    assert model[3] is own
    assert models.fixed(model) == ("4: BatchNorm2d(4) -> GroupNorm(2, 4)",)
    with pytest.raises(InputError, match="_Own at '3': it mixes examples"):
        models.check(model)
    assert isinstance(fix(nn.BatchNorm2d(4)), nn.GroupNorm)
    assert models.fixed(nn.Linear(1, 1)) == ()


MODULE = """
from torch import nn

def net(outputs, num_classes, vocabulary, input_shape):
    assert (outputs, num_classes, vocabulary, input_shape) == (3, 3, 11, (4,))
    return nn.Sequential(nn.Embedding(vocabulary, 5), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, outputs))
"""


def test_models_of_ones_own_get_what_the_data_decide_and_are_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_net_to_fix.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    name = "a_net_to_fix:net"
    with pytest.raises(InputError, match=r"BatchNorm1d at '1': it mixes examples.*model\.fix=true"):
        models.build(ModelConfig(name), (4,), 3, 0, 11)
    for model in (
        models.build(ModelConfig(name, fix=True), (4,), 3, 0, 11),
        models.skeleton(ModelConfig(name, fix=True), (4,), 3, 11),
    ):
        assert models.fixed(model) == ("1: BatchNorm1d(4) -> GroupNorm(1, 4)",)


def test_refusals_name_the_remedy() -> None:
    for layer in (nn.BatchNorm2d(4), nn.Dropout(0.1), DropPath()):
        with pytest.raises(InputError, match=r"model\.fix=true"):
            models.check(nn.Sequential(nn.Conv2d(1, 4, 3), layer))
