"""Published weights in models of libraries: the body as in the file, another head drawn anew."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedsim import models
from fedsim.config import ModelConfig
from fedsim.grads import get_flat
from fedsim.validate import InputError
from tests.unit.test_named_models import CASES, IMAGE, TEXT, TOKENS, named


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_published_weights_of_torchvision(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def model(outputs: int, seed: int, **options: Any) -> nn.Module:
        config = ModelConfig("torchvision", {"architecture": "squeezenet1_1", **options}, fix=True)
        return models.build(config, IMAGE, outputs, seed)

    file, held = tmp_path / f"weights.{suffix}", model(7, 1).state_dict()
    torch.save(held, file) if suffix == "pth" else save_file(held, file)
    with caplog.at_level(logging.INFO):
        found = model(4, 2, weights=str(file)).state_dict()
    assert "drawn anew: classifier.1.bias, classifier.1.weight" in caplog.text
    fresh = {name for name in held if held[name].shape != found[name].shape}
    assert fresh == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(held[name], found[name]) for name in held.keys() - fresh)
    for options, said in (
        ({"weights": "weights.pth"}, "absolute path"),
        ({"weights": str(tmp_path / "none.pth")}, "must be a .pth or .safetensors file"),
        (
            {"weights": str(file), "architecture": "resnet18"},
            "weights of model.options.architecture.*Missing",
        ),
    ):
        with pytest.raises(InputError, match=said):
            model(4, 2, **options)
    held["features.0.weight"] = held["features.0.weight"][:5]
    torch.save(held, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"size mismatch for features\.0\.weight"):
        model(4, 2, weights=str(tmp_path / "other.pth"))


def test_published_models_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = named("bert", dtype="float32").model
    first.save_pretrained(tmp_path)

    def loaded(outputs: int, vocabulary: int = TOKENS, **options: Any) -> Any:
        config = ModelConfig("transformers", {"path": str(tmp_path), **options})
        return models.build(config, TEXT, outputs, 5, vocabulary).model

    same, wider, again = loaded(3), loaded(4), loaded(4)
    assert all(torch.equal(v, same.state_dict()[name]) for name, v in first.state_dict().items())
    assert all(torch.equal(v, wider.bert.state_dict()[name]) for name, v in first.bert.state_dict().items())
    assert wider.classifier.out_features == 4
    assert torch.equal(wider.classifier.weight, again.classifier.weight)
    with caplog.at_level(logging.INFO):
        loaded(4, lora={"r": 2})
    assert "drawn anew: classifier.bias, classifier.weight" in caplog.text
    with pytest.raises(InputError, match="knows 17 tokens, but the data have a vocabulary of 18"):
        loaded(3, 18)
    with pytest.raises(
        InputError, match="must hold all weights of BertForSequenceClassification but its head"
    ):
        loaded(3, config={"intermediate_size": 20})


def test_weights_that_are_tied_are_one(tmp_path: Path) -> None:
    model = named("gpt, language model")
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "w.safetensors")
    name, options = CASES["gpt, language model"]
    config = ModelConfig(name, options, "float64", init_from=str(tmp_path / "w.safetensors"))
    again = models.build(config, TEXT, TOKENS, 9, TOKENS)
    assert torch.equal(get_flat(again), get_flat(model))
    assert again.model.lm_head.weight is again.model.transformer.wte.weight
