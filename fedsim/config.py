"""The configuration of a run: a typed schema, loaded from YAML through OmegaConf.

`load` resolves a name or path, follows `extends`, applies overrides, refuses unknown keys with the nearest
valid one, checks ranges and conflicts, and returns a frozen `Config`. Defaults live here; configs/base.yaml
shows them with comments and a test keeps the two equal.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim import validate
from fedsim.validate import InputError

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class DataConfig:
    name: str = "fashion_mnist_subset"
    root: str | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    holdout_examples: int = 0
    features: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    name: str = "small_cnn"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    init_from: str | None = None
    init_sha256: str | None = None
    reset: list[str] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FederationConfig:
    holders: int = 100
    nodes: int = 2
    partition: str = "dirichlet"
    dirichlet_alpha: float = 0.5
    shards_per_holder: int = 2
    power_law_exponent: float = 1.5
    examples_per_holder_at_most: int | None = None
    nodes_per_wave: int | None = None
    availability: float = 1.0


@dataclass(frozen=True)
class StrategyConfig:
    name: str = "central_dpsgd"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipGroupConfig:
    parameters: list[str] = field(default_factory=list)
    weight: float = 1.0


@dataclass(frozen=True)
class PrivacyConfig:
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    noise_schedule: list[float] = field(default_factory=list)
    stop_at_epsilon: float | None = None
    delta: float = 1e-5
    accountant: str = "pld"
    clip_norm: float = 1.0
    clipping: str = "flat"
    clip_groups: dict[str, Any] = field(default_factory=dict)
    noise_source: str = "seeded"


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    expected_batch_size: float = 1024.0
    augment_multiplicity: int = 1
    augmentations: list[str] = field(default_factory=list)
    ema_decay: float = 0.0
    eval_every: int = 10
    checkpoint_every: int = 10


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "sgd"
    learning_rate: float = 1.0
    scale_with_batch: float | None = None
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    warmup_epochs: float | None = None
    final_fraction: float = 0.0


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
        device: auto, cpu, cuda or cuda:N. Auto takes CUDA where there is one, for node i number i modulo the
            number of devices its process sees.
        threads: torch threads of a process; None for all cores.
        cpus_per_node, gpus_per_node: what Flower's simulation reserves for a node.

    Per-holder sums (`shares_dpsgd`) are taken by the vmap engine in any case, and local training by ordinary
    gradients; the bookkeeping engine's settings do not reach those. There is no setting for `torch.compile`:
    see `fedsim.grads.bookkeeping.Options`.
    """

    gradients: str = "bookkeeping"
    physical_batch_size: int | str = 256
    memory_limit: int | float | str | None = None
    gradient_memory: int | str = "full"
    precision: str = "float32"
    channels_last: bool | str = "auto"
    device: str = "auto"
    threads: int | None = None
    cpus_per_node: int = 1
    gpus_per_node: float = 0.0


@dataclass(frozen=True)
class MonitorConfig:
    tensorboard: bool = True
    progress: bool = True
    public_only: bool | None = None


