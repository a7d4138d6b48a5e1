"""Which settings go together: ranges, conflicts, and settings that nothing would read.

A setting that only some choices of another one read says so where it is declared, with `read_with`; one that
is set beside any other choice is refused, because whoever wrote it expects it to act.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedsim import validate

if TYPE_CHECKING:
    from fedsim.config import Config

SET: tuple[Any, ...] = ()
"""Condition of `read_with`: whatever the other setting is, as long as it is not null, 0, false or empty."""


ENGINE_SETTINGS = (
    "engine.gradients",
    "engine.gradient_memory",
    "engine.precision",
    "engine.channels_last",
    "engine.cuda_graphs",
)
"""What only sums of per-example gradients over a whole node read."""
REAL = (1e-50, 1e50)
"""Range of a positive number whose squares and ratios shall not leave double precision."""
MOST = 10**9  # of whatever is counted and kept in a machine's integers


def read_with(**conditions: tuple[Any, ...]) -> dict[str, Any]:
    """Return the metadata of a field that is read only beside some values of another field.

    Args:
        conditions: name of the other field -> the values beside which this one is read, or SET.
    """
    return {"read_with": conditions}


def refuse_unread(settings: Any, where: str) -> None:
    """Refuse settings that differ from their default beside choices that do not read them.

    Args:
        settings: an instance of a dataclass whose fields may be declared by `read_with`; sections within it
            are looked into.
        where: name of what they belong to, "" for a whole configuration.

    Raises:
        InputError: names the setting, the choice that ignores it, and the choices that read it.
    """
    for entry in dataclasses.fields(settings):
        value, name = getattr(settings, entry.name), f"{where}.{entry.name}".lstrip(".")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            refuse_unread(value, name)
        for other, values in entry.metadata.get("read_with", {}).items():
            beside = getattr(settings, other)
            if value == default_of(entry) or (beside in values if values else bool(beside)):
                continue
            wanted = ", ".join(map(str, values)) if values else "set"
            choice = f"{where}.{other}".lstrip(".")
            validate.conflicts(
                f"{name} is {value!r}, but nothing reads it while {choice} is {beside!r}.",
                f"It goes with {choice} = {wanted}: change that, or leave {name} at {default_of(entry)!r}.",
            )


def refuse_set(config: Config, names: Iterable[str], reader: str) -> None:
    """Refuse settings of the configuration that differ from their default, by dotted names.

    Args:
        config: the configuration.
        names: such as "engine.precision".
        reader: what does not read them, such as "query = holder_update".

    Raises:
        InputError: names the setting and the choice that ignores it.
    """
    for name in names:
        holder: Any = config
        *sections, last = name.split(".")
        for section in sections:
            holder = getattr(holder, section)
        (entry,) = (e for e in dataclasses.fields(holder) if e.name == last)
        if (value := getattr(holder, last)) != default_of(entry):
            validate.conflicts(
                f"{name} is {_shown(value)}, but {reader} does not read it.",
                f"Leave it at {_shown(default_of(entry))}, or choose another.",
            )


def _shown(value: Any) -> str:
    """A value as it is written in a configuration; a choice without options by its name."""
    if not (hasattr(value, "name") and hasattr(value, "options")):
        return repr(value)
    return f"{{name: {value.name}, options: {value.options}}}" if value.options else str(value.name)


def refuse_outside_search(c: Config) -> None:
    """Refuse to train by a configuration whose epsilon is that of a private search, outside of one.

    Its noise is that of one of a hidden number of trials, and its epsilon is what choosing among them costs.
    Training again releases more, which that epsilon does not count.

    Raises:
        InputError: `tuning.mode` is private.
    """
    if c.tuning.mode == "private":
        also = "" if c.tuning.distribution == "geometric" else " and tuning.distribution=geometric"
        validate.conflicts(
            "tuning.mode is private: this is a trial of a private search, and epsilon is that of the whole "
            "search. Training again is a release of its own, which that epsilon does not count.",
            f"Set tuning.mode=free{also}: the run then has an epsilon of its own, which adds to what the "
            "search spent. The model that the search released is in its folder winner/.",
        )


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass field that has one."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def check(c: Config) -> None:
    """Check ranges and conflicts that need nothing but the configuration itself.

    Raises:
        InputError: a value out of range, settings that exclude each other, or one that nothing reads.
    """
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
        (f.availability, "federation.availability"),
        (p.clip_norm, "privacy.clip_norm"),
        (p.delta, "privacy.delta"),
        (o.learning_rate, "optimizer.learning_rate"),
        (e.cpus_per_node, "engine.cpus_per_node"),
    ):
        validate.positive(value, name)
    if isinstance(e.physical_batch_size, int):
        validate.positive(e.physical_batch_size, "engine.physical_batch_size")
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
    for size, name in (
        (p.target_epsilon, "privacy.target_epsilon"),
        (p.noise_multiplier, "privacy.noise_multiplier"),
        (p.clip_norm, "privacy.clip_norm"),
    ):
        if size is not None:
            validate.in_range(size, *REAL, name)
    for count, name in (
        (t.steps, "train.steps"),
        (e.threads, "engine.threads"),
        (e.decode_threads, "engine.decode_threads"),
        (e.cpus_per_node, "engine.cpus_per_node"),
    ):
        if count is not None:
            validate.in_range(count, 1, MOST, name)
    validate.in_range(e.gpus_per_node, 0.0, MOST, "engine.gpus_per_node")
    validate.in_range(p.delta, 0.0, 0.5, "privacy.delta", "Use at most 1 / number of examples.")
    validate.in_range(f.availability, 0.0, 1.0, "federation.availability")
    validate.in_range(t.ema_decay, 0.0, 1.0 - 1e-12, "train.ema_decay")
    validate.in_range(c.data.holdout_examples, 0, 2**62, "data.holdout_examples")
    if c.tuning.mode is not None:
        validate.one_of(c.tuning.mode, ("free", "private"), "tuning.mode")
        validate.positive(c.tuning.trials or 0, "tuning.trials")
        validate.in_range(c.tuning.held_out_examples, 0, 2**62, "tuning.held_out_examples")
    validate.one_of(p.noise_source, ("seeded", "secure"), "privacy.noise_source")
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
    if t.imitated_batch_size is not None:
        if t.imitated_batch_size <= t.expected_batch_size:
            validate.conflicts(
                f"train.imitated_batch_size is {t.imitated_batch_size:g}, not above expected_batch_size "
                f"{t.expected_batch_size:g}.",
                "It is that of the run whose noise per update this one has; leave it null to make that run.",
            )
        if p.noise_multiplier is None or p.stop_at_epsilon is not None:
            validate.conflicts(
                "train.imitated_batch_size goes with privacy.noise_multiplier, that of the imitated run, and "
                "with no budget: what imitates has no epsilon to claim.",
                "Set privacy.noise_multiplier, and leave target_epsilon and stop_at_epsilon at null.",
            )
    refuse_unread(c, "")
