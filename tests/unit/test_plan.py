"""`fedsim check`: operations, memory and epsilon of recipes whose data and machines are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim import loading, models
from fedsim.config import ModelConfig
from fedsim.data import datasets, sizes
from fedsim.engine.metrics import numbers_of, read_steps
from fedsim.engine.run_folder import RunFolder
from fedsim.grads.cost import cost
from fedsim.study import plan
from fedsim.validate import InputError
from tests.conftest import command, small, train


def test_operations_are_those_counted_by_hand() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    found = cost(model, torch.empty(1, 3, 4, 4))
    conv, linear = 2 * 8 * 3 * 9 * 16, 2 * 128 * 10
    assert found.forward == conv + linear
    assert found.backward == conv + 2 * linear, "the input of the first layer needs no gradient"
    assert found.training == found.forward + found.backward
    assert found.parameters == found.trainable == 8 * 27 + 8 + 1280 + 10


def test_a_frozen_prefix_costs_no_backward_pass() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
    whole = cost(model, torch.empty(1, 16))
    model[0].requires_grad_(False)
    frozen = cost(model, torch.empty(1, 16))
    assert frozen.forward == whole.forward
    assert frozen.backward == 2 * 32 * 4
    assert frozen.trainable == 32 * 4 + 4 < frozen.parameters == whole.parameters
    assert frozen.output_bytes < whole.output_bytes


def test_saved_bytes_are_those_autograd_keeps() -> None:
    """On real tensors: what saved_tensors_hooks see for 8 views less what they see for 7."""
    shape = (1, 12, 12)
    config = ModelConfig("wide_resnet", {"depth": 10, "width": 1})
    found = cost(models.skeleton(config, shape, 10), torch.empty(1, *shape))
    model = models.build(config, shape, 10, 0)
    own = {p.data_ptr() for p in model.parameters()}

    def kept(views: int) -> int:
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            outputs = model(torch.zeros(views, *shape))
            torch.nn.functional.cross_entropy(outputs, torch.zeros(views, dtype=torch.long))
        return sum(t.untyped_storage().nbytes() for t in saved.values())

    assert found.saved_bytes == kept(8) - kept(7)


def test_published_sizes_are_those_of_the_data_that_is_here() -> None:
    for name in ("fashion_mnist_subset", "fashion_mnist"):
        config = loading.load("base", [f"data.name={name}"])
        try:
            held = datasets.load(config.data)
        except InputError:
            assert name == "fashion_mnist", "the embedded subset is always there"
            continue
        known = sizes.of(config)
        assert known == sizes.Size(
            len(held.train), len(held.test), held.train.example_shape, held.train.declared.size
        )


def test_sizes_follow_cuts_and_features() -> None:
    given = ["data.name=cifar10", "data.holdout_examples=5000", "data.train_examples=40000"]
    assert sizes.of(loading.load("base", given)) == sizes.Size(40_000, 5_000, (3, 32, 32), 10)
    featured = sizes.of(loading.load("base", ["data.name=fashion_mnist", "data.features=scattering"]))
    assert featured == sizes.Size(60_000, 10_000, (81, 7, 7), 10)
    with pytest.raises(InputError, match=r"data\.train_examples"):
        sizes.of(loading.load("base", ["data.name=cifar10", "data.train_examples=50001"]))
    assert sizes.of(loading.load("base", ["data.name=arrays"])) is None
    with pytest.raises(InputError, match=r"data.options.classes must be reference.data.classes 365, got 3"):
        sizes.of(loading.load("kurakin2022/places365_pretrain", ["data.options.classes=3"]))


@pytest.mark.parametrize(
    "stated", ["{train: 10, test: 5, classes: 2}", "{train: 0, test: 5, shape: [3, 8, 8], classes: 2}", "5"]
)
def test_malformed_sizes_are_refused(stated: str) -> None:
    with pytest.raises(InputError, match=r"reference\.data"):
        sizes.of(loading.load("base", ["data.name=image_folder", f"reference.data={stated}"]))


def test_both_ways_of_planning_agree() -> None:
    """Reading the embedded data, and planning from its public size, differ in the holders alone."""
    config = small("federation.partition=iid")
    size = sizes.of(config)
    assert size is not None
    read = plan.describe(config)
    unread = plan._from_sizes(config, size)
    assert unread.mechanism.facts.parameters == read["parameters"]
    assert unread.mechanism.facts.examples == read["examples"]
    assert unread.mechanism.sampling_rate == read["sampling_rate"]
    assert unread.mechanism.facts.largest_holder.value == read["holders"]["max_size"]


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no line of a table is folded


@pytest.mark.usefixtures("_wide")
def test_check_of_a_paper_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "kurakin2022/large_batch_64x"
    assert command(["check", name, "--json", "--flops-per-second", "1e12"]) == 0
    shown = json.loads(capsys.readouterr().out)["plan"]
    assert shown["examples"] == 1_281_167
    assert shown["epsilon"]["example"]["accountant"] == "rdp_objax"
    assert shown["epsilon"]["example_check"]["accountant"] == "pld"
    assert shown["epsilon"]["example_rdp"]["accountant"] == "rdp"
    assert shown["published"]["agrees"]
    assert shown["published"]["difference"]["pld"] == pytest.approx(8924.4 / 6.7e4 - 1, rel=1e-3)
    views = 12_511 * 65_536
    assert shown["flops"]["run"] == pytest.approx(views * shown["flops"]["forward and backward, one view"])
    assert shown["gpu_hours"] == pytest.approx(shown["flops"]["run"] / 1e12 / 3600)
    assert shown["learning_rate"] == 2.0 * 65_536 / 256
    assert command(["check", name]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("no claimable epsilon", "published epsilon", "6.7e+04 at delta 1e-06", "steps"):
        assert part in text, part
    assert "gpu hours" not in text
    assert command(["check", name, "--all"]) == 0
    everything = " ".join(capsys.readouterr().out.split())
    for part in ("gpu hours", "holders: median_size", "learning_rate: "):
        assert part in everything, part


@pytest.mark.usefixtures("_wide")
def test_check_marks_what_follows_from_private_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes of holders, and their epsilon without a cap; what was drawn from public sizes is public."""
    cap = ["federation.examples_per_holder_at_most=100"]
    for given, marked in (
        (["quickstart"], ["epsilon.holder", "holders"]),
        (["quickstart", *cap], ["holders"]),
        (["kurakin2022/large_batch_64x"], ["epsilon.holder"]),
    ):
        assert command(["check", *given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["plan"]["sensitive"] == marked
        assert command(["check", *given, "--all"]) == 0
        text = capsys.readouterr().out
        head = "holders (sensitive): " if "holders" in marked else "holders: "
        for name in ("min_size", "median_size", "max_size", "mean_label_entropy_bits"):
            assert f"{head}{name} " in text
        assert "holders: holders " in text, "their number is assumed public"
        assert ("sensitive: it follows from the size" in text) is ("epsilon.holder" in marked)
        assert "is not to be published" in text
    assert command(["check", "quickstart", "--json", "monitor.public_only=true"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["holders"], "holder" in plan["epsilon"]) == ({}, False)
    assert plan["sensitive"] == ["epsilon.holder", "holders"], "names what is withheld"


_STOPPED = ["privacy.target_epsilon=null", "privacy.noise_multiplier=3", "privacy.stop_at_epsilon=1"]


@pytest.mark.usefixtures("_wide")
def test_check_leads_with_epsilon_noise_steps_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["check", "quickstart", *_STOPPED]) == 0
    lines = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line[:1] == "│"]
    leading = {name.strip(): said.strip() for name, said in lines if name.strip()}
    assert [said.strip() for name, said in lines if not name.strip()] == [
        "hides whether one example took part",
        "does not hide whether a holder took part, with all its examples",
        "sensitive: it follows from the size of the largest holder",
    ]
    assert list(leading) == ["epsilon per example", "epsilon per holder", "noise", "steps", "cost"]
    assert leading["epsilon per example"].startswith(("1 (", "0.9"))
    assert leading["noise"].startswith("3 times the bound on one example's contribution")
    assert "of about 2,000 examples of 10,000" in leading["steps"]
    assert leading["steps"].endswith("stopped by the budget")


@pytest.mark.usefixtures("_wide")
def test_check_says_where_the_published_value_is_another(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["privacy.target_epsilon=null", "privacy.noise_multiplier=3"]
    assert command(["check", "de2022/cifar10_wrn_16_4_eps8", *given]) == 0
    assert "does not agree" in " ".join(capsys.readouterr().out.split())


def test_memory_grows_with_the_engine_and_the_batch() -> None:
    def node(*more: str) -> int:
        config = loading.load("de2022/cifar10_wrn_16_4_eps1", ["engine.physical_batch_size=64", *more])
        memory = plan.describe(config)["memory_bytes_without_data_and_libraries"]
        found: int = memory["node"]
        return found

    assert node("engine.physical_batch_size=128") > node()
    assert node("engine.gradients=vmap", "train.augment_multiplicity=1") > node(
        "train.augment_multiplicity=1"
    )


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_a_machine_must_compute(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["check", "quickstart", "--flops-per-second", rate]) == 2
    assert "flops-per-second" in capsys.readouterr().err


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTM(7, 5, 2), nn.GRU(5, 4), nn.Linear(4, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.gru(self.lstm(inputs)[0])[0])[:, -1]
        return found


def _attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, batch_first=True, dropout=0.0)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(144, 10))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(10)
    )


