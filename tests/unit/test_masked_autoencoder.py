"""The masked autoencoder and its task: laid out place by place, clipped gradients of one example at a time by
plain autograd in float64, masks that follow from a picture alone (budget: 15 s)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim import loading, models
from fedsim.clipping.flat import FlatClip
from fedsim.config import ModelConfig
from fedsim.data.targets import Targets
from fedsim.grads import bookkeeping
from fedsim.grads.bookkeeping import engine
from fedsim.models import masked_autoencoder
from fedsim.models.masked_autoencoder import MaskedAutoencoder, order_of
from fedsim.models.vit import patches
from fedsim.run import Run
from fedsim.study import plan, probe
from fedsim.tasks.reconstruction import Reconstruction
from fedsim.validate import InputError
from tests.conftest import train
from tests.unit.test_task_runs import config

TASK = Reconstruction()
SHAPE = (3, 8, 12)


def autoencoder(dtype: str = "float64", **options: object) -> MaskedAutoencoder:
    """Two blocks and one on 24 patches of 2x2."""
    given = {
        "size": "pico",
        "patch": 2,
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
        **options,
    }
    model = models.build(ModelConfig("masked_autoencoder", given, dtype), SHAPE, 5, 3)
    assert isinstance(model, MaskedAutoencoder)
    model.blocks = model.blocks[:2]
    return model


def pictures(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Pictures of bytes, as models get them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator).to(dtype).div_(255).sub_(0.5).div_(0.5)


# --- the model -------------------------------------------------------------------------------------------


def laid_out(model: MaskedAutoencoder, image: Tensor) -> Tensor:
    """What the model gives for one picture, with every patch in its own place of the decoder."""
    squares = patches(image[None], model.patch)[0]
    order = order_of(squares[None])[0].tolist()
    seen, hidden = sorted(order[: model.seen]), order[model.seen :]
    tokens = torch.stack([model.embed(squares[place]) + model.positions[place] for place in seen])[None]
    for block in model.blocks:
        tokens = block(tokens)
    found = model.bridge(model.norm(tokens))[0]
    places = [
        found[seen.index(place)] if place in seen else model.hidden.weight[0] for place in range(len(squares))
    ]
    whole = (torch.stack(places) + model.decoder_positions)[None]
    for block in model.decoder:
        whole = block(whole)
    said = model.head(model.last_norm(whole))[0]
    rows = []
    for place in hidden:
        wanted = squares[place]
        if model.own_scale:
            mean = wanted.sum() / len(wanted)
            wanted = (wanted - mean) / ((wanted - mean).square().sum() / len(wanted) + 1e-6).sqrt()
        rows.append(said[place] - wanted)
    return torch.stack(rows)


@pytest.mark.parametrize("own_scale", [True, False])
def test_it_is_the_autoencoder_laid_out_place_by_place(own_scale: bool) -> None:
    model, images = autoencoder(own_scale=own_scale), pictures(3)
    found = model(images)
    assert found.shape == (3, 18, 12)
    for row, image in zip(found, images, strict=True):
        torch.testing.assert_close(row, laid_out(model, image), rtol=1e-9, atol=1e-9)


def test_what_is_hidden_reaches_only_what_it_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the order fixed: other pixels in a hidden patch change what is wanted there and nothing else."""
    fixed = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(masked_autoencoder, "order_of", lambda squares: fixed.expand(len(squares), -1))
    model = autoencoder(own_scale=False)
    one, other = pictures(1), pictures(1, seed=9)
    seen = torch.zeros(24, dtype=torch.bool)
    seen[fixed[: model.seen]] = True
    mixed = torch.where(seen[None, :, None], patches(one, 2), patches(other, 2))
    back = mixed.reshape(1, 4, 6, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, *SHAPE)
    hidden = fixed[model.seen :]
    said = [model(image) + patches(image, 2)[:, hidden] for image in (one, back)]
    torch.testing.assert_close(said[0], said[1])
    assert not torch.allclose(model(one), model(back))


def test_features_are_of_the_whole_picture() -> None:
    model, images = autoencoder(), pictures(2)
    tokens = model.embed(patches(images, 2)) + model.positions
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(model.features(images), model.norm(tokens).mean(1))


# --- the mask --------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_a_mask_follows_from_the_picture_alone(count: int, seed: int) -> None:
    """Whatever is beside it, in float32 too, and under vmap; it names every place once."""
    squares = patches(pictures(count, seed), 2)
    orders = order_of(squares)
    assert bool((orders.sort(1).values == torch.arange(24)).all())
    for row in range(count):
        assert torch.equal(order_of(squares[row : row + 1])[0], orders[row])
    assert torch.equal(order_of(squares.float()), orders)
    assert torch.equal(torch.vmap(lambda one: order_of(one[None])[0])(squares), orders)


