"""Structure: imports go one way, nothing starts randomness but seeds.py, every configuration loads."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest

from fedsim import loading
from fedsim.config import CONFIG_DIR, Config

ROOT = Path(__file__).resolve().parents[1]
# A module may import from its own layer and from those before it.
LAYERS = [
    ["fedsim.validate", "fedsim.unknown", "fedsim.visibility", "fedsim.headline", "fedsim"],
    ["fedsim.types", "fedsim.seeds", "fedsim.digest", "fedsim.given", "fedsim.programs"],
    ["fedsim.imports", "fedsim.references", "fedsim.provenance"],
    ["fedsim.rules", "fedsim.merging", "fedsim.presets", "fedsim.config", "fedsim.registry"],
    ["fedsim.loading"],
    ["fedsim.partitions", "fedsim.augmentations", "fedsim.schedules"],
    ["fedsim.data", "fedsim.tasks", "fedsim.models"],
    ["fedsim.samplers", "fedsim.secure_sum"],
    ["fedsim.noise", "fedsim.clipping", "fedsim.grads", "fedsim.heads", "fedsim.optimizers"],
    ["fedsim.queries", "fedsim.learners"],
    ["fedsim.privacy", "fedsim.accountants"],
    ["fedsim.strategies"],
    ["fedsim.method", "fedsim.mechanism"],
    ["fedsim.axes", "fedsim.report"],
    ["fedsim.engine"],
    ["fedsim.run", "fedsim.exporting", "fedsim.flower"],
    ["fedsim.study"],
    ["fedsim.api"],
    ["fedsim.cli", "fedsim.__main__"],
]
RECIPES = sorted(p for p in CONFIG_DIR.rglob("*.yaml") if p.parent.name not in ("compare", "tune", "tuned"))
SOURCES = sorted([*(ROOT / "fedsim").rglob("*.py"), *(ROOT / "strategies").rglob("*.py")])


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return ("fedsim." if name.startswith("strategies") else "") + name.removesuffix(".__init__")


KNOWN = {_module(path) for path in SOURCES}


def _layer(module: str) -> int:
    matches = [
        (len(p), i) for i, layer in enumerate(LAYERS) for p in layer if f"{module}.".startswith(f"{p}.")
    ]
    return max(matches)[1]


@functools.cache
def _imports(path: Path) -> list[str]:
    out: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            out += [n if n in KNOWN else node.module for n in names]
    return out


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_go_one_way(path: Path) -> None:
    if path == ROOT / "fedsim" / "__init__.py":  # the front door, which imports what it is asked for
        return
    here = _layer(_module(path))
    for name in _imports(path):
        if name.split(".")[0] == "fedsim" and name != "fedsim":
            assert _layer(name) <= here, f"{_module(path)} imports {name}, which lies above it"


def test_the_layer_test_sees_an_upward_import() -> None:
    assert _layer("fedsim.engine.server") > _layer("fedsim.grads.clip")
    assert "fedsim.engine.server" in _imports(ROOT / "fedsim" / "flower" / "server_app.py")


def test_only_the_flower_folder_imports_flwr() -> None:
    for path in SOURCES:
        if "flower" not in path.relative_to(ROOT).parts:
            assert not any(name.split(".")[0] == "flwr" for name in _imports(path)), path


def test_fedsim_names_no_concrete_strategy() -> None:
    own = "fedsim.strategies"
    for path in (ROOT / "fedsim").rglob("*.py"):
        for name in _imports(path):
            assert name in (own, f"{own}.base") or not name.startswith(own), path


def test_no_global_randomness_and_no_pickle() -> None:
    banned = re.compile(
        r"np\.random\.(?!Generator|Philox)\w+|random\.seed|torch\.manual_seed|torch\.(rand|randn|randint|randperm)\((?!.*generator=)"
        r"|import random\b|import pickle|pickle\.load|allow_pickle=True|torch\.load\((?!.*weights_only=True)"
    )
    for path in SOURCES:
        if path == ROOT / "fedsim" / "references.py":  # sets them for code of the user's, and puts them back
            continue
        found = banned.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found.group() if found else ''}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(CONFIG_DIR)))
def test_every_configuration_loads(path: Path) -> None:
    assert loading.load(path).train.steps > 0


def test_base_yaml_shows_exactly_the_defaults() -> None:
    assert loading.load("base") == Config()
    text = (CONFIG_DIR / "base.yaml").read_text(encoding="utf-8")
    for field in dataclasses.fields(Config):
        for inner in (
            dataclasses.fields(field.default_factory)
            if dataclasses.is_dataclass(field.default_factory)
            else []
        ):  # type: ignore[arg-type]
            assert re.search(rf"^  {inner.name}:", text, re.M), f"{field.name}.{inner.name} is missing"


def test_modules_stay_small() -> None:
    for path in SOURCES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
