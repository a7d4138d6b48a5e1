"""The configuration of a run: a typed schema, with its defaults.

Defaults live here; configs/base.yaml shows them with comments and a test keeps the two equal. Files and
overrides become a `Config` in `fedsim.loading`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim import presets, references
from fedsim.merging import Choice, choices
from fedsim.rules import SET, read_with

_HERE = Path(__file__).resolve().parent
CONFIG_DIR = (_HERE if (_HERE / "configs").is_dir() else _HERE.parent).joinpath("configs").resolve()
"""The named configurations; beside this package in a copy of the checkout without its links."""

FREE = (
    "extends",
    "preset",
    "title",
    "reference",
    "engine",
    "monitor",
    "data.root",
    "federation.nodes",
    "federation.nodes_per_wave",
    "train.eval_every",
    "train.checkpoint_every",
)
"""Settings and sections that do not define a run's result: they may change when it is resumed."""


@dataclass(frozen=True)
class DataConfig:
    name: str = "fashion_mnist_subset"
    options: dict[str, Any] = field(default_factory=dict)
    root: str | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    holdout_examples: int = 0
    features: Choice | None = None

    @property
    def judged_by(self) -> str:
        """What released models are judged by: "test" data, or "held-out" training examples."""
        return "held-out" if self.holdout_examples else "test"


@dataclass(frozen=True)
class ModelConfig:
    name: str = "small_cnn"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    init_from: str | None = None
    init_sha256: str | None = field(default=None, metadata=read_with(init_from=SET))
    reset: list[str] = field(default_factory=list, metadata=read_with(init_from=SET))
    freeze: list[str] = field(default_factory=list)
    fix: bool = False


@dataclass(frozen=True)
class FederationConfig:
    holders: int = 100
    nodes: int = 2
    partition: Choice = field(default_factory=lambda: Choice("dirichlet"))
    examples_per_holder_at_most: int | None = None
    nodes_per_wave: int | None = None
    availability: float = 1.0


@dataclass(frozen=True)
class StrategyConfig:
    name: str = "central"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PrivacyConfig:
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    stop_at_epsilon: float | None = field(default=None, metadata=read_with(noise_multiplier=SET))
    delta: float = 1e-5
    accountant: str = "pld"
    clip_norm: float = 1.0
    clipping: Choice = field(default_factory=lambda: Choice("flat"))
    noise_source: str = "seeded"


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    expected_batch_size: float = 1024.0
    augment_multiplicity: int = field(default=1, metadata=read_with(augmentations=SET))
    augmentations: list[str] = field(default_factory=list)
    imitated_batch_size: float | None = None
    ema_decay: float = 0.0
    eval_every: int = 10
    checkpoint_every: int = 10


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1.0
    scale_with_batch: float | None = None
    weight_decay: float = 0.0
    schedule: Choice = field(default_factory=lambda: Choice("constant"))
    warmup_steps: int = 0
    warmup_epochs: float | None = None


@dataclass(frozen=True)
class EngineConfig:
    """Speed and memory. Nothing here changes a result beyond float rounding, nor `Config.digest`.

    Attributes:
        gradients: bookkeeping, vmap or opacus.
        physical_batch_size: views through the model at once, or "auto": chosen by a short probe before the
            first step (`fedsim.engine.probe`). The choice depends on a clock, and the size on the order in
            which numbers are added: for equal bits the chosen number is kept in the run folder's
            configuration, from which a resumed run takes it; give a number to repeat a run elsewhere.
        memory_limit: what a physical batch may take on one node: bytes, "8GB", or a share of what is free
            (a fraction up to 1.0). For "auto" only; null is half of what is free, divided by the nodes that
            compute there at once.
        gradient_memory: of the bookkeeping engine: memory for per-example gradients kept to the end of a call
            to save forming them twice. "full" (2 GiB on the CPU, an eighth of a CUDA device), "low" (none),
            bytes, or "512MB".
        precision: of the bookkeeping engine, forward and backward: float32; tf32 or bfloat16 on CUDA, faster
            and less exact (norms and sums are accumulated in float32 or wider in all of them).
        channels_last: of the bookkeeping engine, layout of images: auto (where it was measured to help), on
            or off (YAML's true and false).
        cuda_graphs: of the bookkeeping engine on CUDA: record what a physical batch launches, and replay it.
            For steps that wait for Python; the model's own code must do the same in every call.
        device: auto, cpu, cuda or cuda:N. Auto takes CUDA where there is one, for node i number i modulo the
            number of devices its process sees.
        deterministic: on CUDA, take only kernels that give the same bits again. Where it is off a step that
            is repeated, after an interruption or for a node that failed, equals the first to rounding only,
            and the trust model `shares` refuses to run. The CPU always repeats its bits.
        threads: torch threads of a process; None for one if the model has less than 100 000 parameters, and
            for all cores otherwise.
        decode_threads: threads of a process that decode pictures which are read on demand, one physical batch
            ahead of the one in use; None: one a core.
        cpus_per_node, gpus_per_node: what Flower's simulation reserves for a node.

    Per-holder sums (under `shares`) are taken by the vmap engine in any case, and local training by ordinary
    gradients; the bookkeeping engine's settings do not reach those. There is no setting for `torch.compile`:
    see `fedsim.grads.bookkeeping.Options`.
    """

    gradients: str = "bookkeeping"
    physical_batch_size: int | str = 256
    memory_limit: int | float | str | None = field(
        default=None, metadata=read_with(physical_batch_size=("auto",))
    )
    gradient_memory: int | str = field(default="full", metadata=read_with(gradients=("bookkeeping",)))
    precision: str = field(default="float32", metadata=read_with(gradients=("bookkeeping",)))
    channels_last: bool | str = field(default="auto", metadata=read_with(gradients=("bookkeeping",)))
    cuda_graphs: bool = field(default=False, metadata=read_with(gradients=("bookkeeping",)))
    device: str = "auto"
    deterministic: bool = True
    threads: int | None = None
    decode_threads: int | None = None
    cpus_per_node: int = 1
    gpus_per_node: float = 0.0


