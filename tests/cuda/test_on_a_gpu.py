"""On a real GPU: what tests elsewhere show by emulation and counting. `make gpu` runs them.

FEDSIM_TEST_DEVICE=cpu runs those that do not ask the GPU itself on the CPU, as a test of the tests.
"""

from __future__ import annotations

import copy
import os
import random
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.bound.hostile import FILLS
from benchmarks.bound.judge import contributions, product, scale
from benchmarks.bound.reduced import CLASSES, MODELS, SHAPE, build, sums
from benchmarks.models import CASES as SIZES
from fedsim.data import batches
from fedsim.engine import evaluate
from fedsim.engine.device import make_deterministic
from fedsim.grads import FlatClip, clipped_gradient_sum, vmap
from fedsim.grads.arithmetic import float32
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.per_example import cross_entropy
from fedsim.tasks.classification import Classification
from tests.conftest import final, small, train
from tests.equivalence.test_bookkeeping import CASES, TIGHT, loss, make
from tests.equivalence.test_rounding import excess_of_products

DEVICE = os.environ.get("FEDSIM_TEST_DEVICE", "cuda")
HERE = DEVICE == "cpu" or torch.cuda.is_available()
REAL = DEVICE == "cuda" and HERE
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HERE, reason="needs a CUDA device; none is available here"),
]
on_a_gpu_only = pytest.mark.skipif(not REAL, reason="asks the GPU itself")
PRECISIONS = ("float32", "tf32", "bfloat16") if DEVICE == "cuda" else ("float32",)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_kind_agrees_with_the_oracle_on_the_cpu(case: str, views: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model, inputs = make(case, 5, views)
        model = model.to(dtype)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        targets = torch.linspace(-1.0, 1.0, len(inputs), dtype=dtype)
        _, norms, _ = vmap.clipped_sum(copy.deepcopy(model), inputs, targets, loss, FlatClip(1.0))
        clip = FlatClip(float(norms.median()) * 0.9 + 1e-12)
        expected = vmap.clipped_sum(copy.deepcopy(model), inputs, targets, loss, clip)
        model.to(DEVICE)
        for options in (Options(), TIGHT):
            found = clipped_sum(model, inputs.to(DEVICE), targets.to(DEVICE), loss, clip, options)
            assert (found[0].cpu() - expected[0]).norm() <= tolerance * expected[0].norm() + 1e-12
            torch.testing.assert_close(
                found[1].cpu(), expected[1].double(), rtol=tolerance, atol=tolerance * float(norms.max())
            )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_cpu_to_the_precision(name: str, precision: str) -> None:
    model = build(name)
    inputs = torch.randn((6, 2, *SHAPE), generator=torch.Generator().manual_seed(3))
    targets = torch.arange(6) % CLASSES
    norms = vmap.clipped_sum(copy.deepcopy(model), inputs, targets, cross_entropy, FlatClip(1.0))[1]
    clip = FlatClip(float(norms.median()))
    expected = vmap.clipped_sum(copy.deepcopy(model), inputs, targets, cross_entropy, clip)[0]
    options = Options(precision=precision)
    found = clipped_sum(
        model.to(DEVICE), inputs.to(DEVICE), targets.to(DEVICE), cross_entropy, clip, options
    )[0]
    tolerance = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 1e-1}[precision]
    assert found.dtype == torch.float32
    assert (found.cpu() / options.margin - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_contributions_are_within_the_bound(name: str, precision: str, stays: bool) -> None:
    for number, (kind, steep) in enumerate(
        (("plain", "plain"), ("offset", "cancelling"), ("longer", "equal"))
    ):
        draw = random.Random(number)
        torch.manual_seed(number)
        model = build(name)
        inputs, targets = FILLS[kind](draw, (5, 2, *SHAPE)), FILLS[steep](draw, (5, CLASSES))
        clip = FlatClip(scale(model, inputs, targets) / 3.0)
        excess, longest = contributions(
            model.to(DEVICE), inputs.to(DEVICE), targets.to(DEVICE), clip, sums(precision), stays
        )
        assert excess <= 0.0, longest


@pytest.mark.parametrize("examples", [2, 7])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_an_example_that_is_missing_changes_no_bit_of_the_others(
    name: str, precision: str, examples: int
) -> None:
    model = build(name).to(DEVICE)
    inputs = torch.randn((examples, 2, *SHAPE), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    targets = torch.randn((examples, CLASSES), generator=torch.Generator().manual_seed(6)).to(DEVICE)
    without = targets.clone()
    without[-1] = 0.0
    there, missing = (
        clipped_gradient_sum(
            model,
            inputs[: len(own)],
            own,
            FlatClip(1e-3),
            loss=product,
            engine="bookkeeping",
            physical_batch_size=2 * examples,
            options=Options(precision=precision),
        ).sum
        for own in (without, targets[:-1])
    )
    if DEVICE == "cpu" and examples > 2:
        torch.testing.assert_close(there, missing)
    else:
        assert torch.equal(there, missing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 64, 513, 4096, 20_000])
def test_products_are_as_exact_as_the_bound_takes_them_to_be(length: int, dtype: torch.dtype) -> None:
    with float32():
        assert excess_of_products(length, DEVICE, dtype) <= 1.0


@on_a_gpu_only
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_repeat(precision: str) -> None:
    make_deterministic(torch.device("cuda", 0), True)
    try:
        for name in MODELS:
            model = build(name).cuda()
            inputs, targets = (
                torch.randn(64, 2, *SHAPE, device="cuda"),
                torch.arange(64, device="cuda") % CLASSES,
            )
            found = [
                clipped_gradient_sum(
                    model,
                    inputs,
                    targets,
                    FlatClip(0.1),
                    engine="bookkeeping",
                    options=Options(precision=precision),
                ).sum
                for _ in range(3)
            ]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.use_deterministic_algorithms(False)


@on_a_gpu_only
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["cnn", "wrn-16-4", "vit-tiny"])
def test_a_piece_waits_once(name: str, precision: str) -> None:
    case = SIZES[name]
    model = case.model().cuda()
    inputs, targets = (tensor.cuda() for tensor in case.batch(16, 2))
    arguments = model, inputs, targets, cross_entropy, FlatClip(1.0), Options(precision=precision)
    clipped_sum(*arguments)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clipped_sum(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) == 1, [str(w.message) for w in waits]


