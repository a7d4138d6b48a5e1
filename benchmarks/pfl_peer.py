"""pfl-research in the rounds benchmark: the same users, model and local work on its PyTorch backend.

Its own classes do everything: `FederatedDataset`, `FederatedAveraging`, `SimulatedBackend` in one process,
and the centrally applied Gaussian mechanism, which clips each user's update and adds noise once. Users come
in turn, so a cohort as large as the population trains each user once. Metrics are computed in the first
iteration only, which the benchmark leaves out.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.shared import SEED, TrivialClient, interleaved, medians, settings, stepper, trivial
from fedsim import seeds
from fedsim.data import examples
from fedsim.engine.collect import Collector
from fedsim.engine.experiment import Experiment, prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.engine.server import Server
from fedsim.engine.setup import setup_of
from fedsim.flower.client_app import app
from fedsim.flower.local_grid import LocalGrid
from fedsim.flower.transport import GridTransport
from fedsim.grads.flat import get_flat, set_flat
from fedsim.grads.local_training import LocalTraining, local_update

User = tuple[Tensor, Tensor]  # inputs (n, ...) float32 and labels (n,) int64 of one user
NEVER = 10**9
EXAMPLES_A_USER = 4
LOCAL_RATE = 0.1
CLIP_NORM = 0.1


def installed() -> bool:
    """Whether the optional peer can be imported."""
    return importlib.util.find_spec("pfl") is not None


class _Trained(nn.Module):
    """A model with the two methods that pfl-research asks of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of one local step."""
        return F.cross_entropy(self.model(inputs), targets)

    @torch.no_grad()
    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """What its evaluation reports."""
        from pfl.metrics import Weighted

        loss = F.cross_entropy(self.model(inputs), targets, reduction="sum")
        return {"loss": Weighted(loss.item(), len(targets))}


class Simulation:
    """One population on pfl-research, every user of which takes part in every central iteration.

    Attributes:
        iterate: makes one central iteration: all users, sum, clipping and noise as set, server update.
        gather: only the sum over the users, without the server update; (P,) in `named_parameters` order.
    """

    def __init__(
        self,
        model: nn.Module,
        users: list[User],
        *,
        local_learning_rate: float,
        clip_norm: float,
        noise_multiplier: float | None,
        trivial: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Set up.

        Args:
            model: starts the population; changed by `iterate`.
            users: data of each.
            local_learning_rate: of the one local step over all examples of a user.
            clip_norm: L2 bound on a user's update.
            noise_multiplier: noise over clip norm; None: neither clipping nor noise.
            trivial: in place of local training, what a user sends for each parameter.
        """
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.data.dataset import Dataset
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.data.sampling import get_user_sampler
        from pfl.hyperparam.base import NNTrainHyperParams
        from pfl.metrics import Metrics
        from pfl.model.pytorch import PyTorchModel
        from pfl.privacy.gaussian_mechanism import GaussianMechanism
        from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
        from pfl.stats import MappedVectorStatistics

        class Trivial(FederatedAveraging):
            """Users that send a function of the parameters: what is left is overhead."""

            def simulate_one_user(self, model: Any, user_dataset: Any, central_context: Any) -> Any:
                assert trivial is not None
                sent = {name: trivial(value.data) for name, value in model.variable_map.items()}
                return MappedVectorStatistics(sent), Metrics()

        postprocessors = []
        if noise_multiplier is not None:
            postprocessors = [
                CentrallyAppliedPrivacyMechanism(GaussianMechanism(clip_norm, noise_multiplier))
            ]
        data = FederatedDataset(
            lambda user: Dataset(list(users[user]), user_id=str(user)),
            get_user_sampler("minimize_reuse", list(range(len(users)))),
        )
        self._backend = SimulatedBackend(data, data, postprocessors=postprocessors)
        trained = _Trained(model)
        self._model = PyTorchModel(trained, torch.optim.SGD, torch.optim.SGD(trained.parameters(), lr=1.0))
        self._algorithm = FederatedAveraging() if trivial is None else Trivial()
        self._train = NNTrainHyperParams(
            local_batch_size=None, local_num_epochs=1, local_learning_rate=local_learning_rate
        )
        self._parameters: Callable[[int], Any] = lambda iterations: NNAlgorithmParams(
            central_num_iterations=iterations,
            evaluation_frequency=NEVER,
            train_cohort_size=len(users),
            val_cohort_size=None,
        )
        self._iterations = 0
        self._loop = asyncio.new_event_loop()

    def iterate(self) -> None:
        """Make one central iteration."""
        self._iterations += 1
        asyncio.set_event_loop(self._loop)  # pfl-research asks for the current one
        self._algorithm.run(
            self._parameters(self._iterations),
            self._backend,
            self._model,
            self._train,
            send_metrics_to_platform=False,
        )

    def gather(self) -> NDArray[np.float32]:
        """Return the sum of what all users send, (P,)."""
        (context,), _, _ = self._algorithm.get_next_central_contexts(
            self._model, self._iterations + 1, self._parameters(NEVER), self._train
        )
        found, _ = self._loop.run_until_complete(
            self._backend.async_gather_results(self._model, self._algorithm, central_context=context)
        )
        return np.concatenate([found[name].numpy().ravel() for name in self._model.variable_map])


