"""jax_privacy in the gradient benchmark: the same models in plain JAX, in a process of their own.

    python -m benchmarks.jax_peer MODEL EXAMPLES VIEWS

`peer` starts that process. It copies the torch model's weights, compares the clipped sum of
`jax_privacy.clipping.clipped_grad` with the bookkeeping engine's, and refuses to time unequal work. Both JAX
steps are compiled before the first timed call. Images are channels-last, as JAX users keep them.

XLA is held to one thread by pinning the process to one core before XLA starts, which sizes its pools, and
by its flag for Eigen. CPU time of the process counts every thread, so a thread that gets away would be
counted too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.models import CASES, Case
from benchmarks.peers import CLIP
from benchmarks.process import Process, serve
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.per_example import cross_entropy

BASE = "JAX non-private"
METHOD = "jax_privacy"
# Relative L2 difference of the clipped sums beyond which the work is not the same. WRN's gradients in XLA on
# one thread are 0.2% (2 examples) to 0.4% (16) off ours, on two threads 2e-6 off vmap (2 examples): the
# cause was not found. The difference of every run is in its JSON.
TOLERANCES = {"linear": 1e-3}
OTHERWISE = 1e-2
FLAGS = "--xla_cpu_multi_thread_eigen=false"
Array = Any  # a jax.Array: JAX need not be installed
Parameters = dict[str, Array]


def installed() -> bool:
    """Whether the optional peer can be imported."""
    return importlib.util.find_spec("jax_privacy") is not None


def peer(case: Case, examples: int, views: int, methods: tuple[str, ...]) -> Process:
    """A running process with JAX's non-private step and jax_privacy's clipped sum, or one of them."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    arguments = (case.name, str(examples), str(views), *methods)
    return Process("benchmarks.jax_peer", *arguments, environment=environment)


def main() -> None:
    """Compile both steps, then time one call for each line of standard input that names a method."""
    name, examples, views, *methods = sys.argv[1:]
    core = min(os.sched_getaffinity(0))  # not the least busy one: only CPU time is measured
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    import jax
    import jax_privacy  # noqa: F401  (fails here, before any work, if it is not whole)

    case = CASES[name]
    inputs, targets = case.batch(int(examples), int(views))
    model = case.model()
    steps, facts = _steps(case, model, inputs, targets, methods)
    calls = {name: functools.partial(_finished, step) for name, step in steps.items()}
    serve(calls, facts | {"jax": jax.__version__, "threads": len(os.sched_getaffinity(0))})


def _steps(
    case: Case, model: nn.Module, inputs: Tensor, targets: Tensor, methods: list[str]
) -> tuple[dict[str, Callable[[], Parameters]], dict[str, Any]]:
    """Compiled steps by name, and their compile seconds and difference from the bookkeeping engine."""
    import jax
    import jax.numpy as jnp
    from jax_privacy import clipping

    forward = FORWARDS[case.family]
    parameters = {name: jnp.asarray(_to_jax(p.detach().numpy())) for name, p in model.named_parameters()}
    examples = inputs.permute(0, 1, 3, 4, 2) if inputs.dim() == 5 else inputs
    x, y = jnp.asarray(examples.contiguous().numpy()), jnp.asarray(targets.numpy().astype(np.int32))

    def example_loss(weights: Parameters, rows: Array, label: Array) -> Array:
        """Mean cross entropy over the views (views, ...) of one example."""
        return -jax.nn.log_softmax(forward(weights, rows))[:, label].mean()

    def batch_loss(weights: Parameters, rows: Array, labels: Array) -> Array:
        """Summed cross entropy over all views: what `benchmarks.peers.non_private` computes."""
        outputs = jax.nn.log_softmax(forward(weights, rows.reshape(-1, *rows.shape[2:])))
        repeated = jnp.repeat(labels, rows.shape[1])
        return -jnp.take_along_axis(outputs, repeated[:, None], axis=1).sum()

    functions: Mapping[str, Any] = {
        BASE: jax.grad(batch_loss),
        METHOD: clipping.clipped_grad(
            example_loss, l2_clip_norm=CLIP.clip_norm, batch_argnums=(1, 2), keep_batch_dim=False
        ),
    }
    steps: dict[str, Callable[[], Parameters]] = {}
    compiling = {}
    for name in methods:
        began = time.perf_counter()
        compiled = jax.jit(functions[name]).lower(parameters, x, y).compile()
        compiling[name] = time.perf_counter() - began
        steps[name] = functools.partial(compiled, parameters, x, y)
    facts: dict[str, Any] = {"compile_seconds": compiling}
    if METHOD in steps:
        ours = clipped_sum(model, inputs, targets, cross_entropy, CLIP, Options(channels_last=False))[0]
        found = np.concatenate([_to_torch(np.asarray(g)).ravel() for g in _ordered(steps[METHOD](), model)])
        difference = float(np.linalg.norm(found - ours.numpy()) / np.linalg.norm(ours.numpy()))
        tolerance = TOLERANCES.get(case.family, OTHERWISE)
        if not difference <= tolerance:
            raise RuntimeError(
                f"{case.name}: the clipped sum of jax_privacy is {difference:.2g} from ours, relative; "
                f"at most {tolerance:g} is the same work. The JAX model no longer matches fedsim.models."
            )
        facts["relative_difference"] = difference
    return steps, facts


