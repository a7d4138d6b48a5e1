"""Opening a run, new or resumed: its folder, ledger, secret, data and checkpoint must belong together.

Nothing is asked of any node before this has succeeded. The order makes every interruption harmless:

1. The folder is locked: one process at a time.
2. A new run writes its ledger's header as a draft, then its secret, then the ledger (`Ledger.create`). What a
   process left that died in between is removed: nothing was ever drawn from that secret.
3. A resumed run finds the ledger, the secret that the ledger commits to, and a checkpoint of that ledger; and
   the header it would write now, with the digests of its holders' examples, must be the one it has.
4. After the last step the checkpoint is on disk, the secret is destroyed, and only then the result is
   written. A run without a step left needs no secret: where it died while destroying it, it goes on to its
   result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fedsim import provenance, seeds
from fedsim.engine.experiment import Experiment, header_of
from fedsim.engine.run_folder import FolderLock, RunFolder
from fedsim.engine.state import State
from fedsim.privacy import binding, ledger, secret
from fedsim.privacy.ledger import Ledger
from fedsim.privacy.ledger_view import LedgerHeader
from fedsim.validate import InputError


@dataclass
class OpenRun:
    """A run this process may continue.

    Attributes:
        folder, lock: where it writes; locked until `close`.
        ledger: open for appending.
        state: after the newest checkpoint, or at the start.
        root: what draws and noise derive from; None for a run without a step left whose secret is gone.
        held: the secret's file under secure noise, locked until `close`.
    """

    folder: RunFolder
    lock: FolderLock
    ledger: Ledger
    state: State
    root: seeds.Root | None
    held: secret.Held | None

    @property
    def bound_to(self) -> dict[str, str]:
        """What its checkpoints carry: the ledger they are of."""
        return _bound_to(self.ledger.header)

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            RunError: the folder is no longer this run's.
        """
        self.lock.check()
        self.state.save(self.folder, self.bound_to)

    def destroy_secret(self) -> None:
        """Destroy the secret, if the run has one; no further step can be made."""
        if self.ledger.header.run:
            secret.destroy(self.ledger.header.run)

    def close(self) -> None:
        """Let go of ledger, secret and folder."""
        self.ledger.close()
        if self.held is not None:
            self.held.close()
        self.lock.close()


def open_run(experiment: Experiment, folder: RunFolder, resume: bool) -> OpenRun:
    """Begin a run in `folder`, or go to where it was interrupted.

    Raises:
        InputError: the folder is another run's or in use; ledger, secret, checkpoint or the holders' examples
            are missing, damaged, or not those the run was started with.
    """
    secure = experiment.config.privacy.noise_source == "secure"
    if secure:
        secret.ready(folder.root)
    lock = folder.claim(experiment.config, resume)
    book: Ledger | None = None
    held: secret.Held | None = None
    try:
        _remove_abandoned(folder)
        if not folder.ledger.exists():
            _begin(experiment, folder, secure)
        book = Ledger.open_for_resume(folder.ledger, experiment.config.digest())
        state = _restored(experiment, folder, book)
        root: seeds.Root | None = seeds.derive(experiment.config.seed, "run")
        if secure:
            header, last = book.header, state.completed == experiment.mechanism.steps
            if not last or secret.exists(folder.root, header.run):
                held = _held(folder, header, last)
            root = None if held is None else held.root
        if root is not None:
            _check_header(folder, book.header, _header(experiment, root, book.header.run, secure))
        return OpenRun(folder, lock, book, state, root, held)
    except BaseException:
        for opened in (book, held, lock):
            if opened is not None:
                opened.close()
        raise


def check_unchanged(experiment: Experiment, folder: RunFolder) -> None:
    """Refuse to take a finished run for one of this experiment when its data or own code are others now.

    What ran under secure noise has no key any more to compare examples by; its code is compared.

    Raises:
        InputError: they differ; a run that is not there yet passes.
    """
    held = ledger.read_header(folder.ledger)
    if held is None or not folder.result.exists():
        return
    keyed = not held.run
    root = seeds.derive(experiment.config.seed, "run")
    now = _header(experiment, root, "", secure=False) if keyed else held
    changed = []
    if held.data != now.data:
        changed.append("training examples")
    if held.code != provenance.reference_hash(*experiment.config.references()):
        changed.append("own code (package.module:Object)")
    known = keyed or not experiment.config.data.holdout_examples
    if known and held.evaluation != _evaluation(experiment, root):
        changed.append("examples to judge it by")
    if changed:
        raise InputError(
            f"{folder.root} is a finished run of other {' and '.join(changed)} than there are now, and would "
            "stand beside runs of these. Delete it to run it again, or choose another --out."
        )


