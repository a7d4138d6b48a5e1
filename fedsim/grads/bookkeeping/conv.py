"""Convolutions in one and two dimensions, with any stride, padding, dilation and groups.

The gradient of one example is G[o, (i, j, c)] = sum_t g[t, o] patch[t, (i, j, c)] over output places t.
Ways to its norm (`choose.convolution` picks one by shape):

    loop, grouped            form G by torch's weight gradient, for one example at a time, or for many at once
                             with the examples as groups.
    shifts                   form G as one batched product for each place of the kernel (`shifts`): on GPUs.
    patches, slices          form G as a matrix product with patches (`gather`), gathered place by place with
                             channels innermost, or for each place of the kernel as a slice of the image.
    gram                     <P P', g g'> without G. P P' is the sum, over the kernel's places, of shifted
                             slices of the Gram matrix of pixels (padding adds nothing): a factor of the
                             kernel's area cheaper than from the patches themselves.

A formed G is kept, or only its norm is. Where G is not kept, the sum comes from one ordinary weight gradient
of coefficient-scaled output gradients. How G lies in memory, and how much of it is formed at a time, is in
`conv_layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.grads.bookkeeping import choose, gather, gram, shifts
from fedsim.grads.bookkeeping.conv_layout import Layout
from fedsim.grads.bookkeeping.geometry import Geometry, Pair
from fedsim.grads.bookkeeping.precision import SUMMED, squared_norms, widen
from fedsim.grads.bookkeeping.standardise import Origin, Standardisation, standardisations
from fedsim.grads.bookkeeping.tape import Place, Pulled, Tape, Use


class ConvUse(Use):
    """Use of a kernel (out, in / groups, height, width), of one axis less in one dimension.

    Args:
        inputs: all examples' images, (B, images an example, channels, height, width).
    """

    def __init__(
        self,
        tape: Tape,
        weight: Tensor,
        geometry: Geometry,
        inputs: Tensor,
        origin: Origin | None,
    ) -> None:
        super().__init__(tape, weight)
        self._geometry = geometry
        self._views = inputs.shape[1]
        self.origin = origin
        self.closed = origin is not None
        self._standard: Standardisation | None = None
        height = weight.shape[2] if weight.dim() == 4 else 1
        self.shape = (weight.shape[0], weight.shape[1], height, weight.shape[-1])
        self.plan, self.keep = choose.convolution(tape, self.shape, inputs, geometry, self.closed)
        self._layout = Layout(self.plan, self.keep, self.shape, self._views, geometry)
        self._output: tuple[Tensor, int, Tensor | None] | None = None
        self._kept: Tensor | None = None

    def remember(self, output: Tensor, bias: Tensor | None) -> None:
        """Take the convolution's output, if `squares` is cheaper with it at hand."""
        if self.origin is None or output.dtype != self.weight.dtype:  # rounded to fewer bits
            return
        places = self._views * math.prod(output.shape[1:])
        if self.plan == "gram" or (self.keep and 2 * places < self.weight.numel()):
            alias = output.detach()
            self._output = alias, alias._version, bias

    def settle(self, standard: Standardisation) -> None:
        """Take the description of `origin`."""
        self._standard = standard
        if not standard.of_kernel:
            self._output = None

    def fill(self, inputs: Tensor, gradient: Tensor) -> None:
        """Take input (n, in, height, width) and output gradient (n, out, ...)."""
        self._inputs, self._gradient = inputs, gradient
        self.tape.arrived(self)

    def squares(self) -> Tensor:
        """See `Use.squares`."""
        count = self.tape.examples
        ranges = self._layout.ranges(self.tape, self._inputs, self._gradient)
        direction = self._direction()
        # A grouped convolution that gives all at once has its own memory, and a copy would cost time.
        if self.keep and not (self.plan == "grouped" and len(ranges) == 1):
            self._kept = self.tape.blocks.take(count, self.weight.numel(), widen(self._inputs[:0]))
        parts: list[tuple[Tensor, Tensor | None]] = []
        for low, high in ranges:
            if self.plan == "gram":
                parts.append(self._squares_by_gram(low, high))
                continue
            formed = self._form(low, high, None if self._kept is None else self._kept[low:high])
            parts.append(self._squares_of(formed, low, high, direction))
        squares, doubts = zip(*parts, strict=True)
        found = torch.cat(squares)
        if doubts[0] is not None:
            self.doubt = torch.cat(doubts)
        if self.keep:
            self._kept = formed if self._kept is None else self._kept
            del self._inputs, self._gradient
        self._output = None
        return found

    def terms(self) -> Tensor:
        """See `Use.terms`."""
        count = self.tape.examples
        inputs, gradient = (squared_norms(t.reshape(count, -1)) for t in (self._inputs, self._gradient))
        return (inputs * gradient * math.prod(self.shape[2:])).sqrt_()

    def rows(self, low: int, high: int) -> Tensor:
        """See `Use.rows`."""
        if self._kept is not None:
            return self._layout.ordered(self._kept[low:high], self.weight.shape)
        return self._layout.ordered(self._form(low, high), self.weight.shape)

    def weighted(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Use.weighted`."""
        if self._kept is not None:
            total = coefficients.to(self._kept.dtype) @ self._kept
            return self._layout.ordered(total[None], self.weight.shape)[0]
        if self.plan != "gram":  # another product would round in another way
            total = coefficients.new_zeros(self.weight.numel(), dtype=widen(self._gradient[:0]).dtype)
            for low, high in self._layout.ranges(self.tape, self._inputs, self._gradient):
                formed = self._form(low, high)
                total.addmv_(formed.t(), coefficients[low:high].to(formed.dtype))
            return self._layout.ordered(total[None], self.weight.shape)[0]
        if self.tape.gpu:
            return self._weighted_by_shifts(coefficients)
        factors = coefficients.repeat_interleave(self._views).view(-1, 1, 1, 1)
        gradient = widen(self._gradient)
        gradient = gradient * factors.to(gradient.dtype)
        blank = gradient.new_empty(self.shape)
        total = self._geometry.backward(gradient, widen(self._inputs), blank, (False, True, False))[1]
        return total.reshape(self.weight.shape)

    def _weighted_by_shifts(self, coefficients: Tensor) -> Tensor:
        """For GPUs: torch's weight gradient would be rounded to bfloat16, or come from another algorithm."""
        row_bytes = self._layout.row_bytes(self._inputs, self._gradient)
        step, views = max(1, self.tape.scratch // row_bytes), self._views
        total = coefficients.new_zeros(
            (self.shape[0], *self.shape[2:], self.shape[1]), dtype=widen(self._gradient[:0]).dtype
        )
        parts = self._inputs.split(step * views), self._gradient.split(step * views), coefficients.split(step)
        for inputs, gradient, factors in zip(*parts, strict=True):
            total += shifts.weighted(
                inputs, gradient, factors.to(total.dtype), self.shape[2:], self._geometry
            )
        return total.permute(0, 3, 1, 2).reshape(self.weight.shape)

    def pull_back(
        self, gradient: Tensor, parameters: Sequence[nn.Parameter], place: Place | None = None
    ) -> Pulled:
        """See `Use.pull_back`."""
        if self._standard is None:
            return super().pull_back(gradient, parameters, place)
        out = None if place is None else place(self._standard.origin.weight)
        found = self._standard.pull_back(gradient, out)
        return [(p, part) for p in parameters for owner, part in found if owner is p]

    def _form(self, low: int, high: int, out: Tensor | None = None) -> Tensor:
        """Per-example gradients (n, out * entries), in the order of the plan; in `out`, if it is given."""
        count, views = high - low, self._views
        inputs, gradient = (t[low * views : high * views] for t in (self._inputs, self._gradient))
        if self.plan == "shifts":
            if out is None:
                out = widen(inputs[:0]).new_empty((count, self.weight.numel()))
            out_rows = out.view(count, self.shape[0], *self.shape[2:], self.shape[1])
            shifts.form(out_rows, inputs, gradient, self._geometry)
            return out
        inputs, gradient = widen(inputs), widen(gradient)
        if self.plan == "grouped":
            formed = self._form_grouped(inputs, gradient, count)
            return formed if out is None else out.copy_(formed)
        if out is None:
            out = inputs.new_empty((count, self.weight.numel()))
        if self._layout.gathers:
            by_row, kernel, by_patches = self._layout.by_row(out), self.shape[2:], self._layout.by_patches
            gather.form(by_row, inputs, gradient, self._geometry, kernel, by_patches, self.tape.scratch)
            return out
        blank = inputs.new_empty(self.shape)
        parts = gradient.split(views), inputs.split(views), out
        for own_gradient, own_inputs, row in zip(*parts, strict=True):
            one = self._geometry.backward(own_gradient, own_inputs, blank, (False, True, False))[1]
            row.view(self.shape).copy_(one)
        return out

    def _form_grouped(self, inputs: Tensor, gradient: Tensor, count: int) -> Tensor:
        """All examples at once: example and channel make one channel axis, with a group for each example."""
        views = self._views

        def fold(tensor: Tensor) -> Tensor:
            split = tensor.reshape(count, views, *tensor.shape[1:]).transpose(0, 1)
            return split.reshape(views, -1, *tensor.shape[2:])

        blank = inputs.new_empty((count * self.shape[0], *self.shape[1:]))
        groups = count * self._geometry.groups
        formed = self._geometry.backward(fold(gradient), fold(inputs), blank, (False, True, False), groups)[1]
        return formed.reshape(count, -1)

    def _direction(self) -> Tensor | None:
        """The standardisation's direction (out, entries), laid out as G is.

        None where products of G with it are not needed, or come from the convolution's output.
        """
        if self._standard is None or self.plan == "gram" or self._convolved is not None:
            return None
        direction = self._standard.direction
        if self._layout.by_patches:
            direction = direction.view(self.shape).permute(0, 2, 3, 1).flatten(1)
        return direction

    def _squares_of(
        self, formed: Tensor, low: int, high: int, direction: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Squared norms (n,) of formed gradients, and their rounding where there is some."""
        standard = self._standard
        if standard is None:
            return squared_norms(formed), None
        by_row = self._layout.by_row(formed)
        lengths = torch.linalg.vector_norm(by_row, dim=2)
        terms = None
        sums = by_row.sum(2)
        if direction is None:
            along, of_along = self._along(low, high)
            own = slice(low * self._views, high * self._views)
            images, places = (
                widen(t[own]).unflatten(0, (high - low, -1)) for t in (self._inputs, self._gradient)
            )
            patches = squared_norms(images).mul_(math.prod(self.shape[2:])).sqrt_().unsqueeze(1)
            terms = self._terms_along(torch.linalg.vector_norm(places, dim=(1, 3, 4)), patches)
        else:
            along, of_along = (by_row * direction.to(formed.dtype)).sum(2), SUMMED
        found, doubt = standard.squares(lengths, sums, along, (SUMMED, of_along), terms)
        return found.clamp_(min=0.0), doubt

    def _squares_by_gram(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        count, views = high - low, self._views
        inputs = widen(self._inputs[low * views : high * views])
        gradient = widen(self._gradient[low * views : high * views])
        patches = self._patch_gram(inputs, count, (gradient.shape[2], gradient.shape[3]))
        places = _by_place(gradient, count)
        standard = self._standard
        weighted = places
        if standard is not None:
            weighted = places * standard.counts[: places.shape[2]].sqrt().to(places.dtype)
            of_places = torch.linalg.vector_norm(places, dim=1)
            of_patches = patches.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp_(min=0.0).sqrt_()
        gram_of = gram.products(weighted, weighted.transpose(1, 2))
        # An entry of a patch's product is a sum over the kernel's places of products over channels.
        kernel_places = math.prod(self.shape[2:])
        lengths = gram.length(self.shape[0]), gram.length(self.shape[1]) + kernel_places
        found, doubt = gram.inner([(gram_of, patches)], lengths)
        if standard is None:
            return found, doubt
        box = inputs.sum(1, keepdim=True)
        kernel = box.new_ones((1, 1, *self.shape[2:]))
        geometry = self._geometry
        ones = F.conv2d(box, kernel, None, geometry.stride, geometry.padding, geometry.dilation)
        sums = gram.products(ones.reshape(count, 1, -1), places)[:, 0]
        of_sums = SUMMED + kernel_places + gram.length(places.shape[1])
        along, of_along = self._along(low, high)
        upper, terms = of_places * of_patches, self._terms_along(of_places, of_patches)
        taken, more = standard.squares(upper, sums, along, (of_sums, of_along), terms, whole=False)
        return (found + taken).clamp_(min=0.0), doubt + more

    @property
    def _convolved(self) -> tuple[Tensor, Tensor | None] | None:
        """What the convolution with `direction` gave, and its bias; None if gone or changed in place."""
        if self._output is None or self._output[0]._version != self._output[1]:
            return None
        return self._output[0], self._output[2]

    def _along(self, low: int, high: int) -> tuple[Tensor, int]:
        """G.direction (n, out): sum over places of g times what the convolution with it gives there; and the
        length of inner products that is rounded like it."""
        own = slice(low * self._views, high * self._views)
        standard, geometry = self._standard, self._geometry
        assert standard is not None
        convolved, bias = self._convolved or (None, None)
        if convolved is None:
            kernel = standard.direction.view(self.shape)
            convolved = F.conv2d(
                widen(self._inputs[own]), kernel, None, geometry.stride, geometry.padding, geometry.dilation
            )
        else:
            convolved = widen(convolved[own])
        if bias is not None:
            convolved = convolved - bias.view(-1, 1, 1)
        products = (convolved * widen(self._gradient[own])).sum((2, 3))
        along = products.unflatten(0, (high - low, self._views)).sum(1)
        return along, math.prod(self.shape[1:]) + SUMMED

    def _terms_along(self, gradient: Tensor, patches: Tensor) -> Tensor:
        """Bound (n, out) on the summed lengths of what `_along` adds up, for a direction of length 1.

        Args:
            gradient: its length, channel by channel, (n, out).
            patches: length of all patches together, (n, 1).
        """
        bias = None if self._convolved is None else self._convolved[1]
        if bias is not None:  # the output was rounded with it, at every place
            assert self._standard is not None
            places = self._views * math.prod(self._gradient.shape[2:])
            patches = patches + bias.abs() * self._standard.unit.abs() * math.sqrt(places)
        return gradient * patches

    def _patch_gram(self, inputs: Tensor, count: int, outputs: Pair) -> Tensor:
        """Gram matrix (n, places, places) of the patches, from that of the pixels."""
        views, size = self._views, inputs.shape[2:]
        pixels = _by_place(inputs, count)
        of_pixels = gram.products(pixels, pixels.transpose(1, 2)).view(count, views, *size, views, *size)
        total = of_pixels.new_zeros((count, views, *outputs, views, *outputs))
        meeting = self._geometry.meeting
        for i in range(self.shape[2]):
            rows, own_rows = meeting(0, i, size[0], outputs[0])
            for j in range(self.shape[3]):
                columns, own_columns = meeting(1, j, size[1], outputs[1])
                shifted = of_pixels[:, :, own_rows, own_columns, :, own_rows, own_columns]
                total[:, :, rows, columns, :, rows, columns].add_(shifted)
        places = views * math.prod(outputs)
        return total.view(count, places, places)


def _by_place(images: Tensor, count: int) -> Tensor:
    """Bring images (n * views, channels, height, width) to (n, views * height * width, channels)."""
    return images.permute(0, 2, 3, 1).reshape(count, -1, images.shape[1])


def settle(uses: Sequence[Use]) -> None:
    """Describe the origins of standardised kernels, after the forward pass."""
    standard = [use for use in uses if isinstance(use, ConvUse) and use.origin is not None]
    found = standardisations([use.origin for use in standard if use.origin is not None])
    for use, own in zip(standard, found, strict=True):
        use.settle(own)