def _finished(step: Callable[[], Parameters]) -> None:
    import jax

    jax.block_until_ready(step())


def _ordered(gradients: Parameters, model: nn.Module) -> list[Array]:
    return [gradients[name] for name, _ in model.named_parameters()]


def _to_jax(weight: NDArray[Any]) -> NDArray[Any]:
    """Convolution kernels from (out, in, height, width) to (height, width, in, out); others as they are."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight


def _to_torch(weight: NDArray[Any]) -> NDArray[Any]:
    return weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight


# The models as functions of torch's parameter names; images are (n, height, width, channels).


def _dense(p: Parameters, name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _convolve(p: Parameters, name: str, x: Array, stride: int, padding: int) -> Array:
    """Convolution; with a gain among its parameters, one with a standardised kernel (`WSConv2d`)."""
    import jax
    import jax.numpy as jnp

    kernel = p[f"{name}.weight"]
    if f"{name}.gain" in p:
        mean = kernel.mean((0, 1, 2))
        squares = jnp.square(kernel - mean).sum((0, 1, 2))  # fan in times the population variance
        kernel = (kernel - mean) * (jax.lax.rsqrt(jnp.maximum(squares, 1e-4)) * p[f"{name}.gain"])
    around = ((padding, padding), (padding, padding))
    out = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + p[f"{name}.bias"]


def _standardise(x: Array, axes: tuple[int, ...]) -> Array:
    import jax

    return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)


def _group_norm(p: Parameters, name: str, x: Array) -> Array:
    grouped = x.reshape(*x.shape[:3], 16, -1)
    return _standardise(grouped, (1, 2, 4)).reshape(x.shape) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _layer_norm(p: Parameters, name: str, x: Array) -> Array:
    return _standardise(x, (-1,)) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(p: Parameters, x: Array) -> Array:
    """`fedsim.models.linear.Linear`."""
    return _dense(p, "head", x.reshape(len(x), -1))


def cifar_cnn(p: Parameters, x: Array) -> Array:
    """`fedsim.models.cnn.CifarCnn` with ReLU."""
    import jax

    for place in (0, 3, 6):
        x = jax.nn.relu(_convolve(p, f"features.{place}", x, 1, 1))
        n, height, width, channels = x.shape
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    x = jax.nn.relu(_convolve(p, "features.9", x, 1, 1))
    return _dense(p, "head", x.mean((1, 2)))


def wide_resnet(p: Parameters, x: Array) -> Array:
    """`fedsim.models.wide_resnet.WideResNet` with 16 groups, ReLU and standardised kernels."""
    import jax

    x = _convolve(p, "first", x, 1, 1)
    blocks = len({name.split(".")[1] for name in p if name.startswith("blocks.")})
    for place in range(blocks):
        block = f"blocks.{place}"
        active, skip, stride = jax.nn.relu(x), x, 1
        if f"{block}.skip_conv.weight" in p:
            stride = 1 if place == 0 else 2
            skip = _convolve(p, f"{block}.skip_conv", _group_norm(p, f"{block}.skip_norm", active), stride, 0)
        hidden = _convolve(p, f"{block}.conv1", _group_norm(p, f"{block}.norm1", active), stride, 1)
        hidden = _group_norm(p, f"{block}.norm2", jax.nn.relu(hidden))
        x = skip + _convolve(p, f"{block}.conv2", hidden, 1, 1)
    return _dense(p, "head", _group_norm(p, "norm", jax.nn.relu(x)).mean((1, 2)))


def vit(p: Parameters, x: Array) -> Array:
    """`fedsim.models.vit.VisionTransformer` with patches of 4 pixels and 3 heads."""
    import jax
    import jax.numpy as jnp

    n, height, width, channels = x.shape
    patches = x.reshape(n, height // 4, 4, width // 4, 4, channels).transpose(0, 1, 3, 5, 2, 4)
    x = _dense(p, "embed", patches.reshape(n, -1, channels * 16)) + p["positions"]
    places, size = x.shape[1:]
    blocks = len({name.split(".")[1] for name in p if name.startswith("blocks.")})
    for place in range(blocks):
        block = f"blocks.{place}"
        packed = _dense(p, f"{block}.query_key_value", _layer_norm(p, f"{block}.norm1", x))
        query, key, value = jnp.moveaxis(packed.reshape(n, places, 3, 3, -1), 2, 0)
        mixed = jax.nn.dot_product_attention(query, key, value).reshape(n, places, size)
        x = x + _dense(p, f"{block}.out", mixed)
        widened = jax.nn.gelu(
            _dense(p, f"{block}.widen", _layer_norm(p, f"{block}.norm2", x)), approximate=False
        )
        x = x + _dense(p, f"{block}.narrow", widened)
    return _dense(p, "head", _layer_norm(p, "norm", x).mean(1))


FORWARDS: dict[str, Callable[[Parameters, Array], Array]] = {
    "linear": linear,
    "cifar_cnn": cifar_cnn,
    "wide_resnet": wide_resnet,
    "vit": vit,
}

if __name__ == "__main__":
    main()
