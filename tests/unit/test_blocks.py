"""Memory that one call of the engine leaves to the next: taken over, let go, never seen in a result."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.grads import FlatClip
from fedsim.grads.batch_size import measure
from fedsim.grads.bookkeeping import Options, clipped_sum, engine, memory
from fedsim.grads.bookkeeping.memory import Blocks
from fedsim.grads.per_example import cross_entropy

LIKE = torch.zeros(0)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    memory.let_go()
    yield
    memory.let_go()


def addresses(blocks: Blocks, *shapes: tuple[int, int], like: Tensor = LIKE) -> list[int]:
    return [blocks.take(*shape, like).data_ptr() for shape in shapes]


def test_the_next_call_takes_over_what_fits() -> None:
    first, second = Blocks(), Blocks()
    before = addresses(first, (4, 1000), (4, 1000), (2, 500))
    first.leave()
    assert sorted(addresses(second, (2, 500), (4, 1000), (4, 1000))) == sorted(before)


def test_blocks_of_one_call_are_apart() -> None:
    first, second = Blocks(), Blocks()
    first.take(4, 1000, LIKE)
    first.leave()
    own, other = second.take(4, 1000, LIKE), second.take(4, 1000, LIKE)
    own.fill_(1.0)
    other.fill_(2.0)
    assert (own == 1.0).all()


def test_another_dtype_does_not_fit() -> None:
    first, second = Blocks(), Blocks()
    first.take(4, 1000, LIKE)
    first.leave()
    assert second.take(4, 1000, LIKE.double()).dtype == torch.float64


def watched(block: Tensor) -> weakref.ref[Any]:
    return weakref.ref(block.untyped_storage())


def test_other_shapes_let_the_old_blocks_go_before_they_take_more() -> None:
    first, second = Blocks(), Blocks()
    gone = watched(first.take(4, 1000, LIKE))
    first.leave()
    assert gone() is not None
    second.take(8, 1000, LIKE)
    assert gone() is None


def test_what_a_call_did_not_take_is_let_go() -> None:
    first, second = Blocks(), Blocks()
    gone = watched(first.take(4, 1000, LIKE))
    first.leave()
    second.leave()
    assert gone() is None


@pytest.mark.parametrize(("budget", "limit"), [(4 * 1999, 2**30), (2**30, 4 * 1999)])
def test_no_more_than_budget_and_limit_stays(
    budget: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_LIMIT", limit)
    blocks = Blocks(budget)
    gone = [watched(blocks.take(1, 1000, LIKE)) for _ in range(2)]
    blocks.leave()
    assert [ref() for ref in gone] == [None, None]


def test_threads_share_nothing() -> None:
    first = Blocks()
    held = first.take(4, 1000, LIKE)
    first.leave()
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(Blocks().take(4, 1000, LIKE)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != held.data_ptr()


# --- in the engine ---------------------------------------------------------------------------------------


KEPT = 6 * 4 * (64 * 27 + 64 * 576)  # bytes of six examples' gradients of both kernels


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(),
        nn.Linear(64 * 144, 5),
    )  # fmt: skip


def call(model: nn.Module, seed: int, examples: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(examples, 1, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    targets = torch.arange(examples) % 5
    rule = FlatClip(0.5)
    total, norms, _ = clipped_sum(model, inputs, targets, cross_entropy, rule, Options(**options))
    return total, norms


def idle() -> int:
    return sum(block.nbytes for blocks in memory._idle.blocks.values() for block in blocks)


def test_results_are_of_their_own_call() -> None:
    """Another batch's numbers in the blocks, or nan, change nothing, and no result lies in them."""
    model = net()
    want = [call(model, seed) for seed in (1, 2)]
    copies = [(total.clone(), norms.clone()) for total, norms in want]
    assert idle() == KEPT
    for blocks in memory._idle.blocks.values():
        for block in blocks:
            block.fill_(float("nan"))
    again = call(model, 1)
    for found, kept in zip((again, want[1], want[0]), (copies[0], copies[1], copies[0]), strict=True):
        assert torch.equal(found[0], kept[0])
        assert torch.equal(found[1], kept[1])


def test_a_failed_call_leaves_the_next_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after the norms, when all blocks are taken."""
    model = net()
    want = call(model, 1)[0]
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_weighted", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(model, 1)
    assert torch.equal(call(model, 1)[0], want)


def test_the_low_memory_mode_leaves_nothing() -> None:
    model = net()
    call(model, 1)
    assert idle() == KEPT
    call(model, 1, memory_budget=0)
    assert idle() == 0


def test_a_measured_call_pays_for_its_blocks() -> None:
    """What an earlier call left is not free to the probe of the physical batch size."""
    model = net()
    probe = measure(lambda n: call(model, 1, n), torch.device("cpu"))
    fresh = probe(16, 2**40)
    call(model, 1, 16)
    after = probe(16, 2**40)
    assert fresh is not None
    assert after is not None
    assert fresh.memory == after.memory
