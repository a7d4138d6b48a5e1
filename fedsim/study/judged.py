"""What the scores of a study stand for: which examples models are judged by, and runs that have no score.

The judged examples of two runs are the same where their targets are, one by one: scores over other targets
say nothing of each other. Inputs may differ, for what a model is shown of an example (features, size,
columns) is a choice of its variant; a page says where they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from fedsim import validate
from fedsim.data.examples import ArrayDataset
from fedsim.engine import opening
from fedsim.engine.experiment import Experiment
from fedsim.engine.run_folder import RunFolder
from fedsim.headline import Metric
from fedsim.privacy import ledger
from fedsim.validate import RunError

DIVERGED = "diverged"


class Row(Protocol):
    """A run that stands in a table."""

    @property
    def variant(self) -> str:
        """Its row."""

    @property
    def folder(self) -> str:
        """Name of its folder."""


class Judges:
    """The examples that the runs of one study are judged by, seen before the first of them starts.

    Args:
        apart: each variant is judged for itself, as in a search; else all stand in one table.
    """

    def __init__(self, apart: bool = False) -> None:
        self._apart = apart
        self._first: dict[str, tuple[str, str]] = {}
        self._inputs: dict[str, dict[str, None]] = {}
        self._expected: dict[str, str] = {}
        self._known: tuple[ArrayDataset, tuple[str, str]] | None = None

    def see(self, row: Row, experiment: Experiment) -> None:
        """Take in a run that is to be made, or is finished.

        Raises:
            InputError: no score could stand beside those seen before, or there can be none at all.
        """
        test, where = experiment.splits.test, experiment.config.data.judged_by
        targets, whole = self._digests(test)
        first, held = self._first.setdefault(row.variant if self._apart else "", (row.variant, targets))
        if targets != held:
            beside = "another run of it" if first == row.variant else f"'{first}'"
            validate.conflicts(
                f"the {where} examples that models are judged by must be the same wherever scores are "
                f"compared, but their targets are others than those of {beside}.",
                "Give all variants the same by data.root and data.options under overrides, or compare them "
                "in studies of their own.",
            )
        headline = experiment.task.chosen.name
        if headline in {name for names in test.of_targets(experiment.task.undefined) for name in names}:
            validate.conflicts(
                f"{headline} must be defined on the {len(test)} {where} examples that models are judged by, "
                "but all of them have the same class or labels.",
                "Judge by more examples, or set another task.options.headline.",
            )
        self._inputs.setdefault(whole, {})[row.variant] = None
        if (digest := opening.evaluation_digest(experiment)) is not None:
            self._expected[row.folder] = digest

    def check(self, row: Row, folder: RunFolder) -> None:
        """Refuse a run that was judged by other examples than were seen for it: they changed meanwhile.

        Raises:
            RunError: they did.
        """
        header = ledger.read_header(folder.ledger)
        expected = self._expected.get(row.folder)
        if header is not None and expected is not None and header.evaluation != expected:
            raise RunError(
                f"the examples that {folder.root} was judged by are not those that were there when the "
                "command began: the data changed meanwhile. Restore them, delete the run, and repeat the "
                "command."
            )

    def inputs(self) -> str:
        """Return the sentence that says whose models see other inputs of the judged examples, or ""."""
        if len(self._inputs) < 2:
            return ""
        told = "; ".join(", ".join(variants) for variants in self._inputs.values())
        return f"Models see other inputs of the same examples: {told}."

    def _digests(self, test: ArrayDataset) -> tuple[str, str]:
        """Of the targets, and of inputs and targets; variants with the same data have them at hand."""
        if self._known is None or self._known[0] is not test:
            self._known = test, (test.digest_of_targets(), test.digest())
        return self._known[1]


def all_unscored(reasons: Iterable[str]) -> str:
    """Return why no run has a score, and what to change."""
    kinds = list(dict.fromkeys(reasons))
    if kinds == [DIVERGED]:
        return "all diverged. Lower the learning rates."
    return f"{'; '.join(kinds)}. Judge by more examples, or set another task.options.headline."


def unscored(result: Mapping[str, Any]) -> str:
    """Return why a run has no score; "" where it has one.

    Its parameters, or its model's loss, are no numbers: its score, if it has one, is that of guesses. Or its
    score is not defined on the examples. All but the first look at these: no private search may ask.
    """
    if "diverged" in result or result.get("loss", 0.0) is None:
        return DIVERGED
    headline = Metric.of(result).name
    return f"{headline} is not defined" if result.get(headline) is None else ""
