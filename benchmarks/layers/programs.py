"""Models that do something unusual: with parameters, with autograd, with the shape of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from benchmarks.layers.case import CLASSES, Call, Case, classified, ids, labels, numbers


def cases() -> Iterator[Case]:
    """Every row of this file."""
    yield from parametrised()
    yield from parameters()
    yield from autograd()
    yield from shapes()
    yield from selections()
    yield from losses()


class Symmetric(nn.Module):
    """A matrix made symmetric."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Mean of a matrix and its transpose."""
        return (matrix + matrix.mT) / 2


class Positive(nn.Module):
    """Entries made positive."""

    def forward(self, weight: Tensor) -> Tensor:
        """Softplus of the entries."""
        return F.softplus(weight)


def parametrised() -> Iterator[Case]:
    """Weights that are computed from others."""
    group = "parametrised weights"

    def spectral() -> nn.Module:
        return parametrizations.spectral_norm(nn.Linear(5, 6)).eval()

    def old_spectral() -> nn.Module:
        layer = nn.utils.spectral_norm(nn.Linear(5, 6))
        layer(torch.randn(2, 5))
        return layer.eval()

    def pruned() -> nn.Module:
        return prune.l1_unstructured(nn.Linear(5, 6), "weight", amount=0.4)

    def twice() -> nn.Module:
        layer = nn.Linear(6, 6)
        parametrize.register_parametrization(layer, "weight", Symmetric())
        parametrize.register_parametrization(layer, "weight", Positive())
        parametrize.register_parametrization(layer, "bias", Positive())
        return nn.Sequential(nn.Linear(5, 6), layer)

    for name, body, shape in (
        ("weight norm", lambda: parametrizations.weight_norm(nn.Linear(5, 6)), (5,)),
        ("weight norm of a Conv2d", lambda: parametrizations.weight_norm(nn.Conv2d(3, 5, 3)), (3, 6, 5)),
        ("weight norm, by hook", lambda: nn.utils.weight_norm(nn.Linear(5, 6)), (5,)),
        (
            "orthogonal, matrix exponential",
            lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="matrix_exp"),
            (5,),
        ),
        (
            "orthogonal, Householder",
            lambda: parametrizations.orthogonal(nn.Linear(5, 3), orthogonal_map="householder"),
            (5,),
        ),
        (
            "orthogonal, Cayley",
            lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley"),
            (5,),
        ),
        ("spectral norm, frozen", spectral, (5,)),
        ("spectral norm by hook, frozen", old_spectral, (5,)),
        ("pruned", pruned, (5,)),
        ("own parametrisations, one on another, and of a bias", twice, (5,)),
    ):
        frozen = "frozen" in name
        yield classified(
            group,
            name,
            lambda body=body, frozen=frozen: Evaluating(body()) if frozen else body(),
            numbers(*shape),
        )
    yield classified(
        group,
        "weights made by another layer",
        lambda: Call(
            lambda m, x: torch.einsum("nij,nj->ni", m.maker(x).unflatten(1, (4, 5)), x),
            maker=nn.Linear(5, 20),
        ),
        numbers(5),
    )
    yield classified(
        group,
        "low-rank update of a frozen layer",
        lambda: Call(
            lambda m, x: m.frozen(x) + m.up(m.down(x)),
            frozen=nn.Linear(5, 6).requires_grad_(False),
            down=nn.Linear(5, 2, bias=False),
            up=nn.Linear(2, 6, bias=False),
        ),
        numbers(3, 5),
        zero=("head.*", "body.up.*"),
    )


