"""fedsim: federated-style simulation of differentially private training."""

import os

# Read once, when CUDA's BLAS multiplies for the first time in a process, and needed for it to repeat its bits
# (`engine.deterministic`): later is too late.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"

# strategies/ and configs/ stand at the top of a checkout, and are linked here. Flower's bundle has no links.
if not os.path.isdir(os.path.join(__path__[0], "strategies")):
    __path__.append(os.path.dirname(__path__[0]))
