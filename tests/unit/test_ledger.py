"""The ledger and the events it holds: durable, exact once, and any damage found."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import dp_accounting as dp
import pytest

from fedsim.privacy import accountant, events, ledger
from fedsim.privacy.ledger import Ledger, LedgerHeader
from fedsim.validate import InputError, RunError
from fedsim.visibility import Public, Sensitive

HEADER = LedgerHeader(config_hash="abc", delta=1e-5, target_epsilon=3.0)
STEP = events.gaussian_step(1.1, 0.02)
OTHER = events.gaussian_step(2.0, 1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def written(path: Path, steps: int = 5) -> Path:
    with Ledger.create(path, HEADER) as book:
        for step in range(steps):
            assert book.append(step, STEP if step < 3 else OTHER, {"expected_batch_size": Public(64.0)})
    return path


def test_what_was_appended_is_read_back(path: Path) -> None:
    view = ledger.read(written(path))
    assert view.header == HEADER
    assert view.steps == 5
    assert [record.step for record in view.records] == [0, 1, 2, 3, 4]
    assert [record.event for record in view.records] == [STEP] * 3 + [OTHER] * 2
    first, last = view.records[0], view.records[-1]
    assert (first.noise_multiplier, first.sampling_rate) == (1.1, 0.02)
    assert (last.noise_multiplier, last.sampling_rate) == (2.0, 1.0)
    assert first.facts == {"expected_batch_size": 64.0}
    line = json.loads(path.read_text().splitlines()[1])
    assert {"step", "event", "noise_multiplier", "sampling_rate", "chain"} < set(line)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_total_event_counts_equal_neighbours(path: Path) -> None:
    total = ledger.read(written(path)).total_event()
    expected = [dp.SelfComposedDpEvent(STEP, 3), dp.SelfComposedDpEvent(OTHER, 2)]
    assert total == dp.ComposedDpEvent(expected)


def test_epsilon_is_that_of_the_composition(path: Path) -> None:
    view = ledger.read(written(path))
    for name in ("pld", "rdp"):
        assert view.epsilon(name) == accountant.epsilon(view.total_event(), 1e-5, name)
    assert view.epsilon().accountant == "pld"
    assert view.epsilon(delta=1e-6).value > view.epsilon().value
    holder = view.holder_epsilon(1)
    assert holder.unit == "holder"
    assert holder.value == pytest.approx(view.epsilon().value, rel=2e-3)
    assert view.holder_epsilon(4).value > holder.value


def test_an_empty_ledger_has_released_nothing(path: Path) -> None:
    with Ledger.create(path, HEADER) as book:
        assert book.epsilon().value == 0.0
        assert book.view().total_event() == dp.NoOpDpEvent()


def test_a_line_is_on_disk_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.create(path, HEADER) as book:
        synced: list[int] = []
        real = os.fsync

        def watch(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_size)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", watch)
        book.append(0, STEP)
        assert synced[-1] == path.stat().st_size


def test_repeating_a_recorded_step_writes_nothing(path: Path) -> None:
    with Ledger.open_for_resume(written(path)) as book:
        before = path.read_bytes()
        assert book.append(2, STEP) is False
        assert path.read_bytes() == before
        assert book.append(5, OTHER) is True
    assert ledger.read(path).steps == 6


def test_a_gap_or_another_event_is_refused(path: Path) -> None:
    with Ledger.open_for_resume(written(path)) as book:
        before = path.read_bytes()
        with pytest.raises(RunError, match="next step must be 5"):
            book.append(6, STEP)
        with pytest.raises(RunError, match="step 2 was recorded as"):
            book.append(2, OTHER)
        with pytest.raises(InputError, match="must not be named event"):
            book.append(5, STEP, {"event": Public(1)})
        with pytest.raises(InputError, match="finite numbers"):
            book.append(5, STEP, {"loss": Public(float("nan"))})
        for fact in (2.0, Sensitive(2.0)):
            with pytest.raises(TypeError, match="'sum_norm' must be made Public"):
                book.append(5, STEP, {"sum_norm": fact})  # type: ignore[dict-item]
        with pytest.raises(InputError, match="LaplaceDpEvent"):
            book.append(5, dp.LaplaceDpEvent(1.0))
        assert path.read_bytes() == before
        assert book.steps == 5


def test_every_cut_of_the_last_line_resumes_at_the_step_before(path: Path) -> None:
    whole = written(path).read_bytes()
    start_of_last = whole[:-1].rfind(b"\n") + 1
    for size in range(start_of_last, len(whole)):
        path.write_bytes(whole[:size])
        assert ledger.read(path).steps == 4
        with Ledger.open_for_resume(path, "abc") as book:
            assert book.steps == 4
            assert path.read_bytes() == whole[:start_of_last]
            book.append(4, OTHER, {"expected_batch_size": Public(64.0)})
        assert path.read_bytes() == whole


def test_damage_anywhere_is_found(path: Path) -> None:
    whole = written(path).read_bytes()
    for position in range(0, len(whole) - 1, 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(InputError, match=r"line \d+ of the ledger is damaged"):
            ledger.read(path)


@pytest.mark.parametrize("line", range(5))
def test_a_lost_or_moved_or_repeated_line_is_found(path: Path, line: int) -> None:
    lines = written(path).read_bytes().splitlines(keepends=True)
    lost = lines[:line] + lines[line + 1 :]
    moved = [*lines[:line], lines[line + 1], lines[line], *lines[line + 2 :]]
    repeated = lines[: line + 1] + lines[line:]
    for wrong in (lost, moved, repeated):
        path.write_bytes(b"".join(wrong))
        with pytest.raises(InputError, match="damaged"):
            Ledger.open_for_resume(path)


def test_a_line_from_another_run_is_found(path: Path, tmp_path: Path) -> None:
    lines = written(path).read_bytes().splitlines(keepends=True)
    with Ledger.create(tmp_path / "second.jsonl", LedgerHeader(config_hash="xyz", delta=1e-5)) as book:
        for step in range(5):
            book.append(step, OTHER)
    lines[3] = (tmp_path / "second.jsonl").read_bytes().splitlines(keepends=True)[3]
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match="line 4"):
        ledger.read(path)


def test_a_new_run_does_not_overwrite_a_ledger(path: Path) -> None:
    before = written(path).read_bytes()
    with pytest.raises(InputError, match="must not be there yet"):
        Ledger.create(path, HEADER)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_resume_needs_the_file_its_header_and_the_same_configuration(path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Ledger.open_for_resume(path)
    path.write_bytes(b'{"config_hash": "ab')
    with pytest.raises(InputError, match="header"):
        Ledger.open_for_resume(path)
    path.unlink()
    with pytest.raises(InputError, match="belongs to config abc"):
        Ledger.open_for_resume(written(path), "other")


def _try_to_open(path: str, answers: multiprocessing.Queue[str]) -> None:
    try:
        Ledger.open_for_resume(path).close()
        answers.put("opened")
    except InputError as error:
        answers.put(str(error))


def test_a_second_process_is_kept_out(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with Ledger.open_for_resume(written(path)):
        child = context.Process(target=_try_to_open, args=(str(path), answers))
        child.start()
        assert "in use by another process" in answers.get(timeout=30)
        child.join()
    child = context.Process(target=_try_to_open, args=(str(path), answers))
    child.start()
    assert answers.get(timeout=30) == "opened"
    child.join()


def test_a_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open_for_resume(written(path)) as book:
        before = path.read_bytes()
        real = os.write

        def half(descriptor: int, data: bytes) -> int:
            real(descriptor, data[:10])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(RunError, match="could not be recorded and was not released"):
                book.append(5, STEP)
        assert path.read_bytes() == before
        assert book.append(5, STEP)
    assert ledger.read(path).steps == 6


@pytest.mark.parametrize(
    "event",
    [
        STEP,
        OTHER,
        events.non_private_step(),
        dp.NoOpDpEvent(),
        events.composed(STEP, 7),
        dp.ComposedDpEvent([STEP, dp.SelfComposedDpEvent(dp.ComposedDpEvent([OTHER, STEP]), 3)]),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_survive_json(event: dp.DpEvent) -> None:
    text = json.dumps(events.to_json(event))
    assert events.from_json(json.loads(text)) == event


@pytest.mark.parametrize("sigma", [0.1, 1 / 3, 1e-300, 831.3100000000001])
def test_event_numbers_survive_json_exactly(sigma: float) -> None:
    event = events.gaussian_step(sigma, 1 / 7)
    again = events.from_json(json.loads(json.dumps(events.to_json(event))))
    assert again.event.noise_multiplier == sigma
    assert again.sampling_probability == 1 / 7


def test_unknown_and_broken_events_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="LaplaceDpEvent"):
        events.to_json(dp.LaplaceDpEvent(1.0))
    with pytest.raises(InputError, match="'laplace'"):
        events.from_json({"type": "laplace"})
    with pytest.raises(InputError, match="PoissonSampledDpEvent of LaplaceDpEvent"):
        events.releases(dp.PoissonSampledDpEvent(0.1, dp.LaplaceDpEvent(1.0)))
    for broken in (
        {"type": "gaussian"},
        {"type": "gaussian", "noise_multiplier": -1.0},
        {"type": "poisson_sampled", "sampling_rate": 1.5, "event": {"type": "no_op"}},
        {"type": "self_composed", "count": 0, "event": {"type": "no_op"}},
        {"type": "composed", "events": 3},
        [],
    ):
        with pytest.raises(InputError):
            events.from_json(broken)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="noise_multiplier"):
        events.gaussian_step(0.0, 0.1)
    with pytest.raises(InputError, match="sampling rate"):
        events.gaussian_step(1.0, 0.0)


def test_releases_merge_equal_events_across_a_composition() -> None:
    event = dp.ComposedDpEvent([STEP, OTHER, events.composed(STEP, 4)])
    assert events.releases(event) == ((1.1, 0.02, 5, None), (2.0, 1.0, 1, None))
    assert events.gaussian_step(2.0, 1.0) == dp.GaussianDpEvent(2.0)


def test_with_noise_changes_the_multipliers_and_nothing_else() -> None:
    """A release that is proved at whole Renyi orders only stays one: its epsilon is not to be had by PLD."""
    renyi = events.renyi_gaussian_step(1.0, 0.1)
    whole = dp.ComposedDpEvent(
        [
            dp.SelfComposedDpEvent(renyi, 5),
            events.gaussian_step(2.0, 0.2),
            events.renyi_gaussian_step(3.0, 1.0),
            dp.GaussianDpEvent(4.0),
            dp.NoOpDpEvent(),
            dp.NonPrivateDpEvent(),
        ]
    )
    halved = events.with_noise(whole, 0.5)
    assert halved == dp.ComposedDpEvent(
        [
            dp.SelfComposedDpEvent(events.renyi_gaussian_step(0.5, 0.1), 5),
            events.gaussian_step(1.0, 0.2),
            events.renyi_gaussian_step(1.5, 1.0),
            dp.GaussianDpEvent(2.0),
            dp.NoOpDpEvent(),
            dp.NonPrivateDpEvent(),
        ]
    )
    assert events.renyi_only(events.with_noise(renyi, 0.5))
    assert accountant.epsilon(events.with_noise(renyi, 0.5), 1e-5).accountant == "rdp_integer"
    with pytest.raises(InputError, match="LaplaceDpEvent"):
        events.with_noise(dp.LaplaceDpEvent(1.0), 0.5)
