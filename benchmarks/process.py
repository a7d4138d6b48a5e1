"""Methods of a benchmark in a process of their own, which times one call when it is asked to.

So they can take turns with methods of another process, under settings that hold for a whole process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Process:
    """`python -m module *arguments` in `folder`, which calls `serve` once it is ready.

    Attributes:
        facts: what the process says of itself.

    Raises:
        RuntimeError: it ended before it was ready; its own message is on stderr.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if environment is None else dict(environment),
            cwd=folder,
        )
        self.facts: dict[str, Any] = self._answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def seconds(self, method: str) -> float:
        """CPU seconds of one call of `method`, after an untimed one."""
        assert self._process.stdin is not None
        self._process.stdin.write(method + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended with exit code {self._process.wait()}")
        return json.loads(line)


def serve(calls: Mapping[str, Callable[[], object]], facts: Mapping[str, Any]) -> None:
    """Say `facts`; then, for each line of standard input that names a method, time one call of it.

    Args:
        calls: by method; each returns when its work is done.
    """
    print(json.dumps(dict(facts)), flush=True)
    for line in sys.stdin:
        call = calls[line.strip()]
        call()
        start = time.process_time()
        call()
        print(time.process_time() - start, flush=True)
