"""What others bring must be the same in every process, every run of a study, and for whoever predicts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fedsim
from fedsim import loading, provenance, references
from fedsim.engine.experiment import prepare
from fedsim.engine.setup import node_for, setup_of
from fedsim.strategies import STRATEGIES
from fedsim.validate import InputError, RunError
from tests.conftest import SMALL, command, small, train

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules of one's own into the folder where fedsim is started; they are imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)

    def put(**modules: str) -> None:
        for name, text in modules.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        for name in set(sys.modules) - known:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
            if any(str(place).startswith(str(tmp_path)) for place in places):
                del sys.modules[name]
        importlib.invalidate_caches()
        provenance.code_hash.cache_clear()
        node_for.cache_clear()

    yield put
    put()


PARTITION = """
import numpy as np
def drawn(material, holders, rng):
    return np.random.default_rng({seed}).permutation(np.arange(material.examples) % holders)
"""


def test_a_partition_that_differs_from_process_to_process_is_refused(write: Write) -> None:
    """Two nodes that each hold an example would add it twice, under the noise of once."""
    for seed, agree in (("", False), ("3", True)):
        write(cut=PARTITION.format(seed=seed))
        config = small("federation.partition=cut:drawn")
        setup = setup_of(config, prepare(config).partition)
        if agree:
            assert len(node_for(setup, 0).ids) + len(node_for(setup, 1).ids) == 400
        else:
            with pytest.raises(InputError, match="an example could be at two holders"):
                node_for(setup, 0)


def test_a_whole_run_with_such_a_partition_stops_before_anything_is_released(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(cut=PARTITION.format(seed=""))
    assert command(["run", "base", *SMALL, "federation.partition=cut:drawn", "--out", "run"]) == 3
    said = capsys.readouterr().err
    assert "InputError: federation.partition=cut:drawn must give one partition" in said.splitlines()[-1]
    assert "start a new run" in said
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 1, "the header alone"


def test_examples_that_differ_from_process_to_process_are_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    experiment = prepare(config)
    setup = setup_of(config, experiment.partition, experiment.splits.train)
    assert '"data": null' in setup, "what fedsim reads itself follows from files"
    monkeypatch.setattr(references, "is_reference", lambda name: name == config.data.name)
    setup = setup_of(config, experiment.partition, experiment.splits.train)
    monkeypatch.undo()
    assert len(node_for(setup, 0).ids)
    digest = experiment.splits.train.digest()
    with pytest.raises(InputError, match="same examples in every process"):
        node_for(setup.replace(digest, "0" * len(digest)), 0)


def test_a_digest_of_examples_depends_on_every_value() -> None:
    held = prepare(small()).splits.train
    inputs, targets = held.inputs.copy(), held.targets.copy()
    inputs[-1, -1, -1] ^= 1
    targets[-1] = (targets[-1] + 1) % 10
    pairs = ((inputs, held.targets), (held.inputs, targets), (held.inputs, held.targets))
    changed = [type(held)(held.name, x, y, None, held.declared, held.mean, held.std) for x, y in pairs]
    assert len({one.digest() for one in changed}) == 3
    assert changed[-1].digest() == held.digest()


NET = """
from torch import nn
{how}
class Net(nn.Module):
    def __init__(self, input_shape, outputs):
        super().__init__()
        self.layer = nn.Linear(784, outputs)
    def forward(self, x):
        return act(self.layer(x.flatten(1)))
