"""What the launcher asks Flower for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsim import loading
from fedsim.engine.run_folder import RunFolder
from fedsim.flower import launch


@pytest.mark.parametrize(
    ("cores", "nodes", "each", "slots"), [(2, 2, 1, 2), (2, 3, 2, 6), (2, 1000, 1, 6), (64, 1000, 2, 64)]
)
def test_no_more_actors_start_than_flower_can_feed(
    cores: int, nodes: int, each: int, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One actor is a process of some 300 MB: a thousand nodes must not start a thousand."""
    asked: list[str] = []

    def flwr(arguments: list[str], environment: dict[str, str], base: Path) -> str:
        asked.extend(arguments)
        return '{"run-id": 7}'

    monkeypatch.setattr(launch, "_flwr", flwr)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    config = loading.load(
        "base",
        [f"federation.holders={nodes}", f"federation.nodes={nodes}", f"engine.cpus_per_node={each}"],
    )
    assert launch._submit(tmp_path, config, RunFolder(tmp_path), False, {}, tmp_path) == "7"
    federation = dict(item.split("=") for item in asked[asked.index("--federation-config") + 1].split())
    assert federation["num-supernodes"] == str(nodes)
    assert federation["init-args-num-cpus"] == str(slots)


def test_a_run_that_takes_steps_is_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask starts a Python process; once nothing more is written it is asked every five seconds."""
    clock, asked, folder = [0.0], [], RunFolder(tmp_path)

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] <= 30:
            with open(folder.metrics, "a", encoding="utf-8") as handle:
                handle.write("{}\n")
        if clock[0] > 43:
            folder.write_result({})

    def listed(*_: object) -> dict[str, str]:
        asked.append(clock[0])
        return {"status": "finished:completed" if folder.result.exists() else "running"}

    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(launch, "_listed", listed)
    assert launch._follow("7", folder, {}, tmp_path, []) == "finished:completed"
    assert asked == [35.0, 40.0, 43.5]