def measure(steps: int) -> dict[str, Any]:
    """pfl-research beside the local engine: trivial users, and DP-FedAvg with one local step a user.

    The same users, start and work in all: the sums over users are compared before anything is timed. Trivial
    rows end at that sum; the others are whole iterations with user clipping, noise and server update, but for
    the plain loop, which is training, clipping and the sum.
    """
    out: dict[str, Any] = {}
    for holders in (100, 1_000):
        config = settings(
            holders, 1, "model.name=cifar_cnn", "preset=dp_fedavg", "optimizer.learning_rate=1.0",
            f"query.options={{local_batch_size: {EXAMPLES_A_USER}, local_learning_rate: {LOCAL_RATE}}}",
            f"data.train_examples={EXAMPLES_A_USER * holders}", f"privacy.clip_norm={CLIP_NORM}",
            f"train.expected_batch_size={EXAMPLES_A_USER * holders}", f"train.steps={steps + 2}",
        )  # fmt: skip
        repeats = steps if holders == 100 else max(3, steps // 4)
        trivials = _trivial_users(prepare(settings(holders, 1, "model.name=cifar_cnn")))
        _same_work(trivials)
        out[f"trivial users, cifar_cnn, {holders} users"] = _against_loop(trivials, repeats)
        with tempfile.TemporaryDirectory() as folder:
            sums, iterations = _training_users(prepare(config), Path(folder) / "run")
            _same_work(sums)
            row = _against_loop(iterations, repeats)
        out[f"one local step a user, cifar_cnn, {holders} users"] = row
    return out


def _against_loop(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    raw = interleaved(calls, repeats)
    row = medians(raw)
    return {
        "seconds": row,
        "ratio_to_plain_loop": {name: value / row["plain loop"] for name, value in row.items()},
        "raw": raw,
    }


def _users(experiment: Experiment) -> list[tuple[Tensor, Tensor]]:
    """Return every holder's inputs and labels."""
    train, owner = experiment.splits.train, experiment.partition.holder_of
    rows = [np.flatnonzero(owner == holder) for holder in range(experiment.config.federation.holders)]
    return [(examples.normalise(train.inputs[r], train), torch.from_numpy(train.targets[r])) for r in rows]


def _simulation(experiment: Experiment, **options: Any) -> Simulation:
    """Return pfl-research with the experiment's holders as users and a copy of its model."""
    model = copy.deepcopy(experiment.model)
    return Simulation(
        model, _users(experiment), local_learning_rate=LOCAL_RATE, clip_norm=CLIP_NORM, **options
    )


def _same_work(calls: Mapping[str, Callable[[], NDArray[Any]]]) -> None:
    """Refuse to time methods whose sums over users differ by more than rounding."""
    sums = {name: call() for name, call in calls.items()}
    first = sums["plain loop"]
    for name, found in sums.items():
        difference = float(np.linalg.norm(found - first) / np.linalg.norm(first))
        if not difference <= 1e-3:
            raise RuntimeError(f"{name}: its sum over users differs by {difference:.2g}: not the same work")


def _collector(experiment: Experiment, client: Any) -> Callable[[], NDArray[Any]]:
    """Return a call that collects the sum over the holders of one node from `client`."""
    transport = GridTransport(LocalGrid(client, 1), setup_of(experiment.config), 1)
    transport.connect()
    collector = Collector(experiment, transport, "")
    parameters = get_flat(experiment.model).numpy()

    def collect() -> NDArray[Any]:
        mechanism = experiment.mechanism
        release = mechanism.release()
        keys = mechanism.method.keys(seeds.derive(SEED, "run"), 0)
        collector.begin(0, keys, parameters, release)
        return mechanism.collect(release, {}, collector.ask).sums["sum"]

    return collect


def _trivial_users(experiment: Experiment) -> dict[str, Callable[[], NDArray[Any]]]:
    """One vector operation a user, no clipping, no noise; `TrivialClient` answers for our node."""
    parameters = get_flat(experiment.model).numpy()
    scale = 1e-3 / float(np.abs(parameters).sum())
    holders = experiment.config.federation.holders
    simulation = _simulation(experiment, noise_multiplier=None, trivial=lambda value: value * scale)
    return {
        "plain loop": lambda: trivial(parameters, holders),
        "fedsim local": _collector(experiment, TrivialClient(experiment)),
        "pfl-research": simulation.gather,
    }


def _training_users(
    experiment: Experiment, folder: Path
) -> tuple[dict[str, Callable[[], NDArray[Any]]], dict[str, Callable[[], Any]]]:
    """One local step a user: the noiseless sums to compare, and the iterations to time."""
    users = _users(experiment)
    model = copy.deepcopy(experiment.model)
    start, how = get_flat(model), LocalTraining(1, EXAMPLES_A_USER, LOCAL_RATE)

    def plain() -> NDArray[Any]:
        total = torch.zeros_like(start)
        for holder, (inputs, targets) in enumerate(users):
            update, _ = local_update(model, inputs, targets, how, np.random.default_rng(holder))
            total += update * min(1.0, CLIP_NORM / float(update.norm()))
            set_flat(model, start)
        return total.numpy()

    ours = _collector(experiment, app)
    transport = GridTransport(LocalGrid(app, 1), setup_of(experiment.config), 1)
    transport.connect()
    server = Server(experiment, RunFolder(folder), transport, False)
    # Clipping without noise, for the comparison; pfl-research sends end minus start, a step upwards.
    silent = _simulation(experiment, noise_multiplier=0.0)
    sums = {"plain loop": plain, "fedsim local": ours, "pfl-research": lambda: -silent.gather()}
    iterations = {
        "plain loop": plain,
        "fedsim local": stepper(server),
        "pfl-research": _simulation(experiment, noise_multiplier=1.0).iterate,
    }
    return sums, iterations
