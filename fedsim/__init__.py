"""fedsim: federated-style simulation of differentially private training."""

import os

# Read once, when CUDA's BLAS multiplies for the first time in a process, and needed for it to repeat its bits
# (`engine.deterministic`): later is too late.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"
