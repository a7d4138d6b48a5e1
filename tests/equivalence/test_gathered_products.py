"""Per-example gradients of convolutions from gathered patches, against torch one example at a time."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.grads.bookkeeping import gather, precision
from fedsim.grads.bookkeeping.geometry import Geometry

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
paddings = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.parametrize("large", [0, 2**25], ids=["oneDNN", "BLAS"])
@given(
    count=st.integers(1, 5),
    views=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    kernel=pairs,
    stride=pairs,
    padding=paddings,
    dilation=pairs,
    channels_last=st.booleans(),
    channels_inside=st.booleans(),
    turned=st.booleans(),
    single=st.booleans(),
    at_a_time=st.integers(1, 6),
)
def test_gradients_are_those_of_one_example_at_a_time(
    count: int,
    views: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    channels_last: bool,
    channels_inside: bool,
    turned: bool,
    single: bool,
    at_a_time: int,
    large: int,
) -> None:
    geometry = Geometry(stride, padding, dilation, 1)
    outputs = geometry.outputs(size, kernel)
    assume(min(outputs) >= 1)
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs, gradient = (
        torch.randn((count * views, width, *extent), generator=generator, dtype=torch.float64).contiguous(
            memory_format=layout
        )
        for width, extent in zip(channels, (size, outputs), strict=True)
    )
    weight = torch.empty((channels[1], channels[0], *kernel), dtype=torch.float64)
    expected = torch.stack(
        [
            geometry.backward(own_gradient, own_inputs, weight, (False, True, False))[1]
            for own_gradient, own_inputs in zip(gradient.split(views), inputs.split(views), strict=True)
        ]
    )
    if channels_inside:
        expected = expected.permute(0, 1, 3, 4, 2)
    expected = expected.flatten(2)
    entries = expected.shape[2]
    dtype, tolerance = (torch.float32, 1e-5) if single else (torch.float64, 1e-12)
    inputs, gradient = inputs.to(dtype), gradient.to(dtype)
    # Values that must be overwritten, not added to.
    out = torch.full((count, entries, channels[1]), float("nan"), dtype=dtype).transpose(1, 2)
    out = out if turned else out.contiguous()
    copy_bytes = out.element_size() * views * entries * outputs[0] * outputs[1]
    scratch = at_a_time * copy_bytes + copy_bytes // 2
    with (
        patch.object(gather, "_product", wraps=gather._product) as product,
        patch.object(precision, "_LARGE", large),
    ):
        gather.form(out, inputs, gradient, geometry, kernel, channels_inside, scratch)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=10 * tolerance)
    filled = [call.args[0] for call in product.call_args_list]
    assert max(len(block) if block.dim() == 3 else 1 for block in filled) == min(at_a_time, count)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=pairs, stride=pairs, padding=paddings)
def test_output_sizes_are_those_of_torch(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    geometry = Geometry(stride, padding, (1, 2), 1)
    assume(min(geometry.outputs(size, kernel)) >= 1)
    result = torch.nn.functional.conv2d(
        torch.ones(1, 1, *size), torch.ones(1, 1, *kernel), None, stride, padding, (1, 2)
    )
    assert geometry.outputs(size, kernel) == tuple(result.shape[2:])