def evaluation_digest(experiment: Experiment) -> str | None:
    """Return what the header of a run's ledger says of the examples that models are judged by; None where it
    is keyed by a secret that is still to be drawn, or gone."""
    if experiment.config.data.holdout_examples and experiment.config.privacy.noise_source == "secure":
        return None
    return _evaluation(experiment, seeds.derive(experiment.config.seed, "run"))


def _begin(experiment: Experiment, folder: RunFolder, secure: bool) -> None:
    """Write the ledger of a new run, and its secret."""
    if not secure:
        root = seeds.derive(experiment.config.seed, "run")
        Ledger.create(folder.ledger, _header(experiment, root, "", secure)).close()
        return
    run, root = secret.new()
    header = _header(experiment, root, run, secure)
    Ledger.create(folder.ledger, header, functools.partial(secret.create, folder.root, run, root)).close()


def _remove_abandoned(folder: RunFolder) -> None:
    """Remove what a process left that died before its ledger was there, or just after."""
    draft = ledger.draft_path(folder.ledger)
    if not draft.exists():
        return
    header = ledger.read_header(draft)
    if header is not None and header.run and not folder.ledger.exists():
        secret.destroy(header.run)
    draft.unlink()


def _header(experiment: Experiment, root: seeds.Root, run: str, secure: bool) -> LedgerHeader:
    train, held = experiment.splits.train, experiment.partition
    data = binding.holder_digests(
        root, held.holder_of, held.num_holders, {"inputs": train.identity, "targets": train.targets}
    )
    committed = secret.commitment(root) if secure and isinstance(root, bytes) else ""
    judged_by = _evaluation(experiment, root)
    return header_of(experiment.mechanism, experiment.config, run, committed, data, judged_by)


def _evaluation(experiment: Experiment, root: seeds.Root) -> str:
    """Return the digest of the evaluation split. Test data are public, so anybody may compare; held-out
    examples are private, and their digest is keyed by the run's root."""
    test = experiment.splits.test
    key = root if experiment.config.data.holdout_examples else 0
    arrays = {"inputs": test.identity, "targets": test.targets}
    (found,) = binding.holder_digests(key, np.zeros(len(test), np.int64), 1, arrays)
    return found


def _held(folder: RunFolder, header: LedgerHeader, last: bool) -> secret.Held | None:
    try:
        return secret.Held(folder.root, header.run, header.secret, ledger.digest_of(header))
    except InputError:
        if not last:
            raise
        return None  # overwritten, not yet removed: the process died while destroying it


def _bound_to(header: LedgerHeader) -> dict[str, str]:
    return {"ledger": ledger.digest_of(header).hex()}


def _restored(experiment: Experiment, folder: RunFolder, book: Ledger) -> State:
    state = State(experiment)
    state.restore(folder, _bound_to(book.header))
    if book.steps < state.completed:
        raise InputError(
            f"ledger {folder.ledger} has {book.steps} steps, the newest checkpoint {state.completed}: the "
            "ledger was cut. Restore it, or start anew in another --out."
        )
    return state


def _check_header(folder: RunFolder, held: LedgerHeader, now: LedgerHeader) -> None:
    """Refuse to continue a run with other examples, or with a plan that would write another header."""
    if held.data != now.data:
        pairs = zip(held.data, now.data, strict=False)
        changed = [str(holder) for holder, (a, b) in enumerate(pairs) if a != b]
        named = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise InputError(
            f"{folder.root}: the training examples of holders {named} are not those the run was started "
            "with. A step repeated on other data would release a second sum under the same noise: resume "
            "with the run's own data, or start a new run in another --out."
        )
    if held.code != now.code:
        raise InputError(
            f"{folder.root}: the source of what the configuration names (package.module:Object) is not what "
            "the run was started with. Restore it, or start a new run in another --out."
        )
    if held.evaluation != now.evaluation:
        raise InputError(
            f"{folder.root}: the examples that models are judged by are not those the run was started with, "
            "so that its scores before and after could not be compared. Restore them, or start a new run in "
            "another --out."
        )
    if held != now:
        different = [name for name in vars(now) if getattr(held, name) != getattr(now, name)]
        raise InputError(
            f"{folder.root}: {', '.join(different)} of the run would no longer be what its ledger says. "
            "Resume with the data and the version of fedsim it was started with, or start a new run."
        )
