"""The run secret: the root of all draws and noise in secure mode.

32 bytes from the operating system, in a file only its owner can read, apart from the run's outputs. From it
every step's noise is derived, so a killed and resumed run repeats its noise instead of drawing a second one
for the same step. It is destroyed before the run's result is written: nobody can recompute the noise of a
finished run.

A secret belongs to one run, never to a path. The run's name is random and stands in the header of its ledger
beside a commitment to the secret; the secret's file carries that name and a digest of the header. So a
secret fits one ledger and a ledger one secret, whatever was removed, copied or renamed.

The order in which they come to be (`fedsim.engine.opening`): the header under a draft's name, the secret, the
header under the ledger's name. So a ledger always has its secret, and what a process that died in between
left is found by the draft and destroyed. A secret whose run folder was removed is destroyed when the next run
begins in that place.

Overwriting before unlinking is best effort: journaling and copy-on-write file systems, flash storage,
snapshots and backups may keep the old block. Keep the folder on a volume without these where that matters.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import stat
from pathlib import Path

from fedsim import seeds
from fedsim.validate import InputError

_log = logging.getLogger(__name__)

FOLDER_VARIABLE = "FEDSIM_SECRETS"
_ROOT = 32  # bytes of the secret itself
_SIZE = _ROOT + 32  # and of the digest of the ledger's header


def secrets_folder() -> Path:
    """Return the folder of secrets: $FEDSIM_SECRETS, or ~/.fedsim/secrets."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".fedsim" / "secrets"


def new() -> tuple[str, bytes]:
    """Return (name, secret) of a new run, both from the operating system: 32 hexadecimal digits, 32 bytes."""
    return os.urandom(16).hex(), os.urandom(_ROOT)


def commitment(root: bytes) -> str:
    """Return what may be published of a secret: it tells nothing about it, and fits no other."""
    return seeds.derive(root, "commitment").hex()


def ready(run_folder: str | Path) -> Path:
    """Return the folder of secrets, made where it is missing.

    Raises:
        InputError: it cannot be made, is open to others, or lies inside the run's outputs.
    """
    folder = _folder(run_folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: the folder of secrets cannot be made. {error}. Choose another with {FOLDER_VARIABLE}."
        ) from error
    _check_folder(folder)
    return folder


def create(run_folder: str | Path, run: str, root: bytes, header: bytes) -> None:
    """Store the secret of a new run; on return it is on disk.

    Args:
        run_folder: where the run writes; a secret of an earlier run in that place is destroyed.
        run, root: from `new`.
        header: the SHA-256 of the ledger's header, 32 bytes.

    Raises:
        InputError: as `ready`, or a secret that cannot be stored or destroyed.
    """
    folder = ready(run_folder)
    _destroy_left_over(folder, run_folder)
    path = folder / _name(run_folder, run)
    descriptor = _open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    try:
        os.fchmod(descriptor, 0o600)  # whatever the umask
        os.write(descriptor, root + header)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _sync_folder(folder)


class Held:
    """The secret of a run that is going on: read, checked, and locked against a second process.

    Args:
        run_folder: where the run is now; a renamed or copied run finds its secret too.
        run: the run's name, from the ledger.
        committed: `commitment` of the secret, from the ledger.
        header: the SHA-256 of the ledger's header, 32 bytes.

    Raises:
        InputError: it is missing, is not the one the ledger commits to, was made for another ledger, is in
            use, or is not a regular file of this user that others cannot read.
    """

    def __init__(self, run_folder: str | Path, run: str, committed: str, header: bytes) -> None:
        path = _find(run_folder, run)
        self._descriptor = _open(path, os.O_RDONLY)
        try:
            _check_file(path, os.fstat(self._descriptor))
            _lock(path, self._descriptor)
            content = os.read(self._descriptor, _SIZE)
            self.root = content[:_ROOT]
            if not hmac.compare_digest(commitment(self.root), committed):
                raise InputError(
                    f"{path}: this is not the secret that the ledger of {Path(run_folder)} commits to. "
                    "Restore the run's own, or start a new run in another folder."
                )
            if not hmac.compare_digest(content[_ROOT:], header):
                raise InputError(
                    f"{path}: the secret was made for a ledger with another header than that of "
                    f"{Path(run_folder)}. Restore the ledger; the run cannot be resumed with this one."
                )
            here = path.with_name(_name(run_folder, run))
            if path != here:  # the run was moved
                path.rename(here)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def exists(run_folder: str | Path, run: str) -> bool:
    """Say whether the secret of a run is there, in whatever state."""
    return bool(_all(_folder(run_folder), run))


