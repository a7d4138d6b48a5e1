"""The captioner and its task: forward pass written out, clipped gradients of one example at a time by plain
autograd in float64, what padding and empty captions add (budget: 15 s)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim import models
from fedsim.clipping.flat import FlatClip
from fedsim.config import ModelConfig
from fedsim.data.targets import BEGIN, END, IGNORED, PADDING, Targets
from fedsim.grads import batch, bookkeeping
from fedsim.grads.bookkeeping import engine
from fedsim.grads.flat import get_flat
from fedsim.grads.per_example import clipped_gradient_sum
from fedsim.models.captioner import SIZES, Captioner, waves, waves_of_places
from fedsim.tasks.captioning import Captioning
from fedsim.validate import InputError

TASK = Captioning()
TOKENS, PLACES = 13, 6


def captioner(dtype: str = "float64", seed: int = 0, **options: object) -> Captioner:
    """Two blocks of each kind on pictures of 3x4x8."""
    config = ModelConfig(
        "captioner", {"size": "pico", "patch": 2, "decoder_depth": 2, "places": PLACES, **options}, dtype
    )
    model = models.build(config, (3, 4, 8), TOKENS, seed)
    assert isinstance(model, Captioner)
    model.blocks = model.blocks[:2]
    return model


def pairs(
    examples: int, views: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, K, 3, 4, 8), and captions (B, places) of all kinds: cut, ended, with holes, empty."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(examples, views, 3, 4, 8, generator=generator, dtype=dtype)
    targets = torch.randint(END + 1, TOKENS, (examples, PLACES), generator=generator)
    for row in range(examples):
        length = (PLACES, 0, 2, PLACES - 1, 1)[row % 5]
        if length < PLACES:
            targets[row, length:] = IGNORED
        if 0 < length < PLACES:
            targets[row, length - 1] = END
        if row % 5 == 3:
            targets[row, 1] = IGNORED  # a place that does not count, in the middle
    return images, targets, batch_tokens(targets)


def batch_tokens(targets: Tensor) -> Tensor:
    """What a decoder may read before it says each place, place by place."""
    rows = []
    for target in targets.tolist():
        rows.append([BEGIN, *(PADDING if token == IGNORED else token for token in target[:-1])])
    return torch.tensor(rows)


def one_at_a_time(model: nn.Module, images: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Clipped sum and norms by one plain backward pass an example, with the loss written out."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    norms = []
    for picture, target, tokens in zip(images, targets, batch_tokens(targets), strict=True):
        counted = [place for place, token in enumerate(target.tolist()) if token != IGNORED]
        losses = []
        for view in picture:
            said = model(view[None], tokens[None])[0].log_softmax(1)
            own = [-said[place, target[place]] for place in counted]
            losses.append(sum(own) / len(own) if own else said.sum() * 0.0)
        mean = sum(losses) / len(losses)
        found = torch.autograd.grad(mean, parameters)
        gradient = torch.cat([g.flatten() for g in found]).double()
        norm = float(gradient.norm())
        norms.append(norm)
        total += gradient * min(1.0, bound / norm if norm else 1.0)
    return total, torch.tensor(norms, dtype=torch.float64)


# --- the model -------------------------------------------------------------------------------------------


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
    """Attention (places, width) head by head, place by place."""
    width = query.shape[1] // heads
    out = torch.zeros_like(query)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        for place in range(len(query)):
            last = place + 1 if causal else len(key)
            scores = key[:last, own] @ query[place, own] / math.sqrt(width)
            out[place, own] = scores.softmax(0) @ value[:last, own]
    return out


def written_out(model: Captioner, image: Tensor, tokens: Tensor) -> Tensor:
    """The forward pass of one picture and caption, from the weights by name."""
    held, heads = dict(model.named_parameters()), 4

    def normed(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        spread = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * held[f"{name}.weight"]

    def widened(x: Tensor, name: str) -> Tensor:
        inner = (
            normed(x, f"{name}.{'norm3' if 'decoder' in name else 'norm2'}") @ held[f"{name}.widen.weight"].T
        )
        return inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))) @ held[f"{name}.narrow.weight"].T

    def own(x: Tensor, name: str, causal: bool) -> Tensor:
        packed = normed(x, f"{name}.norm1") @ held[f"{name}.query_key_value.weight"].T
        return attended(*packed.chunk(3, 1), heads, causal) @ held[f"{name}.out.weight"].T

    edge = model.patch
    squares = [
        image[:, top : top + edge, left : left + edge].flatten()
        for top in range(0, image.shape[1], edge)
        for left in range(0, image.shape[2], edge)
    ]
    grid = image.shape[1] // edge, image.shape[2] // edge
    places = waves_of_places(grid, 64)
    x = torch.stack(squares) @ held["embed.weight"].T + places
    for block in range(len(model.blocks)):
        x = x + own(x, f"blocks.{block}", causal=False)
        x = x + widened(x, f"blocks.{block}")
    picture = normed(x, "norm") @ held["bridge.weight"].T + places
    y = held["vectors.weight"][tokens] + waves(torch.arange(len(tokens)), 64)
    for block in range(len(model.decoder)):
        name = f"decoder.{block}"
        y = y + own(y, name, causal=True)
        asked = normed(y, f"{name}.norm2") @ held[f"{name}.query.weight"].T
        key, value = (picture @ held[f"{name}.key_value.weight"].T).chunk(2, 1)
        y = y + attended(asked, key, value, heads, causal=False) @ held[f"{name}.cross_out.weight"].T
        y = y + widened(y, name)
    return normed(y, "last_norm") @ held["head.weight"].T


def test_the_forward_pass_is_the_one_written_out() -> None:
    model = captioner()
    images, _, tokens = pairs(3, 1, seed=1)
    with torch.no_grad():
        found = model(images[:, 0], tokens)
        for row in range(3):
            expected = written_out(model, images[row, 0], tokens[row])
            torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)


def test_a_token_is_said_from_the_picture_and_the_tokens_before_alone() -> None:
    model = captioner()
    images, _, tokens = pairs(1, 1, seed=2)
    for place in range(1, PLACES):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 1) % TOKENS
        with torch.no_grad():
            apart = (model(images[:, 0], tokens) - model(images[:, 0], other)).abs().amax(2)[0]
        assert bool((apart[:place] == 0).all())
        assert bool((apart[place:] > 0).all())
    with torch.no_grad():
        apart = (model(images[:, 0], tokens) - model(images[:, 0] + 0.1, tokens)).abs().amax(2)[0]
    assert bool((apart > 0).all())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_sizes(size: str) -> None:
    """Counted by hand: no biases, 12 width^2 a block and 16 a block of the decoder, a norm's scale each."""
    sizes = SIZES[size]
    a, b = sizes.width, sizes.decoder_width
    encoder = 3 * 16**2 * a + sizes.depth * (12 * a * a + 2 * a) + a
    decoder = a * b + 6 * (16 * b * b + 3 * b) + b + 2 * 30522 * b
    model = models.skeleton(ModelConfig("captioner", {"size": size}), (3, 224, 224), 30522)
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder
    assert all(p.dim() == 1 or "norm" not in name for name, p in model.named_parameters())


