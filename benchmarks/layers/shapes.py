"""Where the examples are not simply on the first axis of everything."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import Call, Case, classified, numbers


def shapes() -> Iterator[Case]:
    """Where the examples are not simply on the first axis of everything."""
    group = "shapes"

    def time_first(m: nn.Module, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        return m.norm(torch.tanh(m.inner(turned))).transpose(0, 1)

    def convolved_time_first(m: nn.Module, x: Tensor) -> Tensor:
        turned = x.permute(1, 0, 2)  # (time, n, features)
        return m.inner(turned.permute(1, 2, 0))

    def folded(m: nn.Module, x: Tensor) -> Tensor:
        return m.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def frames(m: nn.Module, x: Tensor) -> Tensor:
        return m.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    def fourier(m: nn.Module, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(m.inner(x)) * torch.view_as_complex(m.filter), n=6)

    def complex_product(m: nn.Module, x: Tensor) -> Tensor:
        turned = torch.complex(m.real(x), m.imaginary(x))
        return torch.cat([(turned * turned).real, turned.abs()], -1)

    def written(m: nn.Module, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 6, 4, dtype=x.dtype)
        out[:, :3] = m.inner(x[:, :3])
        out[:, 3:] = torch.tanh(m.inner(x[:, 3:]))
        out[..., 0] *= 2
        return out

    def through_view(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.inner(x)
        part = hidden[:, :2]
        part.mul_(2.0)
        return torch.tanh(hidden)

    def two_outputs(m: nn.Module, x: Tensor) -> Tensor:
        values, places = torch.max(m.inner(x), dim=1)
        first, second = torch.tanh(values).chunk(2, dim=-1)
        return torch.cat([first * second, places.to(x.dtype)], -1)

    def stacked(m: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([m.inner(row) for row in x.unbind(0)])

    def decomposed(m: nn.Module, x: Tensor) -> Tensor:
        return torch.linalg.eigh(m.inner(x) @ m.inner(x).mT + torch.eye(3, dtype=x.dtype)).eigenvalues

    def normalised_length(m: nn.Module, x: Tensor) -> Tensor:
        return F.normalize(m.inner(x), dim=-1) @ F.normalize(m.prototypes, dim=-1).t()

    def distances(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cdist(x, m.prototypes.expand(len(x), -1, -1))

    for name, body, shape in (
        ("time first", lambda: Call(time_first, inner=nn.Linear(4, 6), norm=nn.LayerNorm(6)), (5, 4)),
        ("time first, then Conv1d", lambda: Call(convolved_time_first, inner=nn.Conv1d(4, 6, 2)), (5, 4)),
        ("views and positions folded together", lambda: Call(folded, inner=nn.Linear(4, 6)), (3, 4)),
        ("frames folded into the batch", lambda: Call(frames, inner=nn.Conv2d(2, 4, 3)), (3, 2, 5, 5)),
        (
            "Fourier filter",
            lambda: Call(fourier, inner=nn.Linear(4, 6), filter=nn.Parameter(torch.randn(4, 2))),
            (3, 4),
        ),
        (
            "complex intermediates",
            lambda: Call(complex_product, real=nn.Linear(4, 5), imaginary=nn.Linear(4, 5)),
            (3, 4),
        ),
        (
            "einsum, two parameters",
            lambda: Call(
                lambda m, x: torch.einsum("nti,ijk,jl->ntkl", x, m.u, m.v),
                u=nn.Parameter(torch.randn(4, 3, 5)),
                v=nn.Parameter(torch.randn(3, 2)),
            ),
            (3, 4),
        ),
        (
            "einsum, three factors of the batch",
            lambda: Call(
                lambda m, x: torch.einsum("nti,nsi,ik->ntk", x, x, m.u), u=nn.Parameter(torch.randn(4, 5))
            ),
            (3, 4),
        ),
        ("written in place", lambda: Call(written, inner=nn.Linear(4, 4)), (6, 4)),
        ("written through a view", lambda: Call(through_view, inner=nn.Linear(4, 4)), (6, 4)),
        ("operations with two results", lambda: Call(two_outputs, inner=nn.Linear(4, 6)), (5, 4)),
        ("a loop over the batch", lambda: Call(stacked, inner=nn.Linear(4, 6)), (4,)),
        ("eigenvalues", lambda: Call(decomposed, inner=nn.Linear(4, 3)), (3, 4)),
        (
            "cosine to prototypes",
            lambda: Call(
                normalised_length, inner=nn.Linear(4, 5), prototypes=nn.Parameter(torch.randn(3, 5))
            ),
            (4,),
        ),
        (
            "distances to prototypes",
            lambda: Call(distances, prototypes=nn.Parameter(torch.randn(3, 4))),
            (5, 4),
        ),
        (
            "cumulative sums and products",
            lambda: Call(
                lambda m, x: m.inner(x).cumsum(1) * torch.sigmoid(m.inner(x)).cumprod(1),
                inner=nn.Linear(4, 5),
            ),
            (5, 4),
        ),
        (
            "interpolation and sampling",
            lambda: Call(
                lambda m, x: F.grid_sample(
                    F.interpolate(m.inner(x), scale_factor=2, mode="bilinear"),
                    torch.tanh(m.place(x.flatten(1))).unflatten(1, (3, 3, 2)),
                    align_corners=False,
                ),
                inner=nn.Conv2d(2, 3, 2),
                place=nn.Linear(32, 18),
            ),
            (2, 4, 4),
        ),
    ):
        yield classified(group, name, body, numbers(*shape))
