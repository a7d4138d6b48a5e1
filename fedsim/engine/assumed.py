"""What a run takes as public: its epsilons say nothing of what could be learned from that."""

from __future__ import annotations

from fedsim import given
from fedsim.config import Config
from fedsim.data.sources import SOURCES, Source
from fedsim.data.targets import Targets
from fedsim.merging import Choice


def assumed_public(config: Config, declared: Targets, vocabulary: int | None = None) -> list[str]:
    """Return what is taken as public, in words, as far as it concerns this configuration.

    Args:
        config: of the run.
        declared: form of its targets.
        vocabulary: number of tokens there can be in its inputs, or None.
    """
    found = ["the number of training examples that are used, and of holders"]
    if config.federation.examples_per_holder_at_most is not None:
        found.append("which of its example slots a holder above federation.examples_per_holder_at_most uses")
    if not config.data.holdout_examples:
        found.append("the test split, by which released models are judged")
    names = ", with their names" if declared.names else ""
    found.append(f"the form of the targets, as declared or listed: {declared.said}{names}")
    if vocabulary is not None:
        found.append(f"the vocabulary of {vocabulary} tokens")
    found += _of_source(config)
    if config.data.features is not None:
        found.append(f"the feature map {config.data.features.name}, and what it was made from")
    started = config.model.options
    if config.model.init_from is not None or started.get("pretrained") or started.get("path"):
        found.append("the weights that training starts from, and what they were trained on")
    if given.is_given(config.model.name):
        found.append("the weights that the module from Python came with")
    return found


def _of_source(config: Config) -> tuple[str, ...]:
    """What the source itself declares; of data that a function or Python brought, nothing is known."""
    name = config.data.name
    found = None if given.is_given(name) else SOURCES.find(name)
    if not (isinstance(found, type) and issubclass(found, Source)):
        return ()
    return SOURCES.make(Choice(name, config.data.options)).assumed_public()
