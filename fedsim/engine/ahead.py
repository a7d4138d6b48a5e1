"""Doing the next thing while the last one is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(prepare: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """Yield `prepare(item)` of each item in order, made in another thread, one ahead of what is asked for.

    What `prepare` raises comes when its item is asked for. Nothing is still being made once the iterator is
    closed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting: Future[Result] | None = None
        for item in items:
            following = thread.submit(prepare, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
