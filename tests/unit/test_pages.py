"""What pages say to type, and where they point, is there: links, files, tests, commands, settings, snippets.

docs/extend.md and docs/mistakes.md have tests of their own that run what they show
(tests/examples/test_extend.py, tests/unit/test_mistakes.py).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor, nn

import fedsim
from benchmarks import compared, executed
from benchmarks.mistakes import anchor
from fedsim import loading
from fedsim.cli import _parse, parser
from fedsim.flower import client_app
from fedsim.flower.local_grid import LocalGrid
from fedsim.partitions.base import Function, Material
from fedsim.study import compare, tune

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "tests/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = ("docs", "tests", "fedsim", "benchmarks", "configs", "examples", "strategies", "results")
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
# What stands for something of the reader's, and what it may be.
PLACEHOLDERS = {"CONFIG": "quickstart", "FILE": "tune/quickstart", "NAME": "quickstart", "PATIENTS": "100"}
RUN_ELSEWHERE = ("docs/extend.md", "docs/mistakes.md")


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The code blocks of a page in these languages, "" for those without one."""
    return [content for _, language, content in BLOCK.findall(text_of(page)) if language in languages]


def prose(page: str) -> str:
    return BLOCK.sub("", text_of(page))


@functools.cache
def anchors(page: str) -> frozenset[str]:
    return frozenset(anchor(title) for title in re.findall(r"^#+ (.+)$", prose(page), re.M))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for said, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
        path, _, part = target.partition("#")
        if target.startswith("http"):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target), target
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"[{said}]({target})"
        assert ROOT in file.resolve().parents
        if part:
            assert part in anchors(file.resolve().relative_to(ROOT).as_posix()), f"[{said}]({target})"


def test_the_test_of_links_sees_a_section_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "to.md").write_text("# One\n\n## A `b` section\n\n```\n# no heading\n```\n")
    for target, there in (("to.md#a-b-section", True), ("to.md#no-heading", False), ("to.md#two", False)):
        (tmp_path / "from.md").write_text(f"[said]({target})\n")
        text_of.cache_clear()
        anchors.cache_clear()
        with contextlib.nullcontext() if there else pytest.raises(AssertionError):
            test_links_lead_somewhere("from.md")
    text_of.cache_clear()
    anchors.cache_clear()


def test_pages_that_code_and_settings_name_are_there() -> None:
    """In messages, docstrings and comments, with their sections."""
    found = set()
    for folder, ending in (("fedsim", "py"), ("strategies", "py"), ("configs", "yaml"), ("examples", "py")):
        for path in (ROOT / folder).rglob(f"*.{ending}"):
            found |= set(re.findall(r"\bdocs/[\w/]+\.md(?:#[\w-]+)?", path.read_text(encoding="utf-8")))
    assert len(found) >= 5
    for name in found:
        page, _, part = name.partition("#")
        assert (ROOT / page).is_file(), name
        assert not part or part in anchors(page), name


