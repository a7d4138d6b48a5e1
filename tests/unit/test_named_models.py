"""Models of torchvision, timm and transformers: built as they come, and their gradients right."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import models
from fedsim.config import ModelConfig
from fedsim.grads import FlatClip, clipped_gradient_sum, cross_entropy, get_flat
from fedsim.models.transformers import TokenModel
from fedsim.validate import InputError

for package in ("timm", "transformers", "peft"):
    pytest.importorskip(package)

IMAGE, TEXT, TOKENS = (3, 32, 32), (8,), 17
BERT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
GPT = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
MISTRAL = {**BERT, "num_key_value_heads": 1, "sliding_window": 3}


def text(architecture: str, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"architecture": architecture, "config": config, **more}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet10t": ("timm", {"architecture": "resnet10t"}),
    "lcnet": ("timm", {"architecture": "lcnet_035"}),  # norm layers with an activation of their own
    "resnet18": ("torchvision", {"architecture": "resnet18"}),
    "mobilenet": ("torchvision", {"architecture": "mobilenet_v3_small"}),
    "bert": ("transformers", text("bert", BERT)),
    "bert, adapters": ("transformers", text("bert", BERT, lora={"r": 2})),
    "gpt": ("transformers", text("gpt2", GPT)),
    "gpt, language model": ("transformers", text("gpt2", GPT, head="causal_lm")),
    "gpt, language model, adapters": ("transformers", text("gpt2", GPT, head="causal_lm", lora={"r": 2})),
    "mistral, window": ("transformers", text("mistral", MISTRAL)),
}
QUICK = ["resnet10t", "mobilenet", "bert", "bert, adapters", "gpt, language model", "mistral, window"]


def named(case: str, seed: int = 3, dtype: str = "float64", bones: bool = False) -> nn.Module:
    name, options = CASES[case]
    config = ModelConfig(name, options, dtype, fix=name != "transformers")
    shape, vocabulary = (TEXT, TOKENS) if name == "transformers" else (IMAGE, None)
    outputs = TOKENS if "language" in case else 3
    if bones:
        return models.skeleton(config, shape, outputs, vocabulary)
    return models.build(config, shape, outputs, seed, vocabulary)


def tokens(examples: int) -> Tensor:
    """Texts of 8, 2, 3, ... tokens, filled up with 0."""
    drawn = torch.randint(1, TOKENS, (examples, *TEXT), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([8, *range(2, 9)][:examples])
    return drawn * (torch.arange(*TEXT) < lengths[:, None])


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("case", QUICK)
def test_values_follow_from_the_seed_alone(case: str) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    model, other = named(case, 3, "float32"), named(case, 4, "float32")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.rand(7)  # where the global generator stands must not matter
    again = named(case, 3, "float32")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(get_flat(model), get_flat(other))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("case", QUICK)
def test_skeletons_are_the_same_without_values(case: str) -> None:
    def shown(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype, bool]]:
        return [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]

    bones = named(case, bones=True)
    assert shown(bones) == shown(named(case)), "with what is tied counted once"
    assert all(value.is_meta for value in (*bones.parameters(), *bones.buffers()))
    one = tokens(1) if CASES[case][0] == "transformers" else torch.zeros(1, *IMAGE, dtype=torch.float64)
    assert bones(one.to("meta")).shape[0] == 1


@pytest.mark.parametrize("case", CASES)
def test_clipped_sums_are_right_and_fast(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """By the bookkeeping engine, by vmap, and by a plain loop; none of them falls back to a slower way."""
    model, examples = named(case), 4
    loss = next_token if "language" in case else cross_entropy
    inputs = tokens(examples)
    if CASES[case][0] != "transformers":
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(examples, *IMAGE, generator=generator, dtype=torch.float64)
    targets = inputs if "language" in case else torch.arange(examples) % 3
    trained = [p for p in model.parameters() if p.requires_grad]
    alone = []
    for one, target in zip(inputs.split(1), targets.split(1), strict=True):
        found = torch.autograd.grad(loss(model(one), target).sum(), trained)
        alone.append(torch.cat([gradient.flatten() for gradient in found]))
    lengths = torch.stack([gradient.norm() for gradient in alone])
    clip = FlatClip(float(lengths.median()))
    factors = (clip.clip_norm / (lengths + 1e-6)).clamp(max=1.0)  # the clip rule's own convention
    expected = (torch.stack(alone) * factors[:, None]).sum(0)
    for engine in ("bookkeeping", "vmap"):
        found = clipped_gradient_sum(model, inputs[:, None], targets, clip, loss=loss, engine=engine)
        assert (found.sum - expected).norm() < 1e-10 * expected.norm(), engine
        torch.testing.assert_close(found.norms, lengths, rtol=1e-10, atol=0)
    assert not [r for r in caplog.records if r.name == "fedsim.grads.ways"], caplog.messages


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == "transformers"])
def test_filling_says_nothing(case: str) -> None:
    """A text that is filled up has the outputs that the library gives for the text alone."""
    model = named(case)
    assert isinstance(model, TokenModel)
    assert model.mask == {"b": "bidirectional", "g": "causal"}.get(case[0], "plain")
    for row in tokens(6):
        length = int((row != 0).sum())
        filled = model(row[None])
        whole = model.model(input_ids=row[None, :length]).logits
        torch.testing.assert_close(
            filled[:, :length] if filled.dim() == 3 else filled, whole, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_texts_of_filling_alone_have_finite_outputs(attention: str) -> None:
    options = text("bert", {**BERT, "_attn_implementation": attention})
    model = models.build(ModelConfig("transformers", options), TEXT, 3, 0, TOKENS)
    assert torch.isfinite(model(torch.zeros(1, *TEXT, dtype=torch.long))).all()


def test_language_models_do_not_look_ahead() -> None:
    config = ModelConfig("transformers", text("bert", BERT, head="causal_lm"))
    with pytest.raises(InputError, match="is_decoder=true"):
        models.build(config, TEXT, TOKENS, 0, TOKENS)
    config = ModelConfig("transformers", text("bert", {**BERT, "is_decoder": True}, head="causal_lm"))
    assert models.build(config, TEXT, TOKENS, 0, TOKENS)(tokens(2)).shape == (2, *TEXT, TOKENS)


def test_texts_without_filling() -> None:
    config = ModelConfig("transformers", text("gpt2", GPT, head="causal_lm", padding=-1))
    model = models.build(config, TEXT, TOKENS, 0, TOKENS)
    row = tokens(2)[1:]
    torch.testing.assert_close(model(row), model.model(input_ids=row).logits)


def test_adapters_train_with_the_classifier_and_nothing_else() -> None:
    def trained(case: str) -> set[str]:
        return {name for name, p in named(case).named_parameters() if p.requires_grad}

    layers = [
        f"model.bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")
    ]
    adapters = {f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"}
    assert trained("bert, adapters") == adapters | {"model.classifier.weight", "model.classifier.bias"}
    attention = [
        f"model.transformer.h.{i}.attn.c_attn.lora_{half}.default.weight" for i in (0, 1) for half in "AB"
    ]
    assert trained("gpt, language model, adapters") == set(attention)
    options = text("mistral", MISTRAL, head="causal_lm", lora={"r": 2})  # its output layer is its own
    model = models.build(ModelConfig("transformers", options), TEXT, TOKENS, 0, TOKENS)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    options = text("bert", BERT, lora={"r": 3, "alpha": 6, "target_modules": ["key"]})
    model = models.build(ModelConfig("transformers", options), TEXT, 3, 0, TOKENS)
    layer = model.model.bert.encoder.layer[0].attention.self.key
    assert layer.scaling == {"default": 2.0}
    assert layer.lora_A["default"].weight.shape == (3, 12)


WRONG: list[tuple[str, dict[str, Any], tuple[int, ...], int | None, str]] = [
    (
        "timm",
        {"architecture": "resnet10"},
        IMAGE,
        None,
        "got 'resnet10'. Did you mean 'resnet10t'.*list_models",
    ),
    ("timm", {}, IMAGE, None, "must be a model of timm, got ''"),
    ("timm", {"architecture": "resnet10t", "pretraind": True}, IMAGE, None, "Did you mean 'pretrained'"),
    (
        "timm",
        {"architecture": "resnet10t", "options": {"depht": 3}},
        IMAGE,
        None,
        "create_model fails.*depht",
    ),
    (
        "timm",
        {"architecture": "resnet10t", "options": {"in_chans": 1}},
        IMAGE,
        None,
        "data decide the number",
    ),
    ("timm", {"architecture": "resnet10t"}, (5,), None, "must get images"),
    ("timm", {"architecture": "resnet10t"}, TEXT, TOKENS, "takes numbers, but the data are ids of 17 tokens"),
    ("small_cnn", {}, TEXT, TOKENS, "takes numbers, but the data are ids of 17 tokens"),
    ("torchvision", {"architecture": "resnet81"}, IMAGE, None, "Did you mean 'resnet18'"),
    ("torchvision", {"architecture": "resnet18", "options": {"depht": 3}}, IMAGE, None, "unexpected.*depht"),
    ("torchvision", {"architecture": "resnet18"}, (1, 32, 32), None, "3 channels.*model.name=timm"),
    ("transformers", text("brt", BERT), TEXT, TOKENS, "Did you mean 'bert'"),
    ("transformers", text("bert", {"hiden_size": 12}), TEXT, TOKENS, "Did you mean 'hidden_size'"),
    ("transformers", text("bert", {"hidden_dropout_prob": 0.1}), TEXT, TOKENS, "hidden_dropout_prob is 0.1"),
    (
        "transformers",
        text("bert", {"vocab_size": 9}),
        TEXT,
        TOKENS,
        "vocab_size is 9, but the data decide it",
    ),
    ("transformers", text("bert", BERT, head="causal"), TEXT, TOKENS, "Did you mean 'causal_lm'"),
    ("transformers", text("gpt2", GPT, head="causal_lm"), TEXT, TOKENS, "17, but 3 are asked for"),
    ("transformers", text("bert", BERT), TEXT, None, "takes token ids .* vocabulary None"),
    ("transformers", text("bert", BERT), IMAGE, TOKENS, r"takes token ids .* \(3, 32, 32\)"),
    ("transformers", text("gpt2", GPT), (20,), TOKENS, "GPT2ForSequenceClassification fails by IndexError"),
    ("transformers", text("bert", BERT, path="/x"), TEXT, TOKENS, "Give one of them"),
    ("transformers", {"config": BERT}, TEXT, TOKENS, "Give one of them"),
    ("transformers", text("bert", BERT, lora={"dropout": 0.1}), TEXT, TOKENS, "model.options.lora.dropout"),
    ("transformers", text("bert", BERT, lora={"rank": 2}), TEXT, TOKENS, "unknown key 'rank'"),
    ("transformers", text("bert", BERT, lora={"r": 0}), TEXT, TOKENS, "model.options.lora.r must be"),
    (
        "transformers",
        text("bert", BERT, lora={"target_modules": ["q"]}),
        TEXT,
        TOKENS,
        "inject_adapter_in_model",
    ),
]


@pytest.mark.parametrize(("name", "options", "shape", "vocabulary", "said"), WRONG)
def test_what_is_wrong_is_said(
    name: str, options: dict[str, Any], shape: tuple[int, ...], vocabulary: int | None, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        models.build(ModelConfig(name, options, fix=True), shape, 3, 0, vocabulary)


@pytest.mark.parametrize(
    ("case", "package", "extra"),
    [
        ("resnet10t", "timm", "timm"),
        ("bert", "transformers", "transformers"),
        ("bert, adapters", "peft", "transformers"),
    ],
)
def test_a_missing_library_is_named(
    case: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}.*pip install 'fedsim\[{extra}\]'"):
        named(case)
