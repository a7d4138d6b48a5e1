"""Where a kernel meets its input: against trying every place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedsim.grads.bookkeeping.geometry import Geometry


@given(
    size=st.integers(1, 9),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 6),
    dilation=st.integers(1, 4),
    axis=st.integers(0, 1),
)
def test_meeting(size: int, kernel: int, stride: int, padding: int, dilation: int, axis: int) -> None:
    """Padding wider than the input, and places of the kernel that never meet a pixel, among them."""

    def along(value: int, other: int) -> tuple[int, int]:
        return (value, other) if axis == 0 else (other, value)

    geometry = Geometry(along(stride, 3), along(padding, 2), along(dilation, 5), 1)
    outputs = geometry.outputs((size, size), (kernel, kernel))[axis]
    for offset in range(kernel):
        reached = [place * stride + offset * dilation - padding for place in range(outputs)]
        places, pixels = geometry.meeting(axis, offset, size, outputs)
        assert list(range(size))[pixels] == [pixel for pixel in reached if 0 <= pixel < size]
        assert list(range(outputs))[places] == [p for p, pixel in enumerate(reached) if 0 <= pixel < size]
