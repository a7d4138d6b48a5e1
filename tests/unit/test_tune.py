"""`fedsim tune`: the same trials for every variant, judged by held-out examples; and what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from fedsim import loading
from fedsim.config import CONFIG_DIR
from fedsim.data import datasets
from fedsim.engine.run_folder import RunFolder
from fedsim.flower import server_app
from fedsim.flower.client_app import app as client_app
from fedsim.flower.local_grid import LocalGrid
from fedsim.study import claimed, compare, private_tune, scored, space, tune
from fedsim.study.space import Space
from fedsim.study.tuned import Tuned
from fedsim.validate import Diverged, InputError, RunError
from tests.conftest import SMALL, command

HELD_OUT = 50
AREA = ("task.options.auc=macro", "task.options.headline=auc")
GIVEN = [s for s in SMALL if not s.startswith(("privacy.target", "privacy.noise", "optimizer.learning"))]


def written(folder: Path, **changes: Any) -> Path:
    """A tuning file of two variants, two budgets and two settings."""
    content = {
        "title": "tiny",
        "recipe": "base",
        "overrides": GIVEN,
        "variants": {"central": [], "local": ["preset=local_dpsgd"]},
        "epsilons": [2, 50],
        "trials": 3,
        "holdout_examples": HELD_OUT,
        "space": {"optimizer.learning_rate": {"low": 0.01, "high": 1.0}, "train.ema_decay": [0.0, 0.5]},
        **changes,
    }
    path = folder / "tuning.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return path


class Runner:
    """Instead of training: a score that is a function of the settings, best at rate 0.1."""

    def __init__(self) -> None:
        self.configs: list[Any] = []
        self.fail_after = math.inf
        self.diverge_above = math.inf
        self.no_loss_above = math.inf

    def __call__(self, config: Any, folder: RunFolder) -> dict[str, Any]:
        if (done := folder.finished()) is not None:
            return done
        if len(self.configs) >= self.fail_after:
            raise RunError("a node was lost")
        self.configs.append(config)
        rate = config.optimizer.learning_rate
        if rate > self.diverge_above:
            raise Diverged("not finite")
        score = 0.9 - abs(math.log10(rate / 0.1)) / 10 - config.train.ema_decay / 100
        headline = {"name": "accuracy", "unit": "%", "higher_is_better": True}
        loss = None if rate > self.no_loss_above else 1 - score
        result = {"accuracy": score, "loss": loss, "headline": headline, "seconds": 1.0}
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.write_config(config)
        folder.write_result(result)
        return result


def search(path: Path, out: Path, runner: Runner, **changes: Any) -> list[scored.Judged]:
    tuning = tune.load(path)
    for name, value in changes.items():
        object.__setattr__(tuning, name, value)
    with open(out.parent / "log", "a") as log:
        return tune.run(tuning, [], out, runner, log)


def test_all_variants_and_budgets_get_the_same_places_and_no_trial_sees_the_test_set(tmp_path: Path) -> None:
    runner = Runner()
    done = search(written(tmp_path), tmp_path / "out", runner)
    tried: dict[Any, list[Any]] = {}
    for one in done:
        tried.setdefault((one.trial.variant, one.trial.epsilon), []).append(one.trial.settings)
    assert len(tried) == 4
    assert len({tuple(settings) for settings in tried.values()}) == 1
    assert len(set(next(iter(tried.values())))) == 3
    assert {config.data.holdout_examples for config in runner.configs} == {HELD_OUT}


def test_the_best_is_chosen_and_runs_on_all_training_examples(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = search(written(tmp_path), out, Runner())
    best = max((one for one in done if one.trial.variant == "local"), key=lambda one: one.score)
    rate, ema = (item.partition("=")[2] for item in best.trial.settings)
    config = loading.load(out / "chosen" / "local-eps50.yaml")
    assert config.optimizer.learning_rate == float(rate)
    assert config.train.ema_decay == float(ema)
    assert config.strategy.name == "local"
    assert config.privacy.target_epsilon == 50
    assert config.data.holdout_examples == 0
    assert (config.tuning.mode, config.tuning.trials) == ("free", 3)
    text = (out / "chosen" / "local-eps50.yaml").read_text()
    assert all(" ".join(one.trial.settings) in text for one in done), "the whole table of trials"
    trials = json.loads((out / "trials.json").read_text())
    assert len(trials["trials"]) == 12
    assert trials["mode"] == "free"


def test_a_search_goes_on_where_it_stopped_and_more_trials_add_to_it(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "out"
    whole = search(path, tmp_path / "whole", Runner(), trials=5)
    first = Runner()
    first.fail_after = 4
    with pytest.raises(RunError, match="a node was lost"):
        search(path, out, first)
    assert len(json.loads((out / "trials.json").read_text())["trials"]) == 4
    assert not (out / "tuned.yaml").exists(), "nothing is chosen before all are judged"
    second = Runner()
    search(path, out, second)
    assert len(second.configs) == 12 - 4
    third = Runner()
    more = search(path, out, third, trials=5)
    assert len(third.configs) == 20 - 12
    assert [one.trial.settings for one in more] == [one.trial.settings for one in whole]


def test_a_search_may_make_the_settings_that_its_comparison_waits_for(tmp_path: Path) -> None:
    content = {"recipe": "base", "overrides": GIVEN, "variants": {"central": []}, "tuned": "tuned.yaml"}
    content["epsilons"] = [2]
    (tmp_path / "compared.yaml").write_text(yaml.safe_dump(content))
    path = written(tmp_path, recipe=None, overrides=None, variants=None, comparison="compared.yaml")
    with pytest.raises(InputError, match="tuned"):
        compare.load(tmp_path / "compared.yaml")
    search(path, tmp_path / "out", Runner())
    (tmp_path / "out" / "tuned.yaml").rename(tmp_path / "tuned.yaml")
    (cell,) = compare.cells(compare.load(tmp_path / "compared.yaml"), [])
    assert cell.config.tuning.trials == 3


def test_a_choice_among_some_of_the_trials_that_are_there_is_refused(tmp_path: Path) -> None:
    """The best may be among the others, which read the same examples."""
    out = tmp_path / "out"
    search(written(tmp_path), out, Runner())
    before = (out / "tuned.yaml").read_text()
    runner = Runner()
    with pytest.raises(InputError, match=r"holds 3 trials of '.*', more than trials=2.* Say --trials 3"):
        search(written(tmp_path), out, runner, trials=2)
    assert not runner.configs
    assert (out / "tuned.yaml").read_text() == before
    search(written(tmp_path), out, runner, trials=4)
    assert Tuned.read(out / "tuned.yaml").trials == 4


def test_a_folder_is_of_one_search(tmp_path: Path) -> None:
    """Else the last to end calls what it chose the best of all trials there."""
    small = {
        "variants": {"a": [], "b": []},
        "epsilons": [2],
        "trials": 2,
        "space": {"train.ema_decay": {"low": 0.1, "high": 0.9}},
    }
    out, runner = tmp_path / "out", Runner()
    search(written(tmp_path, **small), out, Runner())
    others: list[tuple[dict[str, Any], str]] = [
        ({"space": {"train.ema_decay": {"low": 0.1, "high": 0.8}}}, "space"),
        ({"spaces": {"b": {"privacy.clip_norm": [1, 2]}}}, "spaces"),
        ({"seed": 7}, "seed 0 there, 7 here"),
        ({"seeds": [0, 1]}, "seeds"),
        ({"holdout_examples": HELD_OUT + 1}, "holdout_examples"),
        ({"epsilons": [2, 3]}, "epsilons"),
        ({"variants": {"a": []}}, "variants"),
        ({"overrides": [*GIVEN, "train.steps=5"]}, "digests of recipe and overrides"),
    ]
    for own in (True, False):
        if not own:  # a folder from before there was such a file, which does not tell of overrides
            (out / "tuning.json").unlink()
            others.pop()
        held = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for changes, what in others:
            with pytest.raises(InputError, match="the folder of another search") as said:
                search(written(tmp_path, **{**small, **changes}), out, runner)
            assert what in str(said.value)
        assert not runner.configs
        assert held == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    search(written(tmp_path, **small), out, runner, trials=3)
    assert len(runner.configs) == 2, "more trials of the same search go on from those that are there"


def test_a_command_line_makes_another_search_and_speed_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path, variants={"a": []}, epsilons=[2], trials=1), tmp_path / "out"
    assert command(["tune", str(path), "train.steps=2", "--out", str(out)]) == 0
    assert command(["tune", str(path), "train.steps=2", "engine.threads=1", "--out", str(out)]) == 0
    assert command(["tune", str(path), "train.steps=3", "--out", str(out)]) == 2
    assert "the folder of another search" in capsys.readouterr().err


def test_of_two_searches_at_once_the_second_is_refused_before_its_first_trial(tmp_path: Path) -> None:
    out, second = tmp_path / "out", Runner()

    class First(Runner):
        def __call__(self, config: Any, folder: RunFolder) -> dict[str, Any]:
            if not self.configs:  # no trial has ended, so there is no trials.json
                with pytest.raises(InputError, match="the folder of another search"):
                    search(written(tmp_path, seed=7), out, second)
            return super().__call__(config, folder)

    search(written(tmp_path), out, First())
    assert not second.configs
    with pytest.raises(InputError, match="the folder of another search"):
        claimed.claim(claimed.SEARCH, out, {"space": "of one that had looked before the first wrote"})
    assert not list(out.glob("tuning.json.*"))


def test_a_search_that_is_refused_leaves_the_folder_to_one_that_is_not(tmp_path: Path) -> None:
    path, out = written(tmp_path, holdout_examples=1, overrides=[*GIVEN, *AREA]), tmp_path / "out"
    with pytest.raises(InputError, match="auc must be defined on the 1 held-out examples"):
        search(path, out, Runner())
    assert not out.exists()


def test_a_comparison_is_told_from_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["tune", "compare/label_skew"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is a comparison, which `fedsim compare` runs. A file for `fedsim tune` names it" in said


def test_trials_that_tie_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Same(Runner):
        def __call__(self, config: Any, folder: RunFolder) -> dict[str, Any]:
            better = config.privacy.target_epsilon > 10 and config.train.ema_decay == 0.5
            return {**super().__call__(config, folder), "accuracy": 0.74 + 0.01 * better}

    out = tmp_path / "out"
    done = search(written(tmp_path, variants={"a": []}, epsilons=[2, 50], trials=4), out, Same())
    best = sum(one.trial.settings[1] == "train.ema_decay=0.5" for one in done) // 2
    text = (out / "tuned.yaml").read_text()
    assert "# epsilon 2: 4 of a's trials tie; the first is taken.\n" in text
    assert (f"# epsilon 50: {best} of a's trials tie" in text) == (best > 1)
    assert "# 4 of them tie; the first is taken.\n" in (out / "chosen" / "a-eps2.yaml").read_text()
    assert Tuned.read(out / "tuned.yaml").chosen[0].settings == list(done[0].trial.settings)
    search(written(tmp_path), tmp_path / "other", Runner())
    assert "tie" not in (tmp_path / "other" / "tuned.yaml").read_text()
    path = written(tmp_path, variants={"a": []}, epsilons=[2], trials=2)
    still = ["train.steps=1"]
    path.write_text(path.read_text().replace("low: 0.01", "low: 1.0e-9").replace("high: 1.0", "high: 2.0e-9"))
    assert command(["tune", str(path), *still, "--out", str(tmp_path / "still")]) == 0
    assert "At epsilon 2, 2 of a's trials tie; the first is taken." in capsys.readouterr().out


def test_a_trial_without_a_score_says_why(tmp_path: Path) -> None:
    class NoArea(Runner):
        def __call__(self, config: Any, folder: RunFolder) -> dict[str, Any]:
            held = super().__call__(config, folder)
            return held if config.train.ema_decay == 0.0 and not self.none else {**held, "accuracy": None}

        none = False

    out, runner = tmp_path / "out", NoArea()
    search(written(tmp_path, trials=4), out, runner)
    assert " accuracy is not defined  " in (out / "chosen" / "local-eps50.yaml").read_text()
    runner.none = True
    with pytest.raises(RunError, match=r"of 4: accuracy is not defined\. Judge by more examples"):
        search(written(tmp_path, trials=4), tmp_path / "other", runner)


@pytest.mark.parametrize(
    "variants", [["lr a", "lr_a"], ["a", "a "], ["x" * 100 + "a", "x" * 100 + "b"], ["A", "a"], ["..b", "b"]]
)
def test_variants_whose_chosen_settings_would_share_a_file_are_refused(
    variants: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, variants={name: [] for name in variants})
    with pytest.raises(InputError, match="names that are told apart everywhere"):
        tune.load(path)
    path = written(tmp_path, variants={"a-eps2": ["privacy.target_epsilon=2"], "a": []})
    with pytest.raises(InputError, match=r"is a-eps2(-seed0-[0-9a-f]{8})?\. Rename a variant"):
        tune.trials(tune.load(path), [])


def test_runs_that_diverge_are_trials_that_lost(tmp_path: Path) -> None:
    runner = Runner()
    runner.diverge_above = 0.1
    done = search(written(tmp_path, trials=4), tmp_path / "out", runner)
    assert any(math.isnan(one.score) for one in done)
    assert all(not math.isnan(one.score) for one in scored.chosen(done).values())
    runner = Runner()
    runner.diverge_above = 0.0
    with pytest.raises(RunError, match=r"of 3: all diverged\. Lower the learning rates"):
        search(written(tmp_path), tmp_path / "other", runner)


def test_a_trial_whose_loss_is_no_number_has_lost_whatever_its_score(tmp_path: Path) -> None:
    runner = Runner()
    runner.no_loss_above = 0.05  # the best score is at 0.1
    done = search(written(tmp_path, trials=8), tmp_path / "out", runner)
    lost = [math.isnan(one.score) for one in done]
    assert any(lost)
    assert not all(lost)
    for best in scored.chosen(done).values():
        (rate,) = [float(s.partition("=")[2]) for s in best.trial.settings if "learning_rate" in s]
        assert rate <= 0.05


def test_lower_is_better_where_the_metric_says_so() -> None:
    trials = [scored.Trial("a", None, i, (), (), ()) for i in range(3)]
    results = [
        {"x": x, "headline": {"name": "x", "unit": "", "higher_is_better": False}, "seconds": 1}
        for x in (2.0, 1.0, 3.0)
    ]
    done = [scored.judged(trial, [result]) for trial, result in zip(trials, results, strict=True)]
    assert scored.chosen(done)["a", None].trial.number == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, "either recipe or comparison"),
        ({"space": None}, "needs a space"),
        ({"space": {"optimizer.learning_rate": 0.1}}, "a list of different values or a range"),
        ({"space": {"optimizer.learning_rate": [0.1, 0.1]}}, "a list of different values or a range"),
        ({"space": {"optimizer.learning_rate": {"low": 0, "high": 1}}}, "low below high, above 0"),
        ({"space": {"optimizer.learning_rate": {"low": 1, "hihg": 2}}}, "high"),
        ({"holdout_examples": None}, "holdout_examples"),
        ({"trials": 0}, "trials"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"spaces": {"centrall": {"train.steps": [1, 2]}}}, "central"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune.load(written(tmp_path, **changes))


def test_a_setting_that_a_variant_does_not_read_is_refused_before_the_first_run(tmp_path: Path) -> None:
    runner = Runner()
    path = written(
        tmp_path, space={"optimizer.options.momentum": [0.5, 0.9], "optimizer.options.beta1": [0.9, 0.8]}
    )
    with pytest.raises(InputError, match="variant 'central'"):
        search(path, tmp_path / "out", runner)
    assert not runner.configs


def test_a_variant_may_have_settings_of_its_own(tmp_path: Path) -> None:
    local = {"train.ema_decay": [0.9, 0.95], "privacy.clip_norm": [1, 2], "optimizer.learning_rate": None}
    path = written(tmp_path, spaces={"local": local})
    done = search(path, tmp_path / "out", Runner())
    by_variant = {one.trial.variant: one.trial.settings for one in done}
    assert len(by_variant["central"]) == 2
    assert len(by_variant["local"]) == 2
    assert not any("learning_rate" in setting for setting in by_variant["local"])
    assert any("ema_decay=0.9" in setting for setting in by_variant["local"])


def test_a_score_does_not_choose_the_unit_that_is_protected(tmp_path: Path) -> None:
    space = {"preset": ["central_dpsgd", "dp_fedavg"]}
    with pytest.raises(InputError, match=r"must protect one unit, got example and holder.*a variant of each"):
        tune.trials(tune.load(written(tmp_path, space=space, variants={"any": []})), [])


def test_a_comparison_takes_up_what_was_chosen_for_the_nearest_budget(tmp_path: Path) -> None:
    search(written(tmp_path), tmp_path / "out", Runner())
    held = Tuned.read(tmp_path / "out" / "tuned.yaml")
    content = {
        "title": "c", "recipe": "base", "overrides": GIVEN, "seeds": [0], "epsilons": [1, 8, 200],
        "variants": {"central": [], "local": ["preset=local_dpsgd"]}, "tuned": "out/tuned.yaml",
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    cells = compare.cells(compare.load(tmp_path / "c.yaml"), [])
    of = {(entry.variant, entry.epsilon): entry.settings for entry in held.chosen}
    for cell in cells:
        nearest = 2 if cell.epsilon in (1, 8) else 50
        rate = float(of[cell.variant, nearest][0].partition("=")[2])
        assert cell.config.optimizer.learning_rate == rate
        assert cell.config.tuning.mode == "free"
    loaded = compare.load(tmp_path / "c.yaml")
    other = compare.cells(loaded, ["optimizer.learning_rate=3"])
    assert {cell.config.tuning.mode for cell in other} == {"free"}, "the rest of what was chosen still runs"
    none = held.chosen[0].settings
    alone = [cell for cell in compare.cells(loaded, none) if cell.variant == held.chosen[0].variant]
    assert {cell.config.tuning.mode for cell in alone} == {None}, "nothing that was chosen runs"
    more = ["train.steps=7", "data.holdout_examples=50"]
    shorter = compare.cells(loaded, more)
    assert {cell.config.tuning.mode for cell in shorter} == {"free"}
    said = compare._chosen(loaded, shorter, more)
    assert re.search(r"In the search train\.steps was \d, not 7\. ", said)
    assert "among those of these scores" in said
    content["variants"] = {"others": []}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="'others' has no tuned settings"):
        compare.cells(compare.load(tmp_path / "c.yaml"), [])


def test_places_cover_the_space_and_independent_ones_are_independent() -> None:
    places = space.spread(64, 2, 3)
    assert np.array_equal(space.spread(16, 2, 3), places[:16])
    assert not np.array_equal(space.spread(16, 2, 4), places[:16])
    assert {tuple(row) for row in np.floor(8 * places).astype(int)} == {
        (i, j) for i in range(8) for j in range(8)
    }
    drawn = np.array([space.independent(i, 2, 0) for i in range(4000)])
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.08
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.08


def test_values_of_a_space() -> None:
    held = Space.of(
        {"a": {"low": 0.01, "high": 100}, "b": {"low": 0, "high": 1, "scale": "linear"}, "c": [1, None]}, "s"
    )
    assert held.at([0.5, 0.25, 0.0]) == ["a=1.0", "b=0.25", "c=1"]
    assert held.at([0.0, 0.999999, 0.99]) == ["a=0.01", "b=1.0", "c=null"]
    assert held.at_the_edge([0.01, 0.5, 0.0]) == ["a"]
    listed = Space.of({"a": [0.3, 0.1, 3], "b": ["x", "y"], "c": [True, False], "d": [5]}, "s")
    assert listed.at_the_edge([0.0, 0.0, 0.0, 0.0]) == []
    assert listed.at_the_edge([0.4, 0.9, 0.9, 0.9]) == listed.at_the_edge([0.9, 0.0, 0.0, 0.0]) == ["a"]
    said = {item for corner in held.corners() for item in corner}
    assert said == {"a=0.01", "a=100.0", "b=0.0", "b=1.0", "c=1", "c=null"}


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "tune").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_searches_have_valid_trials(path: Path) -> None:
    tuning = tune.load(path)
    object.__setattr__(tuning, "trials", 2)
    assert tune.trials(tuning, [])


def test_the_command_searches_and_what_it_chose_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, variants={"central": []}, epsilons=[50], trials=2)
    assert command(["tune", str(path), "train.steps=2"]) == 0
    said = capsys.readouterr().out
    assert "no epsilon counts that" in said
    chosen = Path("runs/tune/tiny/chosen/central-eps50.yaml")
    assert str(chosen) in said
    assert command(["run", str(chosen), "--out", "run"]) == 0
    assert "settings chosen by 2 trials" in capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert result["examples"] == 400
    assert "epsilon does not count that" in result["tuning"]


PRIVATE = {"variants": {"central": []}, "epsilons": [50], "trials": 3, "seed": 2}


def private(path: Path, out: Path, *more: str) -> int:
    return command(["tune", str(path), "--private", "--out", str(out), "train.steps=2", *more])


def test_a_private_search_releases_the_best_and_nothing_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **PRIVATE)
    kept, out = tmp_path / "kept", tmp_path / "out"
    assert private(path, kept, "--keep") == 0
    trials = [json.loads(p.read_text()) for p in (kept / "runs").glob("*/result.json")]
    assert len(trials) >= 2, "the seed was chosen so"
    assert private(path, out) == 0
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    names = ("config.yaml", "final.safetensors", "ledger.jsonl", "model.json", "result.json")
    assert left == ["outcome.json", "search.json", *(f"winner/{name}" for name in names)]
    result = json.loads((out / "winner" / "result.json").read_text())
    assert result["sensitive"] == []
    assert not {"holder_scores", "largest_holder", "seconds"} & set(result)
    outcome = json.loads((out / "outcome.json").read_text())
    exact = {trial["parameters_sha256"]: trial["accuracy"] for trial in trials}
    assert result["parameters_sha256"] in exact
    assert outcome["score"] != exact[result["parameters_sha256"]], "the score has noise"
    assert outcome["epsilon"]["value"] == pytest.approx(50, rel=2e-3)
    assert outcome["epsilon"]["accountant"] == "rdp"
    assert command(["epsilon", str(out / "winner"), "--json"]) == 0
    capsys.readouterr()
    for name in ("outcome.json", "winner/final.safetensors"):
        assert (out / name).read_bytes() == (kept / name).read_bytes(), "kept or not, the same is released"
    before = (out / "outcome.json").stat().st_mtime_ns
    assert private(path, out) == 0
    assert (out / "outcome.json").stat().st_mtime_ns == before, "a search that ended is not begun again"
    capsys.readouterr()
    assert private(path, out, "optimizer.weight_decay=0.1") == 2
    assert "folder of another search" in capsys.readouterr().err
    shutil.rmtree(out / "winner")
    assert private(path, out) == 3
    assert "ended with a model, and" in capsys.readouterr().err
    assert not (out / "winner").exists(), "nor is another one released"


def test_a_private_search_that_was_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim import api

    path = written(tmp_path, **PRIVATE)
    assert private(path, tmp_path / "whole") == 0
    real, calls = api.run, []

    def once(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RunError("a node was lost")
        return real(*args, **named)

    monkeypatch.setattr(api, "run", once)
    assert private(path, tmp_path / "out") == 3
    assert not (tmp_path / "out" / "outcome.json").exists()
    assert private(path, tmp_path / "out") == 0
    for name in ("outcome.json", "winner/final.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_secret_noise_and_what_was_hidden_are_gone_afterwards(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert private(written(tmp_path, **PRIVATE), out, "privacy.noise_source=secure") == 0
    assert not (out / "hidden.json").exists()
    assert not (out / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"train.steps": [2, 3]}}, "train.steps=3 changes it"),
        ({"space": {"train.expected_batch_size": {"low": 20, "high": 60}}}, "changes it"),
        ({"space": {"task.options.headline": ["accuracy", "loss"]}}, "compared by one score"),
        (
            {"variants": {"a": ["preset=dp_fedavg"]}, "space": {"query.options.local_epochs": [1, 2]}},
            "protects a holder",
        ),
        (
            {"variants": {"a": ["preset=nonprivate", "privacy.clip_norm=1"]}, "epsilons": []},
            "protects nobody",
        ),
        ({"epsilons": [1, 2]}, "one variant at one budget"),
        ({"seeds": [0, 1]}, "one variant at one budget"),
        ({"distribution": "uniform"}, "distribution"),
        ({"overrides": [*GIVEN, "task.options.headline=loss"]}, "judged by loss"),
    ],
)
def test_what_cannot_be_searched_privately_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **{**PRIVATE, "trials": 5, **changes})
    assert command(["tune", str(path), "--private", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_trial_of_another_event_than_the_ends_of_the_space_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ends of the space have one event, and what was drawn between them has another."""
    path = written(tmp_path, **{**PRIVATE, "trials": 8, "space": {"train.ema_decay": [0.0, 0.5]}})
    tuning = tune.load(path)
    corners = list(tune.space_of(tuning, "central").corners())
    assert len(corners) == 2
    real = Space.at

    def between(self: Space, place: Any) -> list[str]:
        return [*real(self, place), "train.expected_batch_size=30"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Space, "at", between)
        assert private(path, tmp_path / "out") == 2
    assert "train.expected_batch_size=30 changes it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_the_score_costs_at_no_order_more_than_training() -> None:
    from fedsim.engine.experiment import prepare
    from fedsim.privacy import accountant, events

    given = ["privacy.target_epsilon=3", "tuning.mode=private", "tuning.trials=10"]
    experiment = prepare(loading.load("base", [*GIVEN, *given]))
    std = private_tune.score_std(experiment)
    event, _ = events.apart(experiment.mechanism.total_event(experiment.mechanism.steps))
    renyi = accountant.named("rdp")
    curve = renyi.curve(accountant.parts_of(event))  # type: ignore[attr-defined]
    orders = np.array(renyi.orders)  # type: ignore[attr-defined]
    score = orders / (2 * std**2)
    assert np.all(score <= curve * (1 + 1e-9))
    assert np.any(score >= curve * (1 - 1e-9)), "and no more noise than that"
    result = {"accuracy": 0.5, "headline": {"name": "accuracy", "unit": "%", "higher_is_better": True}}
    keys = [bytes([i % 256, i // 256]) * 16 for i in range(4000)]
    drawn = np.array([private_tune.noisy_score(result, 100, std, key) for key in keys])
    assert stats.kstest((100 * drawn - 50) / std, "norm").pvalue > 1e-4


def test_a_winner_is_not_trained_again_under_the_epsilon_of_its_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor anything else whose configuration says that a search is counted."""
    out, again = tmp_path / "out", str(tmp_path / "again")
    assert private(written(tmp_path, **PRIVATE), out) == 0
    winner = str(out / "winner" / "config.yaml")
    by_hand = ["base", *SMALL, "tuning.mode=private", "tuning.trials=10"]
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"recipe": "base", "overrides": by_hand[1:], "variants": {"a": []}})
    )
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for words in (
        ["run", winner, "--out", again],
        ["run", winner, "--out", again, "--backend", "simulation"],
        ["run", *by_hand, "--out", again],
        ["verify", winner, "--out", again],
        ["repeat", winner, "--seeds", "0", "--out", again],
        ["compare", "c.yaml", "--out", again],
        ["check", winner],
        ["tune", str(written(tmp_path, overrides=[*GIVEN, *by_hand[-2:]])), "--out", again],
    ):
        assert command(words) == 2, words
        said = capsys.readouterr().err
        assert "release of its own" in said, words
        assert "Set tuning.mode=free" in said, words
        assert not Path(again).exists(), words
    assert command(["run", winner, "--out", str(out / "winner"), "--resume"]) == 0, "it is returned as it is"
    for words in (["epsilon", str(out / "winner")], ["export", str(out / "winner"), "--out", "model.pt2"]):
        assert command(words) == 0, words
    assert command(["run", winner, "--out", again, "tuning.mode=free", "train.steps=2"]) == 0
    assert "epsilon does not count that" in json.loads((Path(again) / "result.json").read_text())["tuning"]


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_a_range_of_whole_numbers_has_all_of_them_and_no_others(scale: str, tmp_path: Path) -> None:
    space_ = {
        "train.steps": {"low": 3, "high": 9, "scale": scale},
        "strategy.options.local_steps": {"low": 2, "high": 5, "scale": scale},
        "optimizer.learning_rate": {"low": 1, "high": 9, "scale": scale},
        "train.expected_batch_size": {"low": 20, "high": 60, "scale": scale},
    }
    path = written(tmp_path, variants={"a": ["preset=local_dpsgd"]}, space=space_)
    held = tune.space_of(tune.load(path), "a")
    assert held.integers == {"train.steps", "strategy.options.local_steps"}
    places = (np.arange(7000) + 0.5) / 7000
    tried = [held.at([u, u, u, u])[-1] for u in places]
    counts = {value: tried.count(value) for value in tried}
    assert list(counts) == [f"train.steps={k}" for k in range(3, 10)]
    shares = (
        np.full(7, 1 / 7)
        if scale == "linear"
        else np.log(np.arange(4, 11) / np.arange(3, 10)) / np.log(10 / 3)
    )
    assert np.allclose([count / 7000 for count in counts.values()], shares, atol=1e-3)
    last = math.nextafter(1.0, 0.0)
    assert [held.at([u] * 4)[-1] for u in (0.0, last)] == ["train.steps=3", "train.steps=9"]
    said = {item for corner in held.corners() for item in corner}
    assert {"train.steps=3", "train.steps=9", "strategy.options.local_steps=2"} <= said
    middle = [0.5, 0.5, 0.5]
    at_end = [u for u in places if held.at_the_edge([*middle, u]) == ["train.steps"]]
    assert {held.at([*middle, u])[-1] for u in at_end} == {"train.steps=3", "train.steps=9"}
    assert len(at_end) == counts["train.steps=3"] + counts["train.steps=9"], "and no others are at an edge"
    assert tune.trials(tune.load(path), []), "the configurations take them"
    space_["train.steps"]["low"] = 2.5
    with pytest.raises(InputError, match="low and high must be whole numbers"):
        tune.load(written(tmp_path, space=space_))


def test_a_parameter_of_ones_own_class_is_a_whole_number_if_its_type_or_default_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counted_nets.py").write_text(
        "from __future__ import annotations\n"
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, outputs, width=8, depth: int = 2, rate=0.5, deep=False, other=None):\n"
        "        super().__init__(784, outputs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [f"model.options.{name}" for name in ("width", "depth", "rate", "deep", "other", "missing")]
    variants = {"a": ["model.name=counted_nets:Net"]}
    path = written(tmp_path, variants=variants, space={name: {"low": 1, "high": 4} for name in names})
    assert tune.space_of(tune.load(path), "a").integers == {"model.options.width", "model.options.depth"}


RANGE = {"low": 1, "high": 2}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("seed", "the seeds of `seeds`"),
        ("data.holdout_examples", "`holdout_examples`"),
        ("data.test_examples", "`holdout_examples`"),
        ("data", "`holdout_examples`"),
        ("tuning", "writes there how it chose"),
        ("tuning.trials", "writes there how it chose"),
        ("privacy", "`epsilons`"),
        ("privacy.target_epsilon", "`epsilons`"),
        ("privacy.delta", "`epsilons`"),
        ("privacy.noise_multiplier", "`epsilons`"),
        ("privacy.accountant", "`epsilons`"),
        ("data.name", "compared by one score"),
        ("task", "compared by one score"),
        ("engine.threads", "changes no result"),
        ("title", "changes no result"),
        ("train.eval_every", "changes no result"),
        ("data.root", "changes no result"),
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["space", "spaces"])
def test_what_a_search_fixes_or_a_score_must_not_decide_is_not_searched(
    setting: str, reason: str, own: bool, tmp_path: Path
) -> None:
    """It would be tried, not applied, and then be called chosen."""
    for values in ([1, 2], RANGE):
        given = {"spaces": {"local": {setting: values}}} if own else {"space": {setting: values}}
        with pytest.raises(InputError, match=f"{setting} must not be searched") as said:
            tune.load(written(tmp_path, **given))
        assert reason in str(said.value)
        assert "space of " in str(said.value)


def test_noise_may_be_searched_where_a_budget_ends_the_run(tmp_path: Path) -> None:
    given = [item for item in GIVEN if not item.startswith("privacy.")]
    space_ = {"privacy.noise_multiplier": {"low": 1, "high": 4}}
    stopped = ["privacy.stop_at_epsilon=50", "privacy.noise_multiplier=2"]
    assert tune.load(written(tmp_path, overrides=[*given, *stopped], epsilons=None, space=space_))
    with pytest.raises(InputError, match="`epsilons`"):
        tune.load(written(tmp_path, overrides=[*given, *stopped], space=space_))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=0.3", "it is searched"),
        ("train={ema_decay: 0.3}", "train.ema_decay: it is searched"),
        ("data.holdout_examples=7", "`holdout_examples`"),
        ("data.test_examples=7", "`holdout_examples`"),
        ("tuning.trials=7", "writes there how it chose"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--private"]], ids=["free", "private"])
def test_overrides_do_not_come_in_place_of_what_is_searched(
    override: str, message: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **PRIVATE)
    assert command(["tune", str(path), override, *more, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "must not be set for all trials" in said
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "seed",
        "privacy.noise_source",
        "privacy.noise_multiplier",
        "privacy.target_epsilon",
        "preset",
        "strategy",
        "strategy.options.min_survivors",
        "query",
        "sampler.name",
        "noise",
        "federation.holders",
        "federation.partition",
        "federation.availability",
        "data.train_examples",
    ],
)
def test_a_private_search_has_trials_of_one_mechanism_that_ask_the_same_holders(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **{**PRIVATE, "space": {setting: ["seeded", "secure"]}})
    assert command(["tune", str(path), "--private", "--out", str(tmp_path / "out")]) == 2
    assert f"{setting} must not be searched" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trials", [1, 10**7])
def test_the_mean_number_of_trials_is_above_one(
    trials: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **{**PRIVATE, "trials": trials})
    assert private(path, tmp_path / "out") == 2
    assert f"must be above 1 and at most 1e+06, got {float(trials)!r}" in capsys.readouterr().err


def test_free_and_private_searches_have_folders_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **PRIVATE)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "search.json").write_text('{"search": "of another"}')
    assert command(["tune", str(path), "--out", str(tmp_path / "hidden"), "train.steps=2"]) == 2
    assert "folder of a private search" in capsys.readouterr().err
    for left in ("runs/central-eps50-seed0-0123", "trials.json"):
        (tmp_path / left.partition("/")[0] / "free" / left).mkdir(parents=True)
        out = tmp_path / left.partition("/")[0] / "free"
        assert private(path, out) == 2
        assert "not private" in capsys.readouterr().err
        assert not (out / "search.json").exists()


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_a_private_search_that_ended_says_so_and_is_not_one_of_other_examples(
    noise: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = written(tmp_path, **PRIVATE), tmp_path / "out"
    given = f"privacy.noise_source={noise}"
    assert private(path, out, given) == 0
    assert "finished before" not in capsys.readouterr().out
    released = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert private(path, out, given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "finished before: nothing was drawn" in said
    assert ("Nothing tells whether the examples are still the same" in said) == (noise == "secure")
    real = datasets.load

    def another(*args: Any, **named: Any) -> Any:
        splits = real(*args, **named)
        targets = splits.train.targets.copy()
        targets[7] = (targets[7] + 1) % 10
        return dataclasses.replace(splits, train=dataclasses.replace(splits.train, targets=targets))

    monkeypatch.setattr(datasets, "load", another)
    assert private(path, out, given) == (2 if noise == "seeded" else 0)
    if noise == "seeded":
        said = capsys.readouterr().err
        assert "of other training examples" in said
        assert "release of its own" in said
    assert released == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_comparison_beside_its_tuning_file_needs_no_ending(tmp_path: Path) -> None:
    content = {"recipe": "base", "overrides": GIVEN, "variants": {"central": []}}
    (tmp_path / "c_odd.yaml").write_text(yaml.safe_dump(content))
    for name in ("c_odd", "c_odd.yaml"):
        tuning = tune.load(written(tmp_path, recipe=None, overrides=None, variants=None, comparison=name))
        assert list(tuning.variants) == ["central"]
    for name, near in (("c_od", "c_odd"), ("trust_model", "compare/trust_models")):
        with pytest.raises(InputError, match=f"(Near names:|Did you mean) .*{near}") as said:
            tune.load(written(tmp_path, recipe=None, overrides=None, variants=None, comparison=name))
        assert len(str(said.value)) < 400
    with pytest.raises(InputError, match="There are base, quickstart") as said:
        tune.load(written(tmp_path, recipe="qzx"))
    assert len(str(said.value)) < 400, "not all 180 of them"


def test_nor_by_flowers_own_command(tmp_path: Path) -> None:
    """`flwr run` comes to the server without the front door."""
    given = shlex.join([*SMALL, "tuning.mode=private", "tuning.trials=10"])
    wanted = {"config": "base", "overrides": given, "out": str(tmp_path / "run"), "resume": False}
    with pytest.raises(InputError, match="release of its own"):
        server_app.main(LocalGrid(client_app, 2), SimpleNamespace(run_config=wanted))
    assert not (tmp_path / "run").exists()
