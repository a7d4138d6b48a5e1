"""pfl-research in the rounds benchmark: the same users, model and local work on its PyTorch backend.

Its own classes do everything: `FederatedDataset`, `FederatedAveraging`, `SimulatedBackend` in one process,
and the centrally applied Gaussian mechanism, which clips each user's update and adds noise once. Users come
in turn, so a cohort as large as the population trains each user once. Metrics are computed in the first
iteration only, which the benchmark leaves out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

User = tuple[NDArray[Any], NDArray[Any]]  # inputs (n, ...) float32 and labels (n,) int64 of one user
NEVER = 10**9


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
        return F.cross_entropy(self.model(inputs), targets.long())

    @torch.no_grad()
    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """What its evaluation reports."""
        from pfl.metrics import Weighted

        loss = F.cross_entropy(self.model(inputs), targets.long(), reduction="sum")
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

        class Trivial(FederatedAveraging):  # type: ignore[misc]
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
        tensors = [(torch.from_numpy(inputs), torch.from_numpy(labels)) for inputs, labels in users]
        data = FederatedDataset(
            lambda user: Dataset(list(tensors[user]), user_id=str(user)),
            get_user_sampler("minimize_reuse", list(range(len(users)))),
        )
        self._backend = SimulatedBackend(data, data, postprocessors=postprocessors)
        trained = _Trained(model)
        self._model = PyTorchModel(
            trained, torch.optim.SGD, torch.optim.SGD(trained.parameters(), lr=1.0)
        )
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

    def iterate(self) -> None:
        """Make one central iteration."""
        self._iterations += 1
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
        found, _ = self._backend.gather_results(self._model, self._algorithm, central_context=context)
        return np.concatenate([found[name].numpy().ravel() for name in self._model.variable_map])