@functools.cache
def sources_of_results() -> frozenset[str]:
    """Names of files that some benchmark writes or reads."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py"))
    return frozenset(re.findall(r"[\w-]+\.json", text))


def mentioned(page: str) -> Iterator[str]:
    """Files and tests that stand in backticks."""
    for words in re.findall(r"`([^`\n]+)`", prose(page)):
        for word in words.split():
            if word.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and re.fullmatch(
                r"[\w./-]+(::\w+(\[.*)?)?", word
            ):
                yield word


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_mentioned_exist(page: str) -> None:
    for name in mentioned(page):
        path, _, test = name.partition("::")
        made = (*sources_of_results(), *(f"{name}.json" for name in compared.names()))
        if "NAME" in path or (path.startswith("results/") and Path(path).name in made):
            continue  # what a command writes, and may not have written yet
        assert (ROOT / path).exists() or (ROOT / "fedsim" / path).exists(), f"{page}: {name}"
        if test:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test.partition("[")[0] in functions, f"{page}: {name}"


def commands(page: str) -> list[str]:
    """What a page says to type: the lines of its blocks, and commands in backticks."""
    found = []
    for block in blocks(page, "", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            found.append(" ".join(shlex.split(line, comments=True)) and line)
    found += executed.commands(text_of(page))
    inline = re.findall(r"`((?:fedsim|flwr|make|python -m|\.venv/bin/python -m) [^`\n]+)`", prose(page))
    return [line.strip() for line in (*found, *inline) if line and "..." not in line and "…" not in line]


WORDS = {"fedsim", "flwr", "make", "python", ".venv/bin/python"}
LISTED = [
    (page, line)
    for page in PAGES
    if page not in RUN_ELSEWHERE
    for line in dict.fromkeys(commands(page))
    if line.split()[0] in WORDS
]


def test_there_are_commands_to_check() -> None:
    assert len(LISTED) > 60
    assert {line.split()[0] for _, line in LISTED} >= {"fedsim", "flwr", "make", "python"}


@pytest.mark.parametrize(("page", "line"), LISTED, ids=[f"{page}: {line[:60]}" for page, line in LISTED])
def test_a_command_is_one(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
    words = [re.sub("|".join(PLACEHOLDERS), lambda m: PLACEHOLDERS[m[0]], word) for word in words]
    if words[0] == "fedsim":
        fedsim_command(words[1:])
    elif words[0] == "flwr":
        flwr_command(words)
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", text_of("Makefile"), re.M)
        assert set(words[1:]) <= set(targets)
    else:
        python_command(words)


def fedsim_command(words: list[str]) -> None:
    """The real parser takes it, and what it names loads with its overrides; or a sentence names a command,
    and options that it has."""
    (known,) = (one.choices for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    if all(word.startswith("-") for word in words[1:]):
        own = known[words[0]] if words[0] in known else parser()
        assert {word for word in words if word.startswith("-")} <= set(own._option_string_actions)
        assert words[0] in known or words[0].startswith("-")
        return
    options = _parse(parser(), words)
    if not hasattr(options, "config"):
        return
    if options.command == "compare":
        compare.load(options.config, untuned=True)
    elif options.command == "tune":
        tune.load(options.config)
    else:
        loading.load(options.config, options.overrides)


def flwr_command(words: list[str]) -> None:
    """Keys of the run configuration are those of the app, and its settings load."""
    from flwr.common.config import parse_config_args

    assert words[1] == "run"
    app = tomllib.loads(text_of("pyproject.toml"))["tool"]["flwr"]["app"]["config"]
    given = [words[at + 1] for at, word in enumerate(words) if word == "--run-config"]
    settings = app | parse_config_args(given)
    assert settings.keys() == app.keys()
    loading.load(str(settings["config"]), shlex.split(str(settings["overrides"])), folder=None)


def python_command(words: list[str]) -> None:
    """The module is there, and has the options; code given on the line is Python."""
    if words[1] == "-c":
        compile(words[2], "<page>", "exec")
        return
    module = words[words.index("-m") + 1]
    found = importlib.util.find_spec(module)
    assert found is not None, module
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    path = Path(str(found.origin))
    files = path.parent.glob("*.py") if path.name == "__init__.py" else [path]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{module} has no {option}"


@pytest.mark.parametrize(
    ("page", "load"),
    [
        ("docs/comparisons.md", lambda path: compare.load(path, untuned=True)),
        ("docs/tuning.md", tune.load),
        ("docs/pictures.md", lambda path: loading.load(path, ["privacy.noise_multiplier=1"])),
    ],
)
def test_files_of_settings_on_a_page_load(page: str, load: object, tmp_path: Path) -> None:
    assert callable(load)
    found = blocks(page, "yaml")
    assert found
    for number, content in enumerate(found):
        (path := tmp_path / f"{number}.yaml").write_text(content, encoding="utf-8")
        load(path)


def test_every_file_of_settings_on_a_page_is_looked_at() -> None:
    with_yaml = {page for page in PAGES if blocks(page, "yaml")} - set(RUN_ELSEWHERE)
    assert with_yaml == {"docs/comparisons.md", "docs/tuning.md", "docs/pictures.md"}


def test_the_snippet_of_the_front_door_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = (one for one in blocks("docs/use.md", "python") if "fedsim.train(" in one)
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(1500, 6)).astype(np.float32), rng.integers(0, 10, 1500)
    given = {
        "images": rng.integers(0, 256, (3, 28, 28, 1), np.uint8),
        "my_module": nn.Linear(6, 10),
        "train_set": (inputs, labels),
        "test_set": [(one, int(label)) for one, label in zip(inputs[:50], labels[:50], strict=True)],
        "owner_of_each_example": rng.integers(0, 20, 1500),
    }
    exec(compile(snippet, "docs/use.md", "exec"), given)
    assert isinstance(given["run"], fedsim.Run)
    assert given["run"].epsilon <= 1.0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    (snippet,) = (one for one in blocks("docs/use.md", "python") if "torch.export.load(" in one)
    fedsim.export(given["run"], "model")
    exec(compile(snippet, "docs/use.md", "exec"), given)
    said = given["run"].predict(given["images"]).outputs
    np.testing.assert_allclose(given["logits"].softmax(1).detach().numpy(), said, rtol=1e-4, atol=1e-6)


def test_the_loop_over_settings_is_judged_by_held_out_examples_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = "train: {steps: 2, eval_every: 2}\nmonitor: {tensorboard: false, progress: false}\n"
    (tmp_path / "my.yaml").write_text(f"extends: quickstart\n{few}", encoding="utf-8")
    (snippet,) = blocks("docs/tuning.md", "python")
    held: dict[str, Any] = {}
    exec(compile(snippet, "docs/tuning.md", "exec"), held)
    assert (held["tried"].result["examples"], held["run"].result["examples"]) == (9000, 10000)
    assert "accuracy" in held["tried"].result["sensitive"]
    assert held["run"].config.optimizer.learning_rate == held["best"]
    assert held["scores"][held["best"]] == max(held["scores"].values())
    assert "3 trials on 1000 held-out private examples" in held["run"].result["tuning"]


def test_the_loop_of_your_own_trains_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it adds up is bounded and noised as it says, and the model learns."""
    (snippet,) = (one for one in blocks("docs/gradients.md", "python") if "fedsim.calibrate(" in one)
    real, asked = fedsim.clipped_gradient_sum, []

    def watched(model: nn.Module, views: Tensor, *rest: Any, **more: Any) -> Any:
        found = real(model, views, *rest, **more)
        asked.append((tuple(views.shape), float(found.sum.norm()), found.count))
        return found

    monkeypatch.setattr(fedsim, "clipped_gradient_sum", watched)
    held: dict[str, Any] = {}
    exec(compile(snippet, "docs/gradients.md", "exec"), held)
    assert len(asked) == held["steps"] == 40
    for shape, length, count in asked:
        assert shape[1:] == (1, 8)
        assert length <= shape[0] * 1.000001
        assert shape[0] == count
    sizes = np.array([count for *_, count in asked])
    assert sizes.std() > 5, "each example is drawn by itself"
    assert abs(sizes.mean() - 250) < 5 * (1000 * 0.25 * 0.75 / 40) ** 0.5
    spent = fedsim.epsilon(held["noise"].noise_multiplier, 0.25, 40, 1e-4)
    assert 2.9 < spent.value == held["noise"].achieved.value <= 3.0
    assert held["std"] == held["noise"].noise_multiplier * held["clip"].clip_norm
    added = held["noised"] - held["found"].sum
    assert float(added.std()) == pytest.approx(held["std"], rel=5 * (2 * added.numel()) ** -0.5)
    assert torch.equal(torch.cat([one.grad.flatten() for one in held["parameters"]]), held["noised"] / 250)
    right = held["model"](held["inputs"]).argmax(1) == held["targets"]
    assert right.float().mean() > 0.9