def destroy(run: str) -> bool:
    """Overwrite and remove the secret of a run; return False where there is none.

    Raises:
        InputError: what is there is not a secret file of this user.
    """
    folder = secrets_folder().resolve()
    found = _all(folder, run)
    for path in found:
        _destroy(path)
    return bool(found)


def _folder(run_folder: str | Path) -> Path:
    """The folder of secrets, refused where it lies inside the run's outputs."""
    run = Path(run_folder).resolve()
    folder = secrets_folder().resolve()
    if folder == run or run in folder.parents:
        raise InputError(
            f"{FOLDER_VARIABLE} must be outside the run's outputs, got {folder} within {run}. "
            "Whoever reads the secret can remove the noise: choose another folder."
        )
    return folder


def _place(run_folder: str | Path) -> str:
    return hashlib.sha256(os.fsencode(Path(run_folder).resolve())).hexdigest()[:16]


def _name(run_folder: str | Path, run: str) -> str:
    """The run says whose it is; the place lets a later run there find what a removed one left."""
    return f"{_place(run_folder)}.{run}.key"


def _all(folder: Path, run: str) -> list[Path]:
    if len(run) != 32 or not set(run) <= set("0123456789abcdef"):
        raise InputError(f"the name of a run must be 32 hexadecimal digits, got {run!r}.")
    return sorted(folder.glob(f"*.{run}.key")) if folder.is_dir() else []


def _find(run_folder: str | Path, run: str) -> Path:
    folder = _folder(run_folder)
    found = _all(folder, run)
    if not found:
        raise InputError(
            f"{folder}: the secret of run {run} in {Path(run_folder)} must be there to resume it. Without it "
            "the run cannot be resumed, because its noise could not be reproduced: a repeated step would "
            f"release a second noise. Set {FOLDER_VARIABLE} to the folder the run was started with, or start "
            "a new run."
        )
    _check_folder(folder)
    return found[0]


def _destroy_left_over(folder: Path, run_folder: str | Path) -> None:
    """Destroy secrets of runs that were in this place; one that goes on elsewhere is in use and stays."""
    for path in sorted(folder.glob(f"{_place(run_folder)}.*.key")):
        descriptor = _open(path, os.O_RDONLY)
        try:
            _lock(path, descriptor)
        except InputError:
            continue
        finally:
            os.close(descriptor)
        _log.warning(
            "%s: destroyed, the secret of an unfinished run that is no longer in %s", path, run_folder
        )
        _destroy(path)


def _destroy(path: Path) -> None:
    descriptor = _open(path, os.O_WRONLY)
    try:
        found = os.fstat(descriptor)
        _check_owner(path, found)
        for filling in (os.urandom(found.st_size), bytes(found.st_size)):
            os.pwrite(descriptor, filling, 0)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InputError(
            f"{path}: expected a secret file that this user can read and write. {error}"
        ) from error


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"{path}: the secret is in use by another process, which continues this run or a copy of it. "
            "Wait for it, or stop it."
        ) from error


def _check_folder(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise InputError(
            f"{folder}: the folder of secrets must be this user's with permissions 0700, got owner "
            f"{found.st_uid} and {stat.S_IMODE(found.st_mode):04o}. Run chmod 700 on it, or choose another "
            f"with {FOLDER_VARIABLE}."
        )


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        raise InputError(f"{path}: a secret must be a regular file of this user (uid {os.getuid()}).")


def _check_file(path: Path, found: os.stat_result) -> None:
    _check_owner(path, found)
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise InputError(
            f"{path}: a secret must have permissions 0600, got {mode:04o}: others may have read it, and "
            "whoever did can remove the noise. Delete it and start a new run."
        )
    if found.st_size != _SIZE:
        raise InputError(f"{path}: a secret must have {_SIZE} bytes, got {found.st_size}. Start a new run.")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
