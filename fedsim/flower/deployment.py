"""Where a run executes, and what is different outside a simulation.

`local`: this process's own grid. `simulation`: Flower's simulation runtime, whose nodes are processes of one
machine. `deployment`: SuperLink and SuperNodes, and whatever is not known to be one of the other two.

In a simulation one person holds all data and may know everything: draws and noise may follow from a seed
that stands in the configuration. In a deployment the nodes are others. Noise that whoever knows the seed can
remove, and keys of holders that the server made for them, protect nobody there: both are refused. And nothing
sensitive is written unless it is asked for.
"""

from __future__ import annotations

import dataclasses

from flwr.serverapp import Grid

from fedsim import validate
from fedsim.config import Config
from fedsim.flower.local_grid import LocalGrid
from fedsim.merging import Choice
from fedsim.strategies import STRATEGIES

LOCAL, SIMULATION, DEPLOYMENT = "local", "simulation", "deployment"


def backend_of(grid: Grid) -> str:
    """Return where a ServerApp with this grid runs."""
    if isinstance(grid, LocalGrid):
        return LOCAL
    from flwr.superlink.grid import InMemoryGrid  # two seconds of imports, there already where it can be one

    return SIMULATION if isinstance(grid, InMemoryGrid) else DEPLOYMENT


def settled(config: Config, backend: str) -> Config:
    """Return the configuration with what it leaves to the backend: `monitor.public_only`.

    Raises:
        InputError: settings that protect nobody in a deployment; says which and what to set instead.
    """
    deployed = backend == DEPLOYMENT
    if deployed and config.privacy.noise_source == "seeded":
        validate.conflicts(
            "privacy.noise_source=seeded is for simulation: in a deployment whoever knows the seed can "
            "compute the noise and remove it.",
            "Set privacy.noise_source=secure.",
        )
    chosen = Choice(config.strategy.name, config.strategy.options)
    if deployed and STRATEGIES.make(chosen).simulates_secrets:
        validate.conflicts(
            f"strategy={config.strategy.name} is for simulation: the holders' keys come from the "
            "server, which could remove their noise in a deployment.",
            "Use a trust model in which the server adds the noise, such as central.",
        )
    if config.monitor.public_only is not None:
        return config
    return dataclasses.replace(config, monitor=dataclasses.replace(config.monitor, public_only=deployed))