def test_the_flower_client_of_your_own_sends_a_clipped_sum_of_its_own_draw() -> None:
    """Drawn anew in every message, at the rate that the server sends; nothing else leaves."""
    (snippet,) = (one for one in blocks("docs/gradients.md", "python") if "ClientApp()" in one)
    inputs = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []

    def own_data(node: int) -> tuple[Tensor, Tensor]:
        return inputs[100 * node : 100 * node + 100], torch.zeros(100, dtype=torch.long)

    real = fedsim.clipped_gradient_sum

    def watched(model: nn.Module, views: Tensor, *rest: Any) -> Any:
        sizes.append(len(views))
        return real(model, views, *rest)

    held: dict[str, Any] = {"make_model": lambda: nn.Linear(8, 2), "own_data": own_data}
    exec(compile(snippet, "docs/gradients.md", "exec"), held)
    model, grid = nn.Linear(8, 2), LocalGrid(held["app"], 3)

    def asked(rate: float) -> list[Tensor]:
        content = RecordDict(
            {"model": ArrayRecord(model.state_dict()), "step": ConfigRecord({"sampling_rate": rate})}
        )
        messages = [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
        assert all(list(reply.content) == ["sum"] for reply in replies)
        return [torch.from_numpy(reply.content["sum"].to_numpy_ndarrays()[0]) for reply in replies]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedsim, "clipped_gradient_sum", watched)
        for one, node in zip(asked(1.0), range(3), strict=True):
            whole = real(model, own_data(node)[0][:, None], own_data(node)[1], held["FlatClip"](1.0)).sum
            torch.testing.assert_close(one, whole)
        assert not any(one.any() for one in asked(0.0)), "nobody drawn: zeros"
        first, again = asked(0.5), asked(0.5)
    assert sizes[:6] == [100] * 3 + [0] * 3
    assert all(20 < size < 80 for size in sizes[6:])
    assert not any(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_partition_of_your_own_spreads_as_it_says() -> None:
    (snippet,) = blocks("docs/data.md", "python")
    held: dict[str, Any] = {}
    exec(compile(snippet, "docs/data.md", "exec"), held)
    labels = np.random.default_rng(0).integers(0, 10, 4000)
    for holders in (30, 100):
        material = Material(4000, labels)
        found = Function(held["mostly_one_kind"]).spread(material, holders, np.random.default_rng(1))
        assert set(found) == set(range(holders))
        share = np.mean(found % 10 == labels)
        assert abs(share - (0.8 + 0.2 * 0.1)) < 5 * (0.82 * 0.18 / 4000) ** 0.5


def own_app(folder: Path) -> dict[str, Any]:
    """Write the Flower app of docs/use.md into a folder; return its [tool.flwr.app]."""
    (settings,) = blocks("docs/use.md", "toml")
    (server,) = (one for one in blocks("docs/use.md", "python") if "ServerApp()" in one)
    (folder / "my_app").mkdir(parents=True)
    (folder / "my_app" / "server.py").write_text(server)
    (folder / "my_app" / "__init__.py").write_text("")
    (folder / "pyproject.toml").write_text(settings)
    app: dict[str, Any] = tomllib.loads(settings)["tool"]["flwr"]["app"]
    return app


def test_an_app_of_your_own_trains_by_fedsims_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower accepts it; on a grid it trains, and goes on with the run. Flower's runtime itself starts it in
    tests/flower/test_simulation.py."""
    from flwr.cli.config_utils import load_and_validate
    from flwr.supercore.object_ref import load_app

    app = own_app(tmp_path / "my-app")
    load_and_validate(tmp_path / "my-app" / "pyproject.toml")
    ours = tomllib.loads(text_of("pyproject.toml"))["tool"]["flwr"]["app"]["config"]
    assert app["config"].keys() - {"report"} == ours.keys()
    monkeypatch.syspath_prepend(str(tmp_path / "my-app"))
    parts = [load_app(app["components"][name], LookupError) for name in ("serverapp", "clientapp")]
    small = "train.steps=2 monitor.progress=false monitor.tensorboard=false"
    settings = app["config"] | {"overrides": small, "out": str(tmp_path / "run")}
    settings["report"] = str(tmp_path / "said.txt")
    parts[0](LocalGrid(parts[1], 2), Context(1, 1, {}, RecordDict(), settings))
    run = fedsim.load_run(tmp_path / "run")
    assert run.ledger.steps == 2
    assert (tmp_path / "said.txt").read_text() == f"accuracy {run.score:.3f} at epsilon {run.epsilon:.2f}"


def test_a_module_of_your_own_offers_fedsims_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower finds it, and does not find it where it is imported alone."""
    from flwr.supercore.object_ref import load_app, validate

    (snippet,) = (one for one in blocks("docs/use.md", "python") if "app = client_app.app" in one)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in (
        ("client_as_shown", snippet),
        ("client_alone", "from fedsim.flower.client_app import app\n"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    there, why = validate("client_as_shown:app", project_dir=tmp_path)
    assert there, why
    assert load_app("client_as_shown:app", LookupError, tmp_path) is client_app.app
    there, why = validate("client_alone:app", project_dir=tmp_path)
    assert not there
    assert why is not None
    assert "Unable to find attribute app" in why


def test_every_snippet_is_run_somewhere() -> None:
    here = {"docs/use.md": 4, "docs/tuning.md": 1, "docs/gradients.md": 2, "docs/data.md": 1}
    assert {page for page in PAGES if blocks(page, "python")} == {*here, *RUN_ELSEWHERE}
    assert {page: len(blocks(page, "python")) for page in here} == here
    assert [page for page in PAGES if blocks(page, "toml")] == ["docs/use.md"]
