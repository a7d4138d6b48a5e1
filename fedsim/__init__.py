"""fedsim: federated-style simulation of differentially private training.

    import fedsim

    run = fedsim.train("quickstart", privacy={"target_epsilon": 1.0})
    run.score, run.epsilon, run.model

`train`, `check`, `compare`, `load_run`, `predict`, `export`, `clipped_gradient_sum`, `epsilon`, `calibrate`
are what the command line does; `Data`, `Targets`, `Task` and `metric` bring examples and tasks of your own.
"""

import os
from typing import TYPE_CHECKING, Any

# Read once, when CUDA's BLAS multiplies for the first time in a process, and needed for it to repeat its bits
# (`engine.deterministic`): later is too late.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"

# strategies/ and configs/ stand at the top of a checkout, and are linked here. Flower's bundle has no links.
if not os.path.isdir(os.path.join(__path__[0], "strategies")):
    __path__.append(os.path.dirname(__path__[0]))

if TYPE_CHECKING:
    from fedsim.api import (
        calibrate as calibrate,
    )
    from fedsim.api import (
        check as check,
    )
    from fedsim.api import (
        compare as compare,
    )
    from fedsim.api import (
        epsilon as epsilon,
    )
    from fedsim.api import (
        load_run as load_run,
    )
    from fedsim.api import (
        train as train,
    )
    from fedsim.data.from_python import Data as Data
    from fedsim.data.targets import Targets as Targets
    from fedsim.exporting import export as export
    from fedsim.grads.per_example import clipped_gradient_sum as clipped_gradient_sum
    from fedsim.run import Predictions as Predictions
    from fedsim.run import Run as Run
    from fedsim.run import predict as predict
    from fedsim.tasks.base import Task as Task
    from fedsim.tasks.base import metric as metric
    from fedsim.validate import FedsimError as FedsimError
    from fedsim.validate import InputError as InputError
    from fedsim.validate import RunError as RunError

_PLACES = {
    "Data": "fedsim.data.from_python",
    "FedsimError": "fedsim.validate",
    "InputError": "fedsim.validate",
    "Predictions": "fedsim.run",
    "Run": "fedsim.run",
    "RunError": "fedsim.validate",
    "Targets": "fedsim.data.targets",
    "Task": "fedsim.tasks.base",
    "calibrate": "fedsim.api",
    "check": "fedsim.api",
    "clipped_gradient_sum": "fedsim.grads.per_example",
    "compare": "fedsim.api",
    "epsilon": "fedsim.api",
    "export": "fedsim.exporting",
    "load_run": "fedsim.api",
    "metric": "fedsim.tasks.base",
    "predict": "fedsim.run",
    "train": "fedsim.api",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    """Import what is asked for: all of it together takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