"""
ACT = "def act(x):\n    return x{how}\n"


@pytest.mark.parametrize(
    ("how", "modules"),
    [
        ("from helper import act", {"helper": ACT}),
        ("import helper\nact = helper.act", {"helper": ACT}),
        ("from parts.helper import act", {"parts/helper": ACT}),
        ("from parts import helper\nact = helper.act", {"parts/helper": ACT}),
        (
            "from parts import act",
            {"parts/__init__": "from parts.helper import act\n", "parts/helper": ACT},
        ),
        ("from first import act", {"first": "from helper import act\n", "helper": ACT}),
        ("from helper import act", {"helper": "import own\n" + ACT}),
    ],
    ids=[
        "from",
        "import",
        "in a folder",
        "module of a folder",
        "package",
        "by way of another",
        "in a circle",
    ],
)
def test_what_own_code_imports_is_part_of_it(write: Write, how: str, modules: dict[str, str]) -> None:
    found = []
    for act in ("", ".relu()", ""):
        write(own=NET.format(how=how), **{name: text.replace("{how}", act) for name, text in modules.items()})
        found.append(provenance.reference_hash("own:Net"))
    assert found[0] == found[2] != found[1]
    assert all(path.suffix == ".py" for path in references.sources("own:Net").values())
    assert {Path(name).name for name in references.sources("own:Net")} >= {"own.py", "helper.py"}


@pytest.mark.parametrize(
    "how",
    ["from .helper import act", "from . import helper\nact = helper.act", "from folder.helper import act"],
)
def test_what_a_module_in_a_folder_imports_is_part_of_it(write: Write, how: str) -> None:
    """A folder without __init__.py has no file, and is no package that goes along whole."""
    found = []
    for act in ("", ".relu()"):
        write(
            **{"folder/own": NET.format(how=how), "folder/helper": ACT.format(how=act), "folder/other": ACT}
        )
        found.append(provenance.reference_hash("folder.own:Net"))
        assert set(references.sources("folder.own:Net")) == {"folder/own.py", "folder/helper.py"}
    assert found[0] != found[1]


def test_what_lies_beside_a_link_is_what_is_imported(write: Write, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.py").write_text(NET.format(how="from helper import act"))
    (tmp_path / "elsewhere" / "act.py").write_text(ACT.format(how=""))
    (tmp_path / "own.py").symlink_to(tmp_path / "elsewhere" / "kept.py")
    (tmp_path / "helper.py").symlink_to(tmp_path / "elsewhere" / "act.py")
    write()
    before = provenance.reference_hash("own:Net")
    assert set(references.sources("own:Net")) == {"own.py", "helper.py"}
    (tmp_path / "elsewhere" / "act.py").write_text(ACT.format(how=".relu()"))
    assert provenance.reference_hash("own:Net") != before


def test_what_is_not_beside_it_is_no_part_of_it(write: Write) -> None:
    write(own="import json, torch\nimport fedsim\n" + NET.format(how="act = torch.tanh"), other=ACT)
    assert set(references.sources("own:Net")) == {"own.py"}


def test_a_run_is_not_resumed_and_does_not_predict_with_a_changed_helper(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    own = NET.format(how="from helper import act")
    write(own=own, helper=ACT.format(how=""))
    given = [*SMALL, "model.name=own:Net"]
    assert command(["run", "base", *given, "--out", "run"]) == 0
    images = prepare(small("model.name=own:Net")).splits.test.inputs[:3]
    before = fedsim.predict("run", images)
    write(own=own, helper=ACT.format(how=".relu()"))
    for call in (lambda: fedsim.predict("run", images), lambda: fedsim.load_run("run").model):
        with pytest.raises(InputError, match="of what it imports beside it"):
            call()
    Path("run/result.json").unlink()
    assert command(["run", "base", *given, "--out", "run", "--resume"]) == 2
    assert "is not what the run was started with" in capsys.readouterr().err
    write(own=own, helper=ACT.format(how=""))
    assert command(["run", "base", *given, "--out", "run", "--resume"]) == 0
    assert str(fedsim.predict("run", images)) == str(before)


MAP = """
import numpy as np
from fedsim.data.feature_maps import FeatureMap
class Map(FeatureMap):
    def output_shape(self, image_shape):
        return (4,)
    def version(self):
        return "1"
    def compute(self, images):
        yield (images.reshape(len(images), 4, -1).mean(-1) / {scale}).astype(np.float32)
"""


def test_predictions_are_refused_with_a_changed_feature_map(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    write(look=MAP.format(scale=255.0))
    config = [*SMALL, "data.features=look:Map", "model.name=linear"]
    assert command(["run", "base", *config, "--out", "run"]) == 0
    images = prepare(small()).splits.test.inputs[:3]
    fedsim.predict("run", images)
    write(look=MAP.format(scale=128.0))
    with pytest.raises(InputError, match="the source of look:Map"):
        fedsim.predict("run", images)


TASK = """
from dataclasses import dataclass
from fedsim.tasks.classification import Classification
@dataclass(frozen=True)
class Task(Classification):
    def predicted(self, outputs):
        return outputs * {scale}
