"""What a run carries from step to step: parameters, and the states of learner, query and noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedsim.engine import checkpoint
from fedsim.engine.experiment import Experiment
from fedsim.engine.run_folder import RunFolder
from fedsim.grads.flat import get_flat, spec
from fedsim.noise.stream import Stream
from fedsim.validate import InputError


class State:
    """The state after `completed` updates. A new one is that of the experiment's initial model.

    Attributes:
        completed: updates made.
        parameters: (P,) in the model's dtype.
        learning: the learner at work, with its own state.
        query: what the query carries.
        stream: what correlated noise remembers; it saves time, and decides nothing.
        differing: steps that were repeated on the way here and gave other bits than at first.
    """

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        self._noise_is_kept = config.privacy.noise_source != "secure"
        self.query = experiment.mechanism.method.at.query.state(config)
        self.stream = Stream()
        self.completed = 0
        self.differing: list[int] = []
        self.parameters = get_flat(experiment.model).clone()
        method = experiment.mechanism.method
        layout, examples = spec(experiment.model), experiment.facts.examples
        self.learning = method.learner.start(config, method.at.query, layout, examples)
        self.learning.init(self.parameters)

    def released(self) -> Tensor:
        """Return the parameters (P,) a run releases here: their average where it is on."""
        average = self.learning.average()
        return self.parameters if average is None else average

    def save(self, folder: RunFolder, bound_to: Mapping[str, Any]) -> None:
        """Write a checkpoint that carries `bound_to`, the run it is of."""
        tensors = {"parameters": self.parameters}
        state, numbers = self.learning.state_dict()
        tensors |= {f"learner.{name}": value for name, value in state.items()}
        tensors |= {f"query.{name}": value for name, value in self.query.items()}
        if self._noise_is_kept:  # a checkpoint must not hold noise that is to stay secret: it is made again
            tensors |= {f"noise.{name}": value for name, value in self.stream.state_dict().items()}
        meta = {**bound_to, "learner": numbers, "differing": self.differing}
        checkpoint.save(folder.checkpoints, self.completed, tensors, meta)

    def restore(self, folder: RunFolder, bound_to: Mapping[str, Any]) -> None:
        """Go to the newest checkpoint of the folder; without one, stay at the start.

        Raises:
            InputError: it is damaged, or was not written with the same `bound_to`.
        """
        path = checkpoint.latest(folder.checkpoints)
        if path is None:
            return
        step, tensors, state = checkpoint.load(path)
        if {name: state.get(name) for name in bound_to} != dict(bound_to):
            raise InputError(f"checkpoint {path} belongs to another run. Choose another --out.")
        self.parameters = tensors.pop("parameters")
        parts: dict[str, dict[str, Tensor]] = {"learner": {}, "query": {}, "noise": {}}
        for name, value in tensors.items():
            part, key = name.split(".", 1)
            parts[part][key] = value
        self.learning.load_state_dict(parts["learner"], state["learner"])
        self.query = parts["query"]
        self.stream.load_state_dict(parts["noise"])
        self.differing = list(state["differing"])
        self.completed = step
