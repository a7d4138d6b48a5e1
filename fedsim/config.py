"""The configuration of a run: a typed schema, loaded from YAML through OmegaConf.

`load` resolves a name or path, follows `extends`, applies overrides, refuses unknown keys with the nearest
valid one, checks ranges and conflicts, and returns a frozen `Config`. Defaults live here; configs/base.yaml
shows them with comments and a test keeps the two equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedsim import presets, references, rules, validate
from fedsim.merging import Choice, choices, dotlist, merge, read, schema_of, to_dataclass
from fedsim.rules import SET, read_with
from fedsim.validate import InputError

_HERE = Path(__file__).resolve().parent
CONFIG_DIR = (_HERE if (_HERE / "configs").is_dir() else _HERE.parent).joinpath("configs").resolve()
"""The named configurations; beside this package in a copy of the checkout without its links."""
PATHS = ("data.root", "model.init_from", "federation.partition.options.file")
"""Settings that name files."""

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
    cpus_per_node: int = 1
    gpus_per_node: float = 0.0


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


def load(source: str | Path, overrides: Sequence[str] = (), folder: Path | None = Path()) -> Config:
    """Load a configuration.

    Args:
        source: path of a YAML file, or a name under configs/ such as "quickstart" or "smoke/central_dpsgd".
        overrides: "key.path=value" strings, YAML values, applied last.
        folder: where relative paths in `overrides` start; None refuses them. Paths in a file (`extends`,
            data.root, model.init_from) start at that file's own folder.

    Raises:
        InputError: unknown key (with the nearest valid one), wrong type, value out of range, settings that
            exclude each other or that nothing reads, missing or unreadable file.
    """
    merged = _from_file(source)
    if overrides:
        merged = _layered(merged, dotlist(overrides), "command line", folder)
    return _freeze(merged)


def _from_file(source: str | Path) -> DictConfig:
    """What a file and those it extends say; not to be changed, for it may be one for all."""
    files = [path for path, _ in reversed(_chain(find(source)))]
    if all(
        path.is_relative_to(CONFIG_DIR) for path in files
    ):  # wherever the process works, they say the same
        return _own_files(tuple((path, path.read_text(encoding="utf-8")) for path in files))
    return _of_files(files)


@functools.lru_cache(maxsize=32)
def _own_files(held: tuple[tuple[Path, str], ...]) -> DictConfig:
    return _of_files([path for path, _ in held])


def _of_files(files: Sequence[Path]) -> DictConfig:
    merged = _schema()
    for path in files:
        merged = _layered(merged, read(path), str(path), path.parent)
    return merged


def _layered(merged: DictConfig, given: DictConfig, where: str, folder: Path | None) -> DictConfig:
    """Merge what one file or command line says, over the preset it names."""
    said = OmegaConf.to_container(given)
    preset = _written(said, "preset")
    if preset is not None:
        merged = merge(merged, presets.content(str(preset), CONFIG_DIR), f"preset {preset}")
    merged = _located(merge(merged, given, where), said, folder)
    merged.preset = None
    return merged


def loaded(source: str | Path | Mapping[str, Any] | Config, changes: Mapping[str, Any]) -> Config:
    """Load a configuration from whatever says one, with changes on top.

    Args:
        source: as of `load`, a mapping of settings by section, or a configuration.
        changes: settings by section, or by dotted name; a section is changed, not replaced.

    Raises:
        InputError: as `load`.
    """
    if isinstance(source, Config):
        merged = OmegaConf.create(dataclasses.asdict(source))
        merged = _merged(_schema(), merged, "configuration")
    elif isinstance(source, Mapping):
        merged = _merged(_schema(), _nested(source, "configuration"), "configuration")
    else:
        merged = _from_file(source)
    return _freeze(_merged(merged, _nested(changes, "overrides"), "overrides"))


def _merged(merged: DictConfig, given: DictConfig, where: str) -> DictConfig:
    return _layered(merged, given, where, Path())


def _nested(settings: Mapping[str, Any], where: str) -> DictConfig:
    """Return settings by section or dotted name as one tree."""
    tree = OmegaConf.create({})
    try:
        for name, value in settings.items():
            plain = dataclasses.asdict(value) if isinstance(value, Choice) else value
            OmegaConf.update(tree, str(name), plain, merge=True)
    except Exception as error:
        raise InputError(f"{where} must hold settings by section, got {dict(settings)}. {error}") from error
    return tree


def located(overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the overrides of a file in `folder` with their relative paths made absolute.

    Raises:
        InputError: an override that is not "key.path=value".
    """
    out = list(overrides)
    for path in PATHS:
        for item in overrides:
            given = OmegaConf.select(dotlist([item]), path)
            if given is not None:
                out.append(f"{path}={json.dumps(str(_absolute(str(given), folder)))}")
    return out