class Evaluating(nn.Module):
    """A module that stays in eval mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def train(self, mode: bool = True) -> Evaluating:
        """Leave the module inside as it is."""
        self.training = mode
        self.inner.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """What the module inside gives."""
        return self.inner(x)


def parameters() -> Iterator[Case]:
    """Parameters on their own, tied, frozen, hooked."""
    group = "parameters"
    one = nn.Parameter

    def tied_embedding(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.inner(m.embed(x))), m.embed.weight)

    def tied_layers() -> nn.Module:
        body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        body[2].weight = body[0].weight
        return body

    def tied_convolutions() -> nn.Module:
        body = nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=2, dilation=2)
        )
        body[2].weight = body[0].weight
        return body

    def hooked() -> nn.Module:
        body = nn.Embedding(9, 4)
        mask = (torch.arange(9) > 4).float()[:, None]
        body.weight.register_hook(lambda gradient: gradient * mask.to(gradient.dtype))
        return body

    def doubled() -> nn.Module:
        body = nn.Linear(5, 6)
        body.bias.register_hook(lambda gradient: 2 * gradient)
        return body

    def module_hook() -> nn.Module:
        body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        body[0].register_forward_hook(lambda module, arguments, out: out * 1.5)
        return body

    def backward_hook() -> nn.Module:
        body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
        body[2].register_full_backward_hook(lambda module, before, after: (before[0] * 0.5,))
        return body

    def tensor_hook(m: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.inner(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * 0.5)
        return hidden

    for name, body, inputs in (
        (
            "ParameterList",
            lambda: Call(
                lambda m, x: torch.tanh(x @ m.list[0]) @ m.list[1] + m.list[2],
                list=nn.ParameterList([torch.randn(5, 6), torch.randn(6, 4), torch.randn(4)]),
            ),
            numbers(5),
        ),
        (
            "ParameterDict",
            lambda: Call(
                lambda m, x: x * m.dict["gain"] + m.dict["shift"],
                dict=nn.ParameterDict({"gain": torch.randn(5), "shift": torch.randn(3, 1)}),
            ),
            numbers(3, 5),
        ),
        ("tied Linear layers", tied_layers, numbers(5)),
        ("tied Conv2d layers", tied_convolutions, numbers(3, 5, 4)),
        (
            "embedding tied to the output",
            lambda: Call(tied_embedding, embed=nn.Embedding(9, 4), inner=nn.Linear(4, 4)),
            ids(6, 9),
        ),
        (
            "one Linear used three times",
            lambda: Call(
                lambda m, x: m.inner(torch.tanh(m.inner(torch.tanh(m.inner(x))))), inner=nn.Linear(5, 5)
            ),
            numbers(5),
        ),
        (
            "one Linear at 6 and at 2 positions",
            lambda: Call(
                lambda m, x: torch.cat([m.inner(x), m.inner(torch.tanh(x[:, :2] * x[:, 2:4]))], 1),
                inner=nn.Linear(5, 5),
            ),
            numbers(6, 5),
        ),
        (
            "without axes",
            lambda: Call(
                lambda m, x: m.inner(x) * m.temperature.exp(),
                inner=nn.Linear(5, 6),
                temperature=one(torch.tensor(0.3)),
            ),
            numbers(5),
        ),
        (
            "frozen beside trainable",
            lambda: nn.Sequential(nn.Linear(5, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 6)),
            numbers(5),
        ),
        ("frozen weight, trainable bias", _bias_only, numbers(5)),
        (
            "one that is not used",
            lambda: Call(lambda m, x: m.inner(x), inner=nn.Linear(5, 6), unused=nn.Linear(3, 3)),
            numbers(5),
        ),
        (
            "positions and a class token",
            lambda: Call(
                lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1) * m.gain + m.position,
                token=one(torch.randn(1, 1, 5)),
                position=one(torch.randn(1, 7, 5)),
                gain=one(torch.randn(5)),
            ),
            numbers(6, 5),
        ),
        (
            "learned queries",
            lambda: Call(_queries, queries=one(torch.randn(1, 3, 5)), project=nn.Linear(5, 5)),
            numbers(7, 5),
        ),
        (
            "used transposed",
            lambda: Call(lambda m, x: torch.tanh(x @ m.w) @ m.w.t(), w=one(torch.randn(5, 6))),
            numbers(3, 5),
        ),
        (
            "sliced, reshaped and indexed",
            lambda: Call(
                lambda m, x: x @ m.w[:, :4].reshape(5, 4) + m.w[torch.tensor([0, 2]), 4:].flatten()[:4],
                w=one(torch.randn(5, 8)),
            ),
            numbers(3, 5),
        ),
        ("hook that freezes rows", hooked, ids(6, 9)),
        ("hook that doubles", doubled, numbers(3, 5)),
        ("forward hook of a module", module_hook, numbers(5)),
        ("backward hook of a module", backward_hook, numbers(5)),
        ("hook of a tensor", lambda: Call(tensor_hook, inner=nn.Linear(5, 6)), numbers(5)),
        (
            "a penalty beside the output",
            lambda: Call(
                lambda m, x: torch.tanh(m.inner(x)) + 0.1 * m.inner.weight.square().sum(),
                inner=nn.Linear(5, 6),
            ),
            numbers(5),
        ),
    ):
        yield classified(group, name, body, inputs)


def _bias_only() -> nn.Module:
    layer = nn.Linear(5, 6)
    layer.weight.requires_grad_(False)
    return layer


def _queries(m: nn.Module, x: Tensor) -> Tensor:
    asked = m.project(m.queries.expand(len(x), -1, -1))
    return torch.softmax(asked @ x.transpose(1, 2), -1) @ x


class Straight(torch.autograd.Function):
    """Sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sign of x."""
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Straight through."""
        return gradient