COSTED = [
    *((name, {"depth": 1} if name == "vit" else {}, (3, 32, 32)) for name in ("mlp", "small_cnn", "vit")),
    ("wide_resnet", {"depth": 10, "width": 1}, (3, 16, 16)),
    (_Recurrent, None, (9, 7)),
    (_attention, None, (9, 16)),
    (_convolutions, None, (3, 9, 9)),
]


@pytest.mark.parametrize(("make", "options", "shape"), COSTED)
def test_operations_on_the_cpu_are_those_on_the_meta_device_and_of_torchs_counter(
    make: Any, options: dict[str, Any] | None, shape: tuple[int, ...]
) -> None:
    if options is not None:
        model = models.build(ModelConfig(make, options), shape, 10, 0)
    else:
        model = make()
        model(torch.zeros(1, *shape))  # lays out what is lazy
    view, enabled = torch.zeros(1, *shape), torch.backends.mkldnn.enabled
    computed = cost(model, view)
    assert torch.backends.mkldnn.enabled == enabled
    assert all(p.grad is None for p in model.parameters())
    assert computed == cost(model.to("meta"), view)
    with FlopCounterMode(display=False) as theirs:
        model(view.to("meta")).sum().backward()
    assert computed.training == theirs.get_total_flops()


def test_grouped_convolutions_cost_their_own_products() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=4), nn.Flatten())
    found = cost(model, torch.empty(1, 8, 5, 5))
    assert found.forward == found.backward == 2 * 9 * 16 * 2 * 9


