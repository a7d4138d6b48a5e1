"""The secret of a secure run, and the keys of its draws and noise, are in no byte of what the run writes.

For every method all files of the run's folder are searched, while the run is interrupted and at its end.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.seeds import derive
from fedsim.validate import RunError
from tests.conftest import train
from tests.strategies.methods import PRIVATE, of
from tests.strategies.test_contract import Flaky

PURPOSES = ("draw", "noise", "holders", "quantile", "top up", "dropouts")
OF_THE_RUN = ("passes", "groups")


def forms(secret: bytes) -> Iterator[bytes]:
    """The bytes, and the ways in which a file of text would hold them."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield base64.b64encode(secret).rstrip(b"=")
    yield base64.urlsafe_b64encode(secret).rstrip(b"=")
    for order in ("big", "little"):
        yield str(int.from_bytes(secret, order)).encode()  # type: ignore[arg-type]
    yield json.dumps(list(secret)).encode()
    yield json.dumps(list(secret), separators=(",", ":")).encode()


def found(folder: Path, secrets: list[bytes]) -> list[str]:
    """Return the files that hold one of the secrets in some form."""
    needles = [needle for secret in secrets for needle in forms(secret)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 4, "there is something to search"
    return [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]


@pytest.mark.parametrize("name", PRIVATE)
def test_the_secret_is_in_no_byte_of_a_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, urandom = [], os.urandom

    def watched(count: int) -> bytes:
        drawn.append(urandom(count))
        return drawn[-1]

    monkeypatch.setattr(os, "urandom", watched)
    config = of(name, "privacy.noise_source=secure", "monitor.tensorboard=true", "train.checkpoint_every=1")
    out = tmp_path / "run"
    fails: Any = lambda asked: asked >= 4  # noqa: E731
    with pytest.raises(RunError):
        train(config, out, client=Flaky(fails))
    roots = [value for value in drawn if len(value) == 32]
    assert roots, "the run has a secret"
    secrets = [
        *roots,
        *(derive(root, purpose, step) for root in roots for purpose in PURPOSES for step in range(6)),
        *(derive(root, purpose) for root in roots for purpose in OF_THE_RUN),
    ]
    held = [path for path in (tmp_path / "secrets").rglob("*") if path.is_file()]
    assert any(root in path.read_bytes() for root in roots for path in held), "the search would find it"
    assert found(out, secrets) == []
    train(config, out, resume=True)
    assert found(out, secrets) == []
    left = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(root in content for root in roots for content in left), "nor anywhere else"