def test_the_same_seed_gives_the_same_model_and_positions_are_not_sent() -> None:
    first, again, other = captioner(), captioner(), captioner(seed=1)
    assert torch.equal(get_flat(first), get_flat(again))
    assert not torch.equal(get_flat(first), get_flat(other))
    assert not any("positions" in name for name in first.state_dict())
    assert first.features(torch.zeros(2, 3, 4, 8, dtype=torch.float64)).shape == (2, 64)


@pytest.mark.parametrize(
    ("options", "outputs", "said"),
    [
        ({"size": "huge"}, TOKENS, "model.options.size"),
        ({"patch": 3}, TOKENS, "must divide the image's 4x8 pixels"),
        ({"decoder_depth": 0}, TOKENS, "model.options.decoder_depth"),
        ({"patch": 2}, 2, "at least 3 tokens apart"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, object], outputs: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        models.skeleton(ModelConfig("captioner", dict(options)), (3, 4, 8), outputs)


def test_captions_longer_than_the_model_are_refused() -> None:
    with pytest.raises(InputError, match="at least the 7 tokens"):
        captioner()(torch.zeros(1, 3, 4, 8, dtype=torch.float64), torch.ones(1, 7, dtype=torch.int64))


# --- the task --------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_captions_own_tokens() -> None:
    outputs = torch.randn(5, PLACES, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, targets, _ = pairs(5, 1, seed=3)
    for row, (said, target) in enumerate(zip(outputs, targets.tolist(), strict=True)):
        own = [-float(said[p].log_softmax(0)[t]) for p, t in enumerate(target) if t != IGNORED]
        expected = sum(own) / len(own) if own else 0.0
        alone = TASK.loss(outputs[row : row + 1], targets[row : row + 1])
        assert float(TASK.loss(outputs, targets)[row]) == pytest.approx(expected, rel=1e-12)
        assert float(alone) == pytest.approx(expected, rel=1e-12)


def test_what_the_model_reads_is_the_begin_and_the_tokens_before() -> None:
    _, targets, tokens = pairs(5, 1, seed=4)
    images = torch.zeros(5, 1)
    shown = TASK.shown(images, targets)
    assert set(shown) == {"images", "tokens"}
    assert shown["images"] is images
    assert torch.equal(shown["tokens"], tokens)


def test_metrics_are_over_all_tokens_that_count() -> None:
    outputs = torch.randn(10, PLACES, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    _, targets, _ = pairs(10, 1, seed=5)
    lost, right, counted = 0.0, 0, 0
    for said, target in zip(outputs, targets.tolist(), strict=True):
        for place, token in enumerate(target):
            if token != IGNORED:
                lost -= float(said[place].log_softmax(0)[token])
                right += int(said[place].argmax()) == token
                counted += 1
    for cut in (1, 3, 10):
        meter = TASK.meter()
        for start in range(0, 10, cut):
            meter.add(outputs[start : start + cut], targets[start : start + cut])
        found = meter.result()
        assert found["perplexity"] == pytest.approx(math.exp(lost / counted), rel=1e-12)
        assert found["token_accuracy"] == pytest.approx(right / counted, rel=1e-12)
    empty = TASK.meter()
    empty.add(outputs[:1], torch.full_like(targets[:1], IGNORED))
    assert math.isnan(empty.result()["perplexity"])
    assert TASK.chosen.name == "perplexity"
    assert not TASK.chosen.higher_is_better


def test_odd_captions_are_counted() -> None:
    _, targets, _ = pairs(10, 1, seed=6)
    assert TASK.noticed(targets.numpy()) == {"empty captions": 2, "captions cut": 2}
    TASK.check(Targets("tokens", TOKENS))


# --- clipped gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2])
def test_clipped_gradients_are_those_of_one_example_at_a_time(views: int) -> None:
    """K = 1 and 2. A clipped example may be shorter by the engine's allowance for rounding, below 1e-5."""
    model = captioner()
    images, targets, _ = pairs(7, views, seed=views)
    expected, norms = one_at_a_time(model, images, targets, bound=0.5 * 8.0)
    assert 0 < int((norms > 4.0).sum()) < 6, "some are clipped and some are not"
    for dtype, tolerance in ((torch.float64, 2e-6), (torch.float32, 3e-5)):
        own = captioner(str(dtype).removeprefix("torch."))
        own.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
        shown = batch.shown(TASK.shown, images.to(dtype), targets)
        found = clipped_gradient_sum(
            own, shown, targets, FlatClip(4.0), loss=TASK.loss, engine="bookkeeping", physical_batch_size=64
        )
        assert float((found.sum.double() - expected).norm() / expected.norm()) < tolerance
        torch.testing.assert_close(found.norms, norms, rtol=tolerance, atol=1e-9)


@given(
    examples=st.integers(1, 4),
    views=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    bound=st.sampled_from([0.1, 3.0, 1e3]),
)
@settings(max_examples=8, deadline=None)
def test_clipped_gradients_of_any_batch(examples: int, views: int, seed: int, bound: float) -> None:
    model = captioner(decoder_depth=1)
    images, targets, _ = pairs(examples, views, seed)
    expected, _ = one_at_a_time(model, images, targets, bound)
    shown = batch.shown(TASK.shown, images, targets)
    found = bookkeeping.clipped_sum(model, shown, targets, TASK.loss, FlatClip(bound))[0]
    apart = float((found - expected).norm())
    assert apart <= (1e-11 if bound > 100.0 else 2e-6) * float(expected.norm())


def test_every_layer_has_a_rule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the captioner goes to the fallback, and no attention of it runs example by example."""

    def refuse(watch: object, func: object, *rest: object, **named: object) -> None:
        raise AssertionError(f"no rule for {func}")

    monkeypatch.setattr(engine, "generic", refuse)
    images, targets, _ = pairs(5, 2, seed=8, dtype=torch.float32)
    seen: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention
    rule = engine.SHORTCUTS[plain]

    def counting(watch: object, func: object, *rest: object, **named: object) -> object:
        seen.append(1)
        return rule(watch, func, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setitem(engine.SHORTCUTS, plain, counting)
    model = captioner("float32")
    bookkeeping.clipped_sum(
        model, batch.shown(TASK.shown, images, targets), targets, TASK.loss, FlatClip(1.0)
    )
    assert len(seen) == 2 + 2 * 2, "of every block, and to the picture too"


@pytest.mark.parametrize("name", ["bookkeeping", "vmap", "opacus"])
def test_an_empty_caption_adds_nothing_and_padding_neither(name: str) -> None:
    model = captioner()
    images, targets, _ = pairs(6, 1, seed=9)
    empty = [row for row in range(6) if bool((targets[row] == IGNORED).all())]
    rest = [row for row in range(6) if row not in empty]

    def clipped(rows: list[int], targets: Tensor = targets) -> Tensor:
        shown = batch.shown(TASK.shown, images[rows], targets[rows])
        return clipped_gradient_sum(
            model, shown, targets[rows], FlatClip(1.0), loss=TASK.loss, engine=name
        ).sum

    whole = clipped(list(range(6)))
    torch.testing.assert_close(whole, clipped(rest), rtol=1e-6, atol=1e-9)
    assert not bool(clipped(empty).any())
    longer = torch.full_like(targets, IGNORED)
    longer[:, :3] = targets[:, :3]
    torch.testing.assert_close(clipped(rest, longer), clipped(rest, longer[:, :3]), rtol=1e-6, atol=1e-9)


def test_the_table_has_no_gradient_at_padding() -> None:
    """What is read after a caption's end reaches no token that counts."""
    model = captioner()
    images, targets, _ = pairs(5, 1, seed=10)
    targets[3, 1] = END + 1  # no hole, whose place is read as padding
    shown = batch.shown(TASK.shown, images, targets)
    found = bookkeeping.clipped_sum(model, shown, targets, TASK.loss, FlatClip(1.0))[0]
    start = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name == "vectors.weight":
            table = found[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    assert not bool(table[PADDING].any())
    assert bool(table[BEGIN].any())


def test_noticed_takes_arrays() -> None:
    assert TASK.noticed(np.full((3, 4), IGNORED)) == {"empty captions": 3, "captions cut": 0}