def test_the_plan_of_heads_follows_their_sums() -> None:
    """A Hessian a class from the second Newton step on: bytes, memory and operations go by the sums."""
    linear = ["model.name=linear", "train.expected_batch_size=400", "optimizer.learning_rate=1.0"]
    linear += ["optimizer.name=sgd", "optimizer.options={}"]
    one, two = (plan.describe(small("preset=dp_newton", f"train.steps={steps}", *linear)) for steps in (1, 2))
    width, packed = 785, 785 * 786 // 2
    assert one["flops"]["run"] == pytest.approx(400 * 2 * width * (width + 20))
    assert two["flops"]["run"] == pytest.approx(one["flops"]["run"] + 400 * 2 * width * (10 * width + 20))
    numbers = 7850 + packed, 7850 + 10 * packed
    for described, entries in zip((one, two), numbers, strict=True):
        memory = described["memory_bytes_without_data_and_libraries"]
        assert memory["node"] >= 8 * entries
        assert memory["server"] >= 16 * entries
        assert described["bytes_from_largest_node_per_step"] == 8 * entries


@pytest.mark.parametrize("preset", ["central_dpsgd", "local_dpsgd", "shares_dpsgd"])
def test_the_plan_says_the_noise_that_a_run_has(preset: str, tmp_path: Path) -> None:
    """Local noise is that of all holders together."""
    config = small(f"preset={preset}", "train.steps=1", "train.eval_every=1")
    train(config, tmp_path / "run")
    (line,) = read_steps(RunFolder(tmp_path / "run").metrics)
    said = plan.describe(config)["noise_std_of_mean"]
    assert said == pytest.approx(numbers_of(line)["noise_std_of_mean"], rel=1e-9)
