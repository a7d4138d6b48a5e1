"""What nodes build themselves from, and the node that follows: the same in every process, or refused."""

from __future__ import annotations

import dataclasses
import functools
import json

from fedsim import given, loading, references, seeds
from fedsim.config import Config
from fedsim.data import examples, partition
from fedsim.engine.holder import Node
from fedsim.validate import InputError

_GRANTED = ("partition", "model")


def setup_of(
    config: Config, held: partition.Partition | None = None, train: examples.ArrayDataset | None = None
) -> str:
    """Return what nodes build themselves from, as JSON: the configuration without its seed, and the keys of
    the partition and the initial model. Draws and noise follow from another key of the seed, or not from it.

    Args:
        config: of the run.
        held: the server's partition; a node that finds another one refuses to answer.
        train: the server's examples, which are compared too where their source is from outside.
    """
    body = json.loads(config.to_json())
    seed = body.pop("seed")
    keys = {purpose: seeds.derive(seed, purpose).hex() for purpose in _GRANTED}
    outside = references.is_reference(config.data.name) and not given.is_given(config.data.name)
    found = {
        "partition": None if held is None else held.digest(),
        "data": train.digest() if train is not None and outside else None,
    }
    return json.dumps({"config": body, "keys": keys, **found}, sort_keys=True)


def public_only(setup: str) -> bool:
    """Say whether nothing sensitive may be written, from what `setup_of` says."""
    return bool(json.loads(setup)["config"]["monitor"]["public_only"])


@functools.lru_cache(maxsize=8)
def node_for(setup: str, index: int) -> Node:
    """Return the node for what `setup_of` says, built once per process.

    Raises:
        InputError: the configuration is wrong here, or the node finds another partition, or other examples,
            than the server.
    """
    config, keys = _sent(setup)
    node = Node(config, index, seeds.Granted(keys))
    sent = json.loads(setup)
    if sent["data"] not in (None, node.train.digest() if sent["data"] else None):
        raise InputError(
            f"data.name={config.data.name} must give the same examples in every process, but a node finds "
            "others than the server. Let them follow from files, or from a fixed seed."
        )
    if sent["partition"] not in (None, node.partition.digest()):
        raise InputError(
            f"federation.partition={config.federation.partition.name} must give one partition in every "
            "process, but a node finds another one than the server: an example could be at two holders. Draw "
            "from the generator it is given, and from nothing else; have the same data everywhere."
        )
    return node


def forget_nodes() -> None:
    """Let every node of this process be built anew."""
    node_for.cache_clear()


@functools.lru_cache(maxsize=8)
def _sent(setup: str) -> tuple[Config, dict[str, bytes]]:
    """Return the configuration and the keys that `setup_of` says, read once for all nodes of a process."""
    sent = json.loads(setup)
    config = loading.from_json(json.dumps(sent["config"]))
    references.check_allowed(config.references())
    keys = {purpose: bytes.fromhex(key) for purpose, key in sent["keys"].items()}
    return dataclasses.replace(config, seed=seeds.WITHHELD), keys
