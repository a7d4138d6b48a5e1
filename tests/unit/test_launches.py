"""What a GPU would be asked to do, counted without one: `benchmarks.spies` and `benchmarks.launches`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import launches, spies
from benchmarks.bound.reduced import BertMini
from benchmarks.models import CASES
from fedsim.clipping.flat import FlatClip
from fedsim.grads import constants, gpu, independence
from fedsim.grads.bookkeeping import gram, precision, shifts, standardise
from fedsim.grads.bookkeeping.engine import clipped_sum
from fedsim.grads.bookkeeping.geometry import Geometry
from fedsim.grads.per_example import cross_entropy
from fedsim.models import layers

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(autouse=True)
def _no_check_of_independence() -> Iterator[None]:
    with mock.patch.object(independence, "check"):  # in calls number 1, 2, 4, 8, ...: those wait
        yield


@pytest.mark.parametrize("views", [1, 16])
@pytest.mark.parametrize("name", ["wrn-16-4", "cnn"])
def test_a_piece_of_2048_views_takes_few_launches_one_wait_and_no_copy(name: str, views: int) -> None:
    case = CASES[name]
    shape = (2048 // views, views, *case.shape)
    count = spies.counted(case.model(), shape, launches.clipped, warm=1)
    assert 100 < sum(count.launched.values()) < (2000 if views == 16 else 2200)
    assert count.launched["convolution"] >= 4
    assert count.waits == {"_local_scalar_dense": 1}
    assert launches.copies(case, views) == 0


@pytest.mark.parametrize("examples", [8, 64])
def test_launches_do_not_grow_with_the_piece(examples: int) -> None:
    counts = [
        sum(spies.counted(CASES["cnn"].model(), (n, 16, 3, 32, 32), launches.clipped, 1).launched.values())
        for n in (examples, 2 * examples)
    ]
    assert counts[0] == counts[1]


def test_models_of_tokens_wait_once_too() -> None:
    count = spies.counted(BertMini(), (32, 1, 8), launches.clipped, warm=1)
    assert count.waits == {"_local_scalar_dense": 1}
    assert count.launched["index_add_"] >= 2


def test_the_spies_see_waits_launches_and_time() -> None:
    def asking(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        del model, targets
        assert float(inputs.sum()) == 1.0
        inputs.view(-1)[3:].unsqueeze(0)

    count = spies.counted(nn.Linear(2, 2), (1000, 250), asking)
    assert count.waits == {"_local_scalar_dense": 1}
    assert count.launched == {"sum": 1}
    assert count.seconds == spies.H100.launch
    big = spies.counted(nn.Linear(2, 2), (1000, 1000, 1000), asking)
    assert big.seconds == pytest.approx(4e9 / spies.H100.bandwidth, rel=1e-3)
    with pytest.raises(Exception, match="nonzero"):
        spies.counted(nn.Linear(2, 2), (3, 4), lambda model, inputs, targets: inputs[inputs > 0])


def test_a_copy_to_the_device_is_seen() -> None:
    spy = spies.Spy()
    with spy:
        torch.ones(3).to("meta")
        torch.ones(3) + 1
    assert spy.count.copies == 1


def test_what_needs_no_autograd_stays_on_the_device_and_in_float32() -> None:
    """On fake tensors of CUDA: a constant made on the CPU, or a product of bfloat16 alone, shows."""
    constants.spread.cache_clear()
    with (
        FakeTensorMode(),
        mock.patch.object(gpu, "on", return_value=True),
        # torch takes its out_dtype for a factor where tensors are fake.
        mock.patch.object(torch, "baddbmm", lambda total, left, right, out_dtype, out: out),
    ):
        half = {"device": "cuda", "dtype": torch.bfloat16}
        inputs, gradient = torch.empty(6, 8, 9, 9, **half), torch.empty(6, 4, 5, 5, **half)
        geometry = Geometry((2, 2), (1, 1), (1, 1), 1)
        out = torch.empty(3, 4, 3, 3, 8, device="cuda")
        shifts.form(out, inputs, gradient, geometry)
        factors = torch.empty(3, device="cuda")
        made = [shifts.weighted(inputs, gradient, factors, (3, 3), geometry)]
        made.append(precision.product(torch.empty(5, 7, device="cuda"), torch.empty(7, 3, **half)))
        rows = gram.strips(torch.empty(3, 70, 300, **half))
        found = gram.inner(zip(rows, gram.strips(torch.empty(3, 70, 20, **half)), strict=True), (300, 20))
        weight, gain = torch.empty(4, 8, 3, 3, device="cuda"), torch.empty(4, device="cuda")
        origin = standardise.Origin(weight, gain, layers.standardise(weight, gain))
        (own,) = standardise.standardisations([origin])
        squares = own.squares(*(torch.empty(3, 4, device="cuda") for _ in range(3)), (27, 27))
        for tensor in (*made, *found, *squares, precision.squared_norms(out)):
            assert tensor.device.type == "cuda"
            assert tensor.dtype in (torch.float32, torch.float64)
    constants.spread.cache_clear()


def test_every_launch_of_a_real_call_is_one_of_the_faked_one() -> None:
    """Shapes decide what is launched: values of real tensors change nothing."""
    case = CASES["cnn"]
    model, shape = case.model(), (8, 2, *case.shape)
    faked = spies.counted(model, shape, launches.clipped, warm=1)
    spy = spies.Spy()
    with spies.as_on_a_gpu(spy):
        for _ in range(2):
            spy.count = spies.Count()
            with spy:
                launches.clipped(copy.deepcopy(model), torch.randn(shape), torch.zeros(8, dtype=torch.int64))
    assert spy.count.launched["bmm"] == faked.launched["bmm"]
    assert spy.count.launched["convolution"] == faked.launched["convolution"]
    assert spy.count.waits == faked.waits


def test_examples_that_are_not_finite_are_left_out_after_the_one_question() -> None:
    model = nn.Linear(3, 2)
    inputs = torch.randn(4, 1, 3)
    inputs[2] = float("nan")
    targets = torch.zeros(4, dtype=torch.int64)
    with mock.patch.object(gpu, "on", return_value=True):
        total, norms, _ = clipped_sum(model, inputs, targets, cross_entropy, FlatClip(0.1))
    kept = [0, 1, 3]
    rest, own, _ = clipped_sum(model, inputs[kept], targets[kept], cross_entropy, FlatClip(0.1))
    assert not torch.isfinite(norms[2])
    torch.testing.assert_close(norms[kept], own)
    torch.testing.assert_close(total, rest)
