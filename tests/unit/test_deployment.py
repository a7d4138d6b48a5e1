"""What is different outside a simulation, and what nodes are sent: never what the noise follows from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid, InMemoryGrid

from fedsim import seeds
from fedsim.config import Config
from fedsim.engine import holder, setup
from fedsim.engine.experiment import prepare
from fedsim.engine.run_folder import RunFolder
from fedsim.flower import deployment
from fedsim.flower.client_app import app
from fedsim.flower.local_grid import LocalGrid
from fedsim.flower.server_app import train as train_on
from fedsim.method import Method
from fedsim.strategies.local import Local
from fedsim.validate import InputError
from tests.conftest import small, train
from tests.strategies import methods

SEED = 7402938475610293
SECURE = "privacy.noise_source=secure"


class RemoteGrid(Grid):
    """A grid that is neither ours nor that of Flower's simulation, as a deployment's is."""

    def __init__(self, nodes: int) -> None:
        self._nodes = LocalGrid(app, nodes)
        self.asked = 0

    def set_run(self, run: Any) -> None:
        self._nodes.set_run(run)

    @property
    def run(self) -> Any:
        return self._nodes.run

    def create_message(self, *arguments: Any, **more: Any) -> Message:
        return self._nodes.create_message(*arguments, **more)

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.asked += 1
        return self._nodes.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._nodes.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def deploy(config: Config, out: Path) -> tuple[dict[str, Any], RemoteGrid]:
    """Train over a deployment's grid."""
    grid = RemoteGrid(config.federation.nodes)
    return train_on(grid, prepare(config), RunFolder(out), False), grid


def test_backends_are_told_by_the_grid_and_what_is_unknown_is_a_deployment() -> None:
    assert deployment.backend_of(LocalGrid(app, 1)) == "local"
    assert deployment.backend_of(InMemoryGrid.__new__(InMemoryGrid)) == "simulation"
    assert deployment.backend_of(HttpGrid.__new__(HttpGrid)) == "deployment"
    assert deployment.backend_of(RemoteGrid(1)) == "deployment"


def test_seeded_noise_is_refused_before_a_node_is_asked(tmp_path: Path) -> None:
    grid = RemoteGrid(2)
    with pytest.raises(InputError, match=r"Set privacy\.noise_source=secure"):
        train_on(grid, prepare(small()), RunFolder(tmp_path / "run"), False)
    assert grid.asked == 0
    assert not (tmp_path / "run").exists()
    for backend in ("local", "simulation"):
        assert deployment.settled(small(), backend).privacy.noise_source == "seeded"


@pytest.mark.parametrize("name", methods.ALL)
def test_strategies_whose_holders_keys_come_from_the_server_are_refused(name: str) -> None:
    """Who makes a holder's noise key can remove its noise; the key "holders" of a step shows who does."""
    noise = ["privacy.noise_multiplier=null", "privacy.clip_norm=1.0"] if name == "nonprivate" else []
    config = small(SECURE, f"preset={name}", *noise)
    gives_away = "holders" in Method.of(config).keys(b"r" * 32, 0)
    assert gives_away == (name in ("local_dpsgd", "shares_dpsgd"))
    if gives_away:
        with pytest.raises(InputError, match="is for simulation"):
            deployment.settled(config, "deployment")
    else:
        deployment.settled(config, "deployment")
    deployment.settled(config, "simulation")


def a_trust_model() -> Local:
    return Local()


def test_a_trust_model_that_a_function_makes_is_refused_as_well() -> None:
    config = small(SECURE, f"strategy.name={__name__}:a_trust_model")
    with pytest.raises(InputError, match="is for simulation"):
        deployment.settled(config, "deployment")
    deployment.settled(config, "simulation")


def test_a_deployment_writes_public_numbers_only_unless_asked(tmp_path: Path) -> None:
    result, _ = deploy(small(SECURE, "train.steps=2"), tmp_path / "default")
    assert result["public_only"]
    assert "seconds" not in result
    for line in (tmp_path / "default" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["sensitive"] == {}
    asked, _ = deploy(small(SECURE, "train.steps=2", "monitor.public_only=false"), tmp_path / "asked")
    assert asked["seconds"] > 0
    assert train(small("train.steps=2"), tmp_path / "local")["seconds"] > 0


def sent(name: str, out: Path, *overrides: str) -> list[bytes]:
    """Return every record of every message a run sends, as bytes."""
    noise = ["privacy.noise_multiplier=null", "privacy.clip_norm=1.0"] if name == "nonprivate" else []
    held: list[bytes] = []

    def client(message: Message, context: Any) -> Message:
        for record in message.content.config_records.values():
            held.extend(str(value).encode() for value in record.values())
        for arrays in message.content.array_records.values():
            held.extend(array.data for array in arrays.values())
        return app(message, context)

    train(
        small(f"preset={name}", f"seed={SEED}", "train.steps=2", *noise, *overrides),
        out,
        client=client,
    )
    return held


@pytest.mark.parametrize("name", methods.ALL)
def test_no_message_holds_the_seed_or_what_server_noise_follows_from(name: str, tmp_path: Path) -> None:
    root = seeds.derive(SEED, "run")
    secrets = [
        str(SEED).encode(),
        f"{SEED:x}".encode(),
        SEED.to_bytes(8, "little"),
        root.hex().encode(),
        root,
    ]
    for step in range(2):
        for purpose in ("noise", "quantile", "top up"):
            for ids in ((step,), (step, 0), (step, 1)):
                key = seeds.derive(root, purpose, *ids)
                secrets += [key, key.hex().encode()]
    content = b"\n".join(sent(name, tmp_path))
    assert b"partition" in content, "the keys of a node's own work are there"
    for secret in secrets:
        assert secret not in content


def test_a_node_cannot_read_the_seed_and_makes_the_same_data_and_model() -> None:
    config = small(f"seed={SEED}")
    node = setup.node_for(setup.setup_of(config), 0)
    whole = holder.Node(config, 0, config.seed)
    assert (node.ids == whole.ids).all()
    for a, b in zip(node.model.parameters(), whole.model.parameters(), strict=True):
        assert (a == b).all()
    with pytest.raises(InputError, match="seed"):
        seeds.derive(node.config.seed, "run")
    granted = seeds.Granted({"partition": b"p" * 32})
    assert seeds.derive(granted, "partition") == b"p" * 32
    for purpose, ids in (("run", ()), ("partition", (1,))):
        with pytest.raises(InputError, match="no key was granted"):
            seeds.derive(granted, purpose, *ids)