"""


def test_predictions_are_refused_with_a_changed_task(write: Write) -> None:
    write(aim=TASK.format(scale=1.0))
    assert command(["run", "base", *SMALL, "task=aim:Task", "--out", "run"]) == 0
    images = prepare(small()).splits.test.inputs[:3]
    fedsim.predict("run", images)
    write(aim=TASK.format(scale=-1.0))
    with pytest.raises(InputError, match="the source of aim:Task"):
        fedsim.predict("run", images)


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [
        ("self.projection = torch.from_numpy(np.random.default_rng().normal(size=(784, 784)))", False),
        ("self.projection = torch.randn(784, 784)", False),
        ("self.projection = [float(torch.randn(()))]", False),
        ("self.projection = np.random.normal(size=3)", False),
        ("self.register_buffer('projection', torch.randn(784, 784))", True),
        ("self.projection = torch.arange(3)", True),
    ],
)
def test_what_a_constructor_draws_must_go_with_the_weights(write: Write, drawn: str, kept: bool) -> None:
    net = NET.format(how="import numpy as np\nimport torch\nact = torch.tanh")
    write(own=net.replace("super().__init__()", f"super().__init__()\n        {drawn}"))
    config = small("model.name=own:Net")
    if kept:
        prepare(config)
        return
    with pytest.raises(InputError, match="register_buffer"):
        prepare(config)


def test_weights_that_are_no_numbers_are_refused_before_the_start(write: Write) -> None:
    net = NET.format(how="import torch\nact = torch.tanh")
    write(
        own=net.replace(
            "outputs)\n    def", "outputs)\n        self.layer.weight.data[0, 0] = float('nan')\n    def"
        )
    )
    with pytest.raises(InputError, match=r"layer\.weight holds NaN"):
        prepare(small("model.name=own:Net"))


def _data(seed: int, splits: Sequence[str] = ("train", "test")) -> None:
    rng = np.random.default_rng(seed)
    sizes = {"train": 400, "test": 100}
    for split, n in ((split, sizes[split]) for split in splits):
        np.save(f"data/{split}_inputs.npy", np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32))
        np.save(f"data/{split}_targets.npy", rng.integers(0, 2, n))


def _of_own_code_and_data(write: Write) -> list[str]:
    """Write a model with what it imports, and arrays; return the overrides that name them."""
    Path("data").mkdir()
    _data(1)
    write(own=NET.replace("784", "6").format(how="from helper import act"), helper=ACT.format(how=""))
    given = ["train.steps=2", "model.name=own:Net", "data.name=arrays", "data.options.classes=2"]
    return [*SMALL, *given, f"data.root={Path('data').resolve()}"]


@pytest.mark.parametrize("changed", ["data", "test data", "code"])
@pytest.mark.parametrize("kind", ["compare", "repeat"])
def test_a_study_takes_no_finished_run_of_other_data_or_code(
    write: Write, kind: str, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _of_own_code_and_data(write)
    if kind == "compare":
        study = {"title": "s", "recipe": "base", "overrides": given, "variants": {"a": []}, "seeds": [0]}
        Path("study.yaml").write_text(yaml.safe_dump(study))
        arguments = ["compare", "study.yaml", "--out", "out"]
    else:
        arguments = ["repeat", "base", *given, "--seeds", "0", "--out", "out"]
    assert command(arguments) == 0
    assert command(arguments) == 0, "nothing changed: it is taken up"
    if changed in ("data", "test data"):
        _data(2, ("test",) if changed == "test data" else ("train",))
        from fedsim.data import datasets

        datasets._load.cache_clear()
    else:
        write(helper=ACT.format(how=".relu()"))
    capsys.readouterr()
    assert command(arguments) == 2
    wanted = {"data": "training examples", "test data": "examples to judge it by", "code": "own code"}
    assert f"a finished run of other {wanted[changed]}" in capsys.readouterr().err


def test_a_finished_run_of_other_code_is_not_taken_for_one_of_this(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = _of_own_code_and_data(write)
    arguments = ["run", "base", *given, "--out", "out", "--resume"]
    assert command(arguments) == 0
    assert "out holds no run to resume: a new one starts there" in caplog.text
    assert command(arguments) == 0
    write(helper=ACT.format(how=".relu()"))
    with pytest.raises(
        InputError, match=r"holds a run of other code of your own: own:Net, or what it imports"
    ):
        fedsim.train(loading.load("base", given), out="out", resume=True)
    assert command(arguments) == 2


@pytest.mark.parametrize("wrong", [{"misspelled": 84}, {"sum": 1}])
def test_a_trust_model_adds_noise_to_the_parts_there_are(
    wrong: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    central = STRATEGIES.find("central")

    def added(self: Any, *_: Any) -> dict[str, Any]:
        return {name: np.zeros(size) for name, size in wrong.items()}

    monkeypatch.setattr(central, "added", added)
    with pytest.raises(RunError, match="mend its added"):
        train(small(), tmp_path / "run")


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        ("(self.layer(x.flatten(1)).detach() + 0 * self.layer.weight.sum())", "contribution is zero"),
        ("self.layer(x.flatten(1)) / (0 * self.layer.weight.sum())", "no example's contribution is a finite"),
        ("self.layer(x.flatten(1))", ""),
    ],
)
def test_a_run_says_when_it_learns_from_noise_alone(
    write: Write, tmp_path: Path, forward: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = NET.format(how="import torch\nact = torch.nn.Identity()")
    write(own=net.replace("act(self.layer(x.flatten(1)))", forward))
    train(small("model.name=own:Net", "train.steps=2"), tmp_path / "run")
    told = [r.getMessage() for r in caplog.records if "noise alone" in r.getMessage()]
    assert len(told) == (1 if why else 0), "once"
    assert all(why in message for message in told)
    caplog.clear()
    train(small("model.name=own:Net", "train.steps=2", "monitor.public_only=true"), tmp_path / "public")
    assert "noise alone" not in caplog.text


TRACEBACK = """Traceback (most recent call last):
  File "a.py", line 1, in f
    g()
own.Mistake: first line
second
  third: of the same message"""


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (TRACEBACK, "Mistake: first line\nsecond\n  third: of the same message."),
        (
            TRACEBACK.replace("own.Mistake: first line", "RuntimeError"),
            "RuntimeError\nsecond\n  third: of the same message.",
        ),
        ("no reply", "no reply."),
        ("array 'sum' holds NaN.", "array 'sum' holds NaN."),
    ],
)
def test_what_a_failure_comes_down_to(reason: str, cause: str) -> None:
    from fedsim.engine.collect import _cause

    assert _cause(reason) == cause