@dataclass(frozen=True)
class Config:
    """Everything that defines a run. `engine` and `monitor` never change its result."""

    extends: str | None = None
    title: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    reference: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the configuration as canonical JSON (sorted keys)."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def digest(self) -> str:
        """Return a hash of what defines the result: not speed, logging or naming."""
        body = dataclasses.asdict(self)
        for key in ("engine", "monitor", "title", "reference", "extends"):
            del body[key]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration.

    Args:
        source: path of a YAML file, or a name under configs/ such as "quickstart" or "smoke/central_dpsgd".
        overrides: "key.path=value" strings, YAML values, applied last.

    Raises:
        InputError: unknown key (with the nearest valid one), wrong type, value out of range, settings that
            exclude each other, missing or unreadable file.
    """
    merged = _schema()
    for path in reversed(_chain(find(source))):
        merged = _merge(merged, _read(path), str(path))
    merged = _merge(merged, _dotlist(overrides), "command line")
    if merged.model.init_from is not None:  # nodes run in other folders
        merged.model.init_from = str(Path(merged.model.init_from).expanduser().absolute())
    return _freeze(merged)


def from_json(text: str) -> Config:
    """Rebuild a Config from `Config.to_json`, as nodes do; checked like a file."""
    return _freeze(_merge(_schema(), OmegaConf.create(json.loads(text)), "message"))


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML; loading it gives an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create({**dataclasses.asdict(config), "extends": None}))


def parse_options(options: dict[str, Any], schema: type[Any], where: str) -> Any:
    """Return `schema(**options)` for a frozen dataclass of options, with typed conversion.

    Raises:
        InputError: unknown option (with the nearest valid one) or wrong type.
    """
    typed = OmegaConf.structured(schema)
    OmegaConf.set_readonly(typed, False)
    return _to_dataclass(_merge(typed, OmegaConf.create(options), where), schema)


def clip_groups(privacy: PrivacyConfig) -> dict[str, ClipGroupConfig]:
    """Return `privacy.clip_groups` typed, by name.

    Raises:
        InputError: a group that is not a mapping, has an unknown key or no parameters, or a weight that is
            not positive.
    """
    groups: dict[str, ClipGroupConfig] = {}
    for name, given in privacy.clip_groups.items():
        where = f"privacy.clip_groups.{name}"
        if not isinstance(given, dict):
            raise InputError(f"{where} must be a mapping with parameters and weight, got {given!r}.")
        group: ClipGroupConfig = parse_options(given, ClipGroupConfig, where)
        validate.positive(group.weight, f"{where}.weight")
        if not group.parameters:
            raise InputError(f"{where}.parameters must list patterns of parameter names, got none.")
        groups[str(name)] = group
    return groups


def _schema() -> DictConfig:
    return _thaw(OmegaConf.structured(Config))


def _thaw(node: DictConfig) -> DictConfig:
    OmegaConf.set_readonly(node, False)
    for key in node:
        if OmegaConf.is_config(child := node._get_node(key)) and isinstance(child, DictConfig):
            _thaw(child)
    return node


def find(source: str | Path) -> Path:
    """Return the file that a path or a name under configs/ means.

    Raises:
        InputError: there is none; suggests the nearest name.
    """
    named = CONFIG_DIR / f"{source}.yaml"
    for path in (Path(source), named):
        if path.is_file():
            return path
    known = sorted(str(p.relative_to(CONFIG_DIR))[:-5] for p in CONFIG_DIR.rglob("*.yaml"))
    raise InputError(
        f"config must be a YAML file or a name under {CONFIG_DIR.name}/, got {str(source)!r}. "
        + (validate.did_you_mean(str(source), known) or f"Known names: {', '.join(known)}.")
    )


def _chain(path: Path) -> list[Path]:
    """The file and those it extends, nearest first."""
    paths: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in [p.resolve() for p in paths]:
            raise InputError(f"{path}: 'extends' must not form a circle, got {[str(p) for p in paths]}.")
        paths.append(current)
        parent = _read(current).get("extends")
        current = None if parent is None else find(parent)
    return paths


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:
        raise InputError(f"{path}: expected a readable YAML mapping. {error}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: expected a YAML mapping, got {type(loaded).__name__}.")
    return loaded


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise InputError(f"override must look like key.path=value, got {item!r}.")
        if item.startswith("extends="):
            raise InputError(f"extends must stand in a configuration file, got the override {item!r}.")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise InputError(f"overrides must hold YAML values, got {list(overrides)}. {error}") from error


def _merge(base: DictConfig, update: DictConfig, where: str) -> DictConfig:
    for key in _leaves(update):
        if not _known(base, key):
            valid = sorted(_leaves(base, keep_sections=True))
            raise InputError(f"{where}: unknown key '{key}'. {validate.did_you_mean(key, valid)}".rstrip())
    try:
        merged = OmegaConf.merge(base, update)
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or "?"
        wanted = str(error).splitlines()[0]
        raise InputError(f"{where}: wrong value for '{key}'. {wanted}.") from error
    assert isinstance(merged, DictConfig)
    return merged


def _known(base: DictConfig, key: str) -> bool:
    node: Any = base
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        if OmegaConf.get_type(node) is dict:  # a free mapping takes any key
            return True
        if part not in node:
            return False
        node = node._get_node(part)
    return True


def _leaves(node: DictConfig, prefix: str = "", keep_sections: bool = False) -> list[str]:
    out: list[str] = []
    for key in node:
        child = node._get_node(key)
        name = prefix + str(key)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            out += [name] if keep_sections else []
            out += _leaves(child, f"{name}.", keep_sections)
        else:
            out.append(name)
    return out


def _to_dataclass(node: Any, schema: type[Any]) -> Any:
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(schema):
        value = node[entry.name]
        nested = entry.default_factory if entry.default_factory is not dataclasses.MISSING else None
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            values[entry.name] = _to_dataclass(value, nested)
        elif OmegaConf.is_config(value):
            values[entry.name] = OmegaConf.to_container(value)
        else:
            values[entry.name] = value
    return schema(**values)


def _freeze(merged: DictConfig) -> Config:
    config: Config = _to_dataclass(merged, Config)
    _check(config)
    return config


def _check(c: Config) -> None:
    """Ranges and conflicts that need nothing but the configuration itself."""
    p, t, f, o, e = c.privacy, c.train, c.federation, c.optimizer, c.engine
    validate.in_range(c.seed, 0, 2**63 - 1, "seed")
    validate.one_of(c.model.dtype, ("float32", "float64"), "model.dtype")
    for value, name in (
        (t.steps, "train.steps"),
        (t.expected_batch_size, "train.expected_batch_size"),
        (t.augment_multiplicity, "train.augment_multiplicity"),
        (t.eval_every, "train.eval_every"),
        (t.checkpoint_every, "train.checkpoint_every"),
        (f.holders, "federation.holders"),
        (f.nodes, "federation.nodes"),
        (f.shards_per_holder, "federation.shards_per_holder"),
        (f.dirichlet_alpha, "federation.dirichlet_alpha"),
        (f.power_law_exponent, "federation.power_law_exponent"),
        (f.availability, "federation.availability"),
        (p.clip_norm, "privacy.clip_norm"),
        (p.delta, "privacy.delta"),
        (o.learning_rate, "optimizer.learning_rate"),
        (e.cpus_per_node, "engine.cpus_per_node"),
    ):
        validate.positive(value, name)
    if isinstance(e.physical_batch_size, int):
        validate.positive(e.physical_batch_size, "engine.physical_batch_size")
        if e.memory_limit is not None:
            validate.conflicts(
                f"engine.memory_limit ({e.memory_limit}) is for engine.physical_batch_size=auto, "
                f"which is {e.physical_batch_size}.",
                "Set engine.memory_limit=null, or engine.physical_batch_size=auto.",
            )
    else:
        validate.one_of(e.physical_batch_size, ("auto",), "engine.physical_batch_size")
    for optional, name in (
        (p.target_epsilon, "privacy.target_epsilon"),
        (p.noise_multiplier, "privacy.noise_multiplier"),
        (p.stop_at_epsilon, "privacy.stop_at_epsilon"),
        (c.data.train_examples, "data.train_examples"),
        (c.data.test_examples, "data.test_examples"),
        (f.examples_per_holder_at_most, "federation.examples_per_holder_at_most"),
        (f.nodes_per_wave, "federation.nodes_per_wave"),
        (o.scale_with_batch, "optimizer.scale_with_batch"),
        (o.warmup_epochs, "optimizer.warmup_epochs"),
        (e.threads, "engine.threads"),
    ):
        if optional is not None:
            validate.positive(optional, name)
    for factor in p.noise_schedule:
        validate.positive(factor, "every entry of privacy.noise_schedule")
    validate.in_range(p.delta, 0.0, 0.5, "privacy.delta", "Use at most 1 / number of examples.")
    validate.in_range(f.availability, 0.0, 1.0, "federation.availability")
    validate.in_range(t.ema_decay, 0.0, 1.0 - 1e-12, "train.ema_decay")
    validate.in_range(o.momentum, 0.0, 1.0 - 1e-12, "optimizer.momentum")
    validate.in_range(o.final_fraction, 0.0, 1.0, "optimizer.final_fraction")
    validate.in_range(c.data.holdout_examples, 0, 2**62, "data.holdout_examples")
    validate.one_of(p.accountant, ("pld", "rdp", "rdp_objax"), "privacy.accountant")
    validate.one_of(p.clipping, ("flat", "normalised", "per_layer", "grouped"), "privacy.clipping")
    if (p.clipping == "grouped") != bool(clip_groups(p)):
        validate.conflicts(
            f"privacy.clipping is {p.clipping}, but privacy.clip_groups has {len(p.clip_groups)} groups.",
            "Groups go with privacy.clipping=grouped, and only with it.",
        )
    validate.one_of(p.noise_source, ("seeded", "secure"), "privacy.noise_source")
    if (c.model.reset or c.model.init_sha256) and c.model.init_from is None:
        validate.conflicts(
            "model.reset or model.init_sha256 is set, but model.init_from is not.",
            "They say something of the weights that model.init_from names.",
        )
    if o.warmup_steps and o.warmup_epochs is not None:
        validate.conflicts(
            f"optimizer.warmup_steps is {o.warmup_steps} and optimizer.warmup_epochs is {o.warmup_epochs:g}.",
            "Give one of them.",
        )
    if f.nodes > f.holders:
        validate.conflicts(
            f"federation.nodes ({f.nodes}) is above federation.holders ({f.holders}).",
            "A node hosts at least one holder: lower nodes or raise holders.",
        )
    if p.target_epsilon is not None and p.stop_at_epsilon is not None:
        validate.conflicts(
            "privacy.target_epsilon and privacy.stop_at_epsilon are both set.",
            "target_epsilon calibrates the noise for all steps; stop_at_epsilon ends a run of given noise.",
        )