@on_a_gpu_only
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_piece_gives_the_bits_of_a_computed_one(
    name: str, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_deterministic(torch.device("cuda", 0), True)
    try:
        model = build(name).cuda()
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            inputs = torch.randn((8 - seed % 2, 2, *SHAPE), generator=generator).cuda()
            targets = (torch.arange(len(inputs)) % CLASSES).cuda()
            found, expected = (
                clipped_sum(
                    model,
                    inputs,
                    targets,
                    cross_entropy,
                    FlatClip(0.1),
                    Options(precision=precision, fill=8, cuda_graphs=graphs),
                )
                for graphs in (True, False)
            )
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.99)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not caplog.records  # it was recorded


@on_a_gpu_only
def test_group_norms_of_many_views_run() -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 1), torch.nn.InstanceNorm2d(64, affine=True)).cuda()
    inputs = torch.randn(2048, 1, 1, 4, 4, device="cuda")
    targets = torch.zeros(2048, device="cuda")
    total, norms, _ = clipped_sum(layer, inputs, targets, loss, FlatClip(1.0))
    assert torch.isfinite(total).all()
    assert torch.isfinite(norms).all()


def test_views_are_those_of_the_cpu() -> None:
    from fedsim.data import datasets

    config = small("train.augment_multiplicity=2", "train.augmentations=[mirror_pad_crop]")
    data = datasets.load(config.data, False).train
    ids = torch.arange(9).numpy()
    made = [
        batches.views(data, ids, config.train, bytes(32), torch.float32, torch.device(place))
        for place in ("cpu", DEVICE)
    ]
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other.cpu())  # type: ignore[arg-type, union-attr]


def test_evaluation_is_that_of_the_cpu() -> None:
    model = build("cnn")
    examples = [(torch.randn(50, *SHAPE), torch.arange(50) % CLASSES)]
    expected = evaluate.evaluate(model, examples, Classification())
    with evaluate.on(model, torch.device(DEVICE)):
        found = evaluate.evaluate(model, examples, Classification())
    assert next(model.parameters()).device.type == "cpu"
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["central_dpsgd", "shares_dpsgd", "local_dpsgd"])
def test_a_run_ends_where_that_of_the_cpu_does(strategy: str, tmp_path: Path) -> None:
    for out, place in (("here", "cpu"), ("there", DEVICE)):
        config = small(f"preset={strategy}", "train.steps=4", f"engine.device={place}")
        train(config, tmp_path / out)
    torch.testing.assert_close(final(tmp_path / "there"), final(tmp_path / "here"), rtol=1e-3, atol=1e-4)