def test_masks_of_pictures_are_as_good_as_drawn() -> None:
    """Every place is seen as often as every other, every pair too; one changed byte gives another mask."""
    count = 4000
    images = pictures(count)
    seen = torch.zeros(count, 24, dtype=torch.float64)
    seen.scatter_(1, order_of(patches(images, 2))[:, :6], 1.0)
    often = seen.mean(0)
    assert float((often - 0.25).abs().max()) < 5 * (0.25 * 0.75 / count) ** 0.5
    pairs = seen.T @ seen / count
    pairs = pairs[~torch.eye(24, dtype=torch.bool)]
    share = 6 * 5 / (24 * 23)
    assert float((pairs - share).abs().max()) < 5 * (share / count) ** 0.5
    changed = images.clone()
    changed[:, 1, 5, 7] += torch.where(images[:, 1, 5, 7] > 0, -2 / 255, 2 / 255)
    again = torch.zeros_like(seen)
    again.scatter_(1, order_of(patches(changed, 2))[:, :6], 1.0)
    both = (seen * again).sum(1).mean()
    assert abs(float(both) - 6 * 0.25) < 0.1, "as many in common as two drawn masks have"


def test_a_blank_picture_has_a_mask_and_a_finite_gradient() -> None:
    model = autoencoder()
    loss = TASK.loss(model(torch.zeros(1, *SHAPE, dtype=torch.float64)), torch.zeros(1))
    assert bool(torch.isfinite(loss).all())
    assert all(
        bool(torch.isfinite(g).all()) for g in torch.autograd.grad(loss.sum(), list(model.parameters()))
    )


# --- clipped gradients -----------------------------------------------------------------------------------


def one_at_a_time(model: nn.Module, images: Tensor, bound: float) -> Tensor:
    """Clipped sum by one plain backward pass an example (B, K, ...), the loss written out."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for picture in images:
        losses = [(model(view[None])[0] ** 2).sum() / model(view[None])[0].numel() for view in picture]
        found = torch.autograd.grad(sum(losses) / len(losses), parameters)
        gradient = torch.cat([g.flatten() for g in found]).double()
        total += gradient * min(1.0, bound / float(gradient.norm()))
    return total


@pytest.mark.parametrize("views", [1, 2])
def test_clipped_gradients_are_those_of_one_example_at_a_time(
    views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native: nothing goes to the fallback."""

    def refuse(watch: object, func: object, *rest: object, **named: object) -> None:
        raise AssertionError(f"no rule for {func}")

    monkeypatch.setattr(engine, "generic", refuse)
    model = autoencoder()
    images = pictures(5 * views).reshape(5, views, *SHAPE)
    for bound in (0.3, 1e3):
        found = bookkeeping.clipped_sum(model, images, torch.zeros(5), TASK.loss, FlatClip(bound))[0]
        expected = one_at_a_time(model, images, bound)
        apart = float((found - expected).norm())
        assert apart <= (1e-11 if bound > 100.0 else 2e-6) * float(expected.norm())


# --- what is refused, and runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": 0.999}, "must leave 1 .. 23 of the 24 patches"),
        ({"mask": 0.0}, "must leave 1 .. 23"),
        ({"patch": 5}, "must divide the image"),
        ({"decoder_width": 18}, "multiple of 4"),
        ({"size": "huge"}, "model.options.size"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        autoencoder(**options)


@pytest.mark.usefixtures("epsilon_takes_no_time")
def test_the_encoder_of_a_run_can_be_probed_and_says_nothing(tmp_path: Path) -> None:
    train(config("reconstruction", tmp_path / "data", "train.steps=1"), tmp_path / "run")
    run = Run(tmp_path / "run")
    images = np.load(tmp_path / "data" / "test_inputs.npy")[:4]
    assert probe.features_of(run, probe.encoder_of(run))(images).shape == (4, 64)
    with pytest.raises(InputError, match="fedsim probe"):
        run.predict(images)
    with pytest.raises(InputError, match="must hold a captioner"):
        probe.captioner_of(run)


@pytest.mark.exact
def test_the_published_run_is_checked() -> None:
    """Epsilon as stated; the encoder sees a quarter of the patches, which is what operations say."""
    found = plan.describe(loading.load("dpcap2024/vip_base_eps8"))
    assert found["published"]["agrees"]
    assert found["epsilon"]["example"]["value"] == pytest.approx(7.9883, rel=5e-3)
    assert found["epsilon"]["example_check"]["value"] == pytest.approx(6.8253, rel=5e-3)
    assert found["learning_rate"] == pytest.approx(3.84e-4)
    assert (found["examples"], found["steps"], found["expected_batch_size"]) == (233_804_767, 6000, 98_304)
    assert TASK.outputs(Targets("tokens", 30522)) == 30522, "no target is asked for"


def test_operations_are_those_of_the_seen_patches() -> None:
    """Of a forward pass, by hand; attention itself is not counted on a processor."""
    from torch.utils.flop_counter import FlopCounterMode

    model, images = autoencoder(), pictures(1)
    with FlopCounterMode(display=False) as counter:
        model(images)
    seen, width, wide = 6, 64, 16
    encoder = 2 * seen * (12 * width + 2 * 12 * width**2)
    decoder = 2 * 24 * 12 * wide**2
    ends = 2 * seen * width * wide + 2 * 18 * wide * 12
    assert counter.get_total_flops() == encoder + decoder + ends
