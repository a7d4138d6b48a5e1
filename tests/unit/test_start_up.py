"""What a command imports: a library that it does not need would be most of its time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SHOW = """
import contextlib, io, sys
from fedsim.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    try:
        code = main(sys.argv[1:])
    except SystemExit as exit:
        code = exit.code
print("\\n".join(sys.modules))
sys.exit(code)
"""
EPSILON = "epsilon --noise-multiplier 1 --sampling-rate 0.01 --steps 100 --delta 1e-5"


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        ("--help", ("numpy", "torch", "flwr", "omegaconf", "scipy")),
        (EPSILON, ("torch", "flwr", "omegaconf", "rich")),
        (
            "check quickstart",
            (
                "torch._dynamo",
                "torch._inductor",
                "torch.fx.experimental.symbolic_shapes",
                "sympy",
                "triton",
                "tensorboard",
                "torch.utils.tensorboard",
                "flwr",
                "ray",
                "matplotlib",
                "opacus",
                "torchvision",
                # variants that are not chosen, what they need, and what computes gradients
                "fedsim.strategies.shares",
                "fedsim.strategies.local",
                "fedsim.secure_sum",
                "fedsim.heads",
                "fedsim.learners.least_squares",
                "fedsim.noise.banded",
                "fedsim.privacy.discrete",
                "fedsim.grads.bookkeeping.engine",
            ),
        ),
    ],
    ids=["help", "epsilon", "check"],
)
def test_a_command_imports_nothing_it_does_not_need(arguments: str, unneeded: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHOW, *arguments.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert set(unneeded).isdisjoint(done.stdout.split())
