"""Run the notebooks of examples/notebooks/ and write what came out into them.

    python -m benchmarks.notebooks [NAME ...] [--check]

Each runs in a fresh kernel and an empty folder, and is refused where a cell fails, warns, or shows a path of
this machine. Its metadata keep a digest of the code that the outputs are of: --check runs nothing and exits 1
where a notebook's code has another, as after an edit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
LARGEST = 400_000
SECONDS = 600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Before the first cell: pictures of one size, and no word on a package that nothing here needs.
FIRST = """
%config InlineBackend.figure_formats = ['png']
%config InlineBackend.rc = {'figure.dpi': 100}
import warnings
warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm, which transformers imports
del warnings
"""
Notebook = dict[str, Any]


class Failed(Exception):
    """A notebook does not run, or shows what it must not."""


def names() -> list[str]:
    """Return the names of all notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> Notebook:
    """Return a notebook as its file has it."""
    held: Notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return held


def text_of(part: str | list[str]) -> str:
    """Return a text that a notebook may hold in lines."""
    return part if isinstance(part, str) else "".join(part)


def code(notebook: Notebook) -> list[str]:
    """Return the code cells, in order."""
    return [text_of(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def digest(notebook: Notebook) -> str:
    """Return a sha256 of the code."""
    return hashlib.sha256(json.dumps(code(notebook)).encode()).hexdigest()


def belongs(notebook: Notebook) -> bool:
    """Whether the outputs are of this code: it was run since it was written."""
    said = notebook["metadata"].get("fedsim", {}).get("code")
    return bool(said == digest(notebook))


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a kernel that runs in `folder`: one thread, no settings of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEDSIM_", "MPL"))}
    return kept | {
        "FEDSIM_SECRETS": str(folder / "secrets"),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def executed(notebook: Notebook, folder: Path) -> Notebook:
    """Return a notebook with the outputs of a run in the empty `folder`.

    Raises:
        Failed: a cell raised, wrote to standard error, or shows a path of this machine.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    (work := folder / "work").mkdir()
    made = nbformat.reads(json.dumps(notebook), as_version=4)
    quiet = ["--log-level=ERROR"]  # that nobody else may listen on this machine is no warning of the code's
    client = NotebookClient(made, timeout=SECONDS, kernel_name="python3", extra_arguments=quiet)
    try:
        with client.setup_kernel(cwd=str(work), env=environment(folder)):
            client.kc.execute(FIRST, silent=True)
            for number, cell in enumerate(made.cells):
                client.execute_cell(cell, number, execution_count=None)
    except CellExecutionError as error:
        raise Failed(str(error)) from error
    for number, cell in enumerate(cell for cell in made.cells if cell.cell_type == "code"):
        cell.execution_count = number + 1
        cell.metadata = {}
        cell.outputs = _joined([_plain(output, work, number + 1) for output in cell.outputs])
    made.metadata = METADATA | {"fedsim": {"code": digest(made)}}
    return dict(json.loads(nbformat.writes(nbformat.from_dict(made))))


def _plain(output: Any, work: Path, number: int) -> Any:
    """Return an output without what follows from the machine; `number` is that of its cell."""
    if output.get("name") == "stderr":
        raise Failed(f"cell {number} writes to standard error:\n{output['text']}")
    said = json.dumps(output).replace(f"{work}/", "")  # the folder it ran in is the reader's
    for path in (work, ROOT, Path(sys.prefix), Path.home()):
        if len(path.parts) > 1 and str(path) in said:
            raise Failed(f"cell {number} shows the path {path}:\n{said[:2000]}")
    plain = dict(json.loads(said))
    if "execution_count" in plain:
        plain["execution_count"] = number
    if "metadata" in plain:
        plain["metadata"] = {}
    return plain


def _joined(outputs: list[Any]) -> list[Any]:
    """Return outputs with what was printed in one piece: kernels cut it by the clock."""
    joined: list[Any] = []
    for output in outputs:
        if output["output_type"] == "stream" and joined and joined[-1]["output_type"] == "stream":
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def write(name: str, notebook: Notebook) -> None:
    """Write a notebook to its file.

    Raises:
        Failed: it is too large to be looked at in a browser.
    """
    content = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if len(content) > LARGEST:
        raise Failed(f"{name} has {len(content):,} bytes, above {LARGEST:,}. Make pictures smaller.")
    (FOLDER / f"{name}.ipynb").write_text(content, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or check the notebooks; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="without .ipynb; default: all")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 where code was edited")
    options = parser.parse_args(arguments)
    chosen = options.names or names()
    if options.check:
        stale = [name for name in chosen if not belongs(read(name))]
        for name in stale:
            print(f"{name}: the outputs are of other code. Run python -m benchmarks.notebooks {name}.")
        return int(bool(stale))
    for name in chosen:
        try:
            with tempfile.TemporaryDirectory() as folder:
                write(name, executed(read(name), Path(folder).resolve()))
        except Failed as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