@dataclass(frozen=True)
class TuningConfig:
    """How settings were chosen among others. `fedsim tune` writes it; every result shows it.

    Attributes:
        mode: "free": the search looked at private examples and is counted nowhere, as in most of the
            literature. "private": the run is the best of a hidden random number of equally private ones, and
            epsilon is that of choosing it (`fedsim.privacy.events.Selection`). Null: nothing is known.
        trials: settings tried; private: the mean of their number.
        held_out_examples: training examples they were judged by.
        distribution: of the number of trials.
    """

    mode: str | None = None
    trials: float | None = field(default=None, metadata=read_with(mode=SET))
    held_out_examples: int = field(default=0, metadata=read_with(mode=SET))
    distribution: str = field(default="geometric", metadata=read_with(mode=("private",)))


@dataclass(frozen=True)
class MonitorConfig:
    tensorboard: bool = True
    progress: bool = True
    writers: list[Any] = field(default_factory=list)
    public_only: bool | None = None


@dataclass(frozen=True)
class Config:
    """Everything that defines a run, and the settings in FREE, which never change its result."""

    extends: str | None = None
    preset: str | None = None
    title: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    task: Choice = field(default_factory=lambda: Choice("classification"))
    model: ModelConfig = field(default_factory=ModelConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    query: Choice = field(default_factory=lambda: Choice("gradient"))
    sampler: Choice = field(default_factory=lambda: Choice("poisson"))
    noise: Choice = field(default_factory=lambda: Choice("independent"))
    learner: Choice | None = None
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    reference: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the configuration as canonical JSON (sorted keys)."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def defining(self) -> dict[str, Any]:
        """Return what defines the result, as nested mappings: all but FREE."""
        body = dataclasses.asdict(self)
        for path in FREE:
            *sections, key = path.split(".")
            node = body
            for section in sections:
                node = node[section]
            del node[key]
        return body

    def references(self) -> tuple[str, ...]:
        """Return what is named that fedsim does not bring (`fedsim.references`)."""
        chosen = (_at(self, path) for path in choices(Config))
        names = [choice.name for choice in chosen if choice is not None]
        listed = [*self.train.augmentations, *self.monitor.writers]
        names += [entry.get("name") if isinstance(entry, dict) else entry for entry in listed]
        names += [self.privacy.accountant, *(self.task.options.get("metrics") or ())]
        named = (name for name in names if isinstance(name, str) and references.is_reference(name))
        return tuple(dict.fromkeys(named))

    def method(self) -> str:
        """Return the name of the preset that the axes are, or their own names."""
        chosen = (self.strategy.name, self.query.name, self.sampler.name, self.noise.name)
        return presets.name_of(chosen, CONFIG_DIR)

    def digest(self) -> str:
        """Return a hash of what defines the result."""
        return hashlib.sha256(json.dumps(self.defining(), sort_keys=True).encode()).hexdigest()[:16]


def _at(settings: Any, path: str) -> Any:
    for part in path.split("."):
        settings = getattr(settings, part)
    return settings