def _located(merged: DictConfig, written: Any, folder: Path | None) -> DictConfig:
    """Make the paths that `written` sets absolute: processes of a run work in other folders."""
    for path in PATHS:
        if _written(written, path) is None:
            continue
        value = str(OmegaConf.select(merged, path))
        if folder is None and not _expanded(value).is_absolute():
            raise InputError(
                f"{path} must be an absolute path here (the runtime changes folders), got {value!r}."
            )
        OmegaConf.update(merged, path, str(_absolute(value, folder or Path())))
    return merged


def _written(written: Any, path: str) -> Any:
    """What the plain mapping of a file or command line says at a dotted path; None for nothing."""
    node = written
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _at(settings: Any, path: str) -> Any:
    for part in path.split("."):
        settings = getattr(settings, part)
    return settings


def _absolute(path: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / _expanded(path)))


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(f"{str(path)!r} must be a path: {error}") from error


def from_json(text: str) -> Config:
    """Rebuild a Config from `Config.to_json`, as nodes do; checked like a file."""
    return _freeze(merge(_schema(), OmegaConf.create(json.loads(text)), "message"))


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML; loading it gives an equal Config."""
    return _as_yaml(json.dumps(dataclasses.asdict(config)))  # in its own order


@functools.lru_cache(maxsize=16)
def _as_yaml(content: str) -> str:
    """What a run writes to its folder more than once; most of a small run's time is to make it."""
    return OmegaConf.to_yaml(OmegaConf.create({**json.loads(content), "extends": None}))


@functools.cache
def _schema() -> DictConfig:
    """The schema to merge with; one for all."""
    return schema_of(Config)


def find(source: str | Path, folder: Path = Path()) -> Path:
    """Return the file that a path, relative ones from `folder` on, or a name under configs/ means.

    Raises:
        InputError: there is none; suggests the nearest name.
    """
    for path in (folder / _expanded(source), CONFIG_DIR / f"{source}.yaml"):
        with contextlib.suppress(OSError, ValueError):  # too long, or with a null byte: no such file
            if path.is_file():
                return path
    known = sorted(str(p.relative_to(CONFIG_DIR))[:-5] for p in CONFIG_DIR.rglob("*.yaml"))
    raise InputError(
        f"config must be a YAML file{f' (from {folder} on)' if folder != Path() else ''} or a name under "
        f"{CONFIG_DIR.name}/, got {str(source)!r}. "
        + (validate.did_you_mean(str(source), known) or f"Known names: {', '.join(known)}.")
    )


def _chain(path: Path) -> list[tuple[Path, DictConfig]]:
    """The file and those it extends with what they hold, nearest first."""
    chain: list[tuple[Path, DictConfig]] = []
    current: Path | None = path
    while current is not None:
        paths = [p for p, _ in chain]
        if current.resolve() in [p.resolve() for p in paths]:
            raise InputError(f"{path}: 'extends' must not form a circle, got {[str(p) for p in paths]}.")
        content = read(current)
        chain.append((current, content))
        parent = content._get_node("extends")
        parent = None if parent is None else parent._value()  # as written: nothing is merged yet
        current = None if parent is None else find(str(parent), current.parent)
    return chain


def _freeze(merged: DictConfig) -> Config:
    config: Config = to_dataclass(merged, Config)
    rules.check(config)
    return config