class OwnLinear(torch.autograd.Function):
    """x @ w.t(), with a backward pass of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        """The product."""
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Keep both."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of both."""
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class OldLinear(torch.autograd.Function):
    """The same in the old form, which no transform understands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of both."""
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class Scripted(nn.Module):
    """What TorchScript compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Two layers."""
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def autograd() -> Iterator[Case]:
    """Checkpointing, functions and graphs of one's own, compiled models."""
    group = "autograd"

    def checkpointed(reentrant: bool) -> nn.Module:
        return Call(
            lambda m, x: checkpoint(m.inner, m.before(x), use_reentrant=reentrant),
            before=nn.Linear(5, 6),
            inner=nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
        )

    def energy(m: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            return torch.autograd.grad(m.inner(point).tanh().sum(), point, create_graph=True)[0]

    def jacobian(m: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda row: torch.tanh(m.inner(row))))(x)

    def traced() -> nn.Module:
        return torch.jit.trace(Scripted(), torch.randn(2, 5))

    def traced_cnn() -> nn.Module:
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2))
        return torch.jit.trace(body, torch.randn(2, 3, 6, 6))

    def detached(m: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.inner(x))
        return m.outer(hidden.detach()) + hidden.mean(-1, keepdim=True)

    def without_gradient(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(m.inner(x))
        return m.outer(x) * gate

    def fixed_point(m: nn.Module, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(4):
            state = torch.tanh(m.inner(state) + x)
        return state

    linear = {"w": lambda: nn.Parameter(torch.randn(6, 5))}
    for name, body, shape in (
        ("checkpoint, reentrant", lambda: checkpointed(True), (3, 5)),
        ("checkpoint, not reentrant", lambda: checkpointed(False), (3, 5)),
        (
            "own function, straight through",
            lambda: Call(
                lambda m, x: m.outer(Straight.apply(m.inner(x))), inner=nn.Linear(5, 6), outer=nn.Linear(6, 6)
            ),
            (5,),
        ),
        (
            "own function with a vmap rule",
            lambda: Call(lambda m, x: OwnLinear.apply(x, m.w), w=linear["w"]()),
            (3, 5),
        ),
        (
            "own function of the old form",
            lambda: Call(lambda m, x: OldLinear.apply(x, m.w), w=linear["w"]()),
            (3, 5),
        ),
        ("TorchScript, scripted", lambda: torch.jit.script(Scripted()), (3, 5)),
        ("TorchScript, traced", traced, (5,)),
        ("TorchScript, traced convolutions", traced_cnn, (3, 6, 6)),
        ("gradient of an energy", lambda: Call(energy, inner=nn.Linear(5, 6)), (5,)),
        ("Jacobian", lambda: Call(jacobian, inner=nn.Linear(5, 4)), (5,)),
        ("detached branch", lambda: Call(detached, inner=nn.Linear(5, 6), outer=nn.Linear(6, 6)), (5,)),
        (
            "branch without gradient",
            lambda: Call(without_gradient, inner=nn.Linear(5, 6), outer=nn.Linear(5, 6)),
            (5,),
        ),
        ("fixed point of four rounds", lambda: Call(fixed_point, inner=nn.Linear(5, 5)), (5,)),
        (
            "functional_call with other weights",
            lambda: Call(
                lambda m, x: torch.func.functional_call(m.inner, {"weight": m.w, "bias": m.inner.bias}, (x,)),
                inner=nn.Linear(5, 6),
                w=linear["w"](),
            ),
            (5,),
        ),
    ):
        yield classified(group, name, body, numbers(*shape))


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


def selections() -> Iterator[Case]:
    """What is computed depends on the data."""
    group = "selections"

    def gathered(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.embed(x)
        out = hidden.clone()
        out[x == 0] = torch.tanh(m.inner(hidden[x == 0]))
        return out

    def selected(m: nn.Module, x: Tensor) -> Tensor:
        chosen = torch.gather(m.inner(x), 1, x[..., :1].argsort(1).expand(-1, -1, 6)[:, :2])
        return chosen * torch.where(chosen > 0, 1.0, 0.5)

    def branched(m: nn.Module, x: Tensor) -> Tensor:
        return m.left(x) if x.sum() > 0 else m.right(x)

    def counted(m: nn.Module, x: Tensor) -> Tensor:
        out = x
        for _ in range(1 + int(x.abs().mean().item() > 0.7)):
            out = torch.tanh(m.inner(out))
        return out

    def experts(m: nn.Module, x: Tensor) -> Tensor:
        weight, place = torch.softmax(m.router(x), -1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(m.experts):
            chosen = place == number
            out[chosen] = weight[chosen][:, None] * expert(x[chosen])
        return out

    def soft_experts(m: nn.Module, x: Tensor) -> Tensor:
        weight = torch.softmax(m.router(x), -1)
        return torch.stack([expert(x) for expert in m.experts], -1) @ weight[..., None]

    def averaged(m: nn.Module, x: Tensor) -> Tensor:
        slots = (torch.arange(6) % 3).to(x.device)
        return torch.zeros(len(x), 3, 5, dtype=x.dtype).index_add(1, slots, m.inner(x))

    def pointwise(m: nn.Module, x: Tensor) -> Tensor:
        return m.inner(x.topk(3, dim=1).values.transpose(1, 2)).sort(-1).values

    def mixture() -> nn.Module:
        return Call(experts, router=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))

    for name, body, inputs in (
        (
            "layer applied at marked positions",
            lambda: Call(gathered, embed=nn.Embedding(4, 5), inner=nn.Linear(5, 5)),
            ids(6, 4),
        ),
        ("gather, sort, where", lambda: Call(selected, inner=nn.Linear(4, 6)), numbers(5, 4)),
        (
            "branch on the data",
            lambda: Call(branched, left=nn.Linear(4, 5), right=nn.Linear(4, 5)),
            numbers(4),
        ),
        ("number of rounds from the data", lambda: Call(counted, inner=nn.Linear(4, 4)), numbers(4)),
        ("mixture of experts, hard", mixture, numbers(4)),
        (
            "mixture of experts, soft",
            lambda: Call(
                soft_experts, router=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
            ),
            numbers(3, 4),
        ),
        ("index_add", lambda: Call(averaged, inner=nn.Linear(4, 5)), numbers(6, 4)),
        ("top values", lambda: Call(pointwise, inner=nn.Linear(3, 5)), numbers(5, 4)),
    ):
        yield classified(group, name, body, inputs)


class Masked(nn.Module):
    """Token ids, a mask and numbers beside them: arrays of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.beside, self.head = nn.Embedding(9, 5), nn.Linear(3, 5), nn.Linear(5, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Logits of the mean over what the mask keeps, in a mapping."""
        kept = mask[..., None].to(numbers.dtype)
        mean = (self.embed(ids) * kept).sum(1) / kept.sum(1).clamp(min=1)
        return {"logits": self.head(torch.tanh(mean + self.beside(numbers)))}


class Mapping(nn.Module):
    """Takes the mapping itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and what they came from, as a tuple."""
        hidden = torch.tanh(self.inner(batch["left"] - batch["right"]))
        return self.head(hidden), hidden


def losses() -> Iterator[Case]:
    """Losses, outputs and targets of other forms."""
    group = "losses and batches"

    def arrays(examples: int, views: int) -> dict[str, Tensor]:
        return {
            "ids": ids(6, 9)(examples, views),
            "mask": torch.rand(examples, views, 6) > 0.4,
            "numbers": numbers(3)(examples, views),
        }

    def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=0, reduction="none")
        return each.sum(1) / (targets != 0).sum(1).clamp(min=1)

    def boxes(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        kind = F.cross_entropy(outputs["kind"], targets["kind"], reduction="none")
        return kind + F.smooth_l1_loss(outputs["box"], targets["box"], reduction="none").sum(1)

    def distilled(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs[0], targets, reduction="none") + 0.1 * outputs[1].square().mean(1)

    yield Case(
        group,
        "named arrays, mapping out",
        Masked,
        arrays,
        loss=lambda outputs, targets: F.cross_entropy(outputs["logits"], targets, reduction="none"),
    )
    yield Case(
        group,
        "the mapping itself, tuple out",
        Mapping,
        lambda examples, views: {name: numbers(4)(examples, views) for name in ("left", "right")},
        loss=distilled,
        whole=True,
    )
    yield Case(
        group,
        "regression, targets with axes",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1)),
        numbers(2, 4, 4),
        lambda examples: torch.randn(examples, 1, 4, 4),
        lambda outputs, targets: (outputs - targets).square().flatten(1).mean(1),
        zero=("2.*",),
    )
    yield Case(
        group,
        "several labels",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)),
        numbers(5),
        lambda examples: torch.randint(0, 2, (examples, 4)).float(),
        lambda outputs, targets: F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(
            1
        ),
        zero=("2.*",),
    )
    yield Case(
        group,
        "language model, padded targets",
        lambda: nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 9)),
        ids(6, 9),
        lambda examples: torch.randint(0, 9, (examples, 6)),
        tokens,
        zero=("3.*",),
    )
    yield Case(
        group,
        "boxes and kinds, mappings",
        lambda: Call(
            lambda m, x: {"kind": m.head(torch.tanh(m.inner(x))), "box": m.box(torch.tanh(m.inner(x)))},
            inner=nn.Linear(5, 6),
            head=nn.Linear(6, CLASSES),
            box=nn.Linear(6, 4),
        ),
        numbers(5),
        lambda examples: {"kind": labels(examples), "box": torch.randn(examples, 4)},
        boxes,
        zero=("head.*", "box.*"),
    )
    yield Case(
        group,
        "a loss that mixes examples",
        lambda: nn.Linear(5, 3),
        numbers(5),
        labels,
        lambda outputs, targets: F.cross_entropy(
            outputs @ outputs.t(), torch.arange(len(outputs)), reduction="none"
        ),
        zero=(),
        views=1,
        refused=True,
    )
    yield Case(
        group,
        "a model that centres over the batch",
        lambda: Call(lambda m, x: m.inner(x - x.mean(0)), inner=nn.Linear(5, CLASSES)),
        numbers(5),
        zero=(),
        views=1,
        refused=True,
    )
