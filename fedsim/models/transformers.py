"""Models of Hugging Face's transformers on token ids: by type and configuration, or as published."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import references, validate
from fedsim.merging import parse_options
from fedsim.models.libraries import check_architecture, check_free, library
from fedsim.validate import InputError

_log = logging.getLogger(__name__)

HEADS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}
_CAUSAL = "causal_lm"


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters by peft (Hu et al. 2022).

    Attributes:
        r: rank.
        alpha: what an adapter adds is scaled by alpha / r.
        dropout: must be 0, as everywhere.
        target_modules: names of the linear layers that get one; null for those peft knows for the type.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | None = None


@dataclass(frozen=True)
class TransformersOptions:
    """Options of `transformers_model`.

    Attributes:
        architecture: a model type, such as bert or gpt2, with weights drawn at random.
        path: instead, an absolute folder or a name on the hub, as `from_pretrained` takes them.
        head: sequence_classification or causal_lm.
        config: settings of the model's configuration. Rates of dropout are 0. _attn_implementation is
            the fused one where the type has it; "eager" helps where the log says that gradients come from
            one example at a time.
        padding: id of the token that fills texts up, on the right; one outside the vocabulary, such as -1,
            for texts that are not filled up.
        lora: options of `LoraOptions`: adapters, and the classifier, are trained, and nothing else is. Null
            or empty: everything is trained.
    """

    architecture: str | None = None
    path: str | None = None
    head: str = "sequence_classification"
    config: dict[str, Any] = field(default_factory=dict)
    padding: int = 0
    lora: dict[str, Any] | None = field(default_factory=dict)


class TokenModel(nn.Module):
    """A model of transformers as a map from token ids to logits.

    The library's own masks look at values to leave out work, which no engine can follow but one example at a
    time. So the mask it would form is given to it ready made, in the form `fitted` found to be the same.
    """

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.mask = self.mask_on_meta = "plain"

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, T) int64 to logits: (n, outputs), or (n, T, vocabulary) of a language model."""
        dtype = next(self.model.parameters()).dtype
        form = _MASKS[self.mask_on_meta if tokens.is_meta else self.mask]
        return self.model(input_ids=tokens, attention_mask=form(tokens != self.padding, dtype)).logits

    @torch.no_grad()
    def fitted(self, length: int, vocabulary: int, causal: bool) -> TokenModel:
        """Choose the form of the mask by what the model does on random texts of `length`; returns self.

        Raises:
            InputError: it does not run on them, or must not look ahead (`causal`) and does.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary, (2, length), generator=generator)
        tokens = torch.where(tokens == self.padding, (tokens + 1) % vocabulary, tokens)
        tokens[1, max(1, length // 2) :] = self.padding if 0 <= self.padding < vocabulary else tokens[1, 0]
        expected = self._real(tokens)
        off = {}
        for self.mask in ("causal", "bidirectional"):
            try:
                off[self.mask] = float((self._real(tokens) - expected).abs().max() / expected.abs().max())
            except Exception as problem:  # a type that takes no mask of this form
                _log.debug("no %s mask of four axes: %s", self.mask, problem)
        # Without values only shapes count, and the library cannot look at them: any mask that runs will do.
        self.mask_on_meta = next(iter(off), "plain")
        self.mask = min(off, key=off.__getitem__, default="plain")
        if not off.get(self.mask, 1.0) <= 1e-5:  # such as attention within a window
            self.mask = "plain"
        if causal and length > 1:
            other = torch.cat([tokens[:1, :-1], (tokens[:1, -1:] + 1) % vocabulary], 1)
            before, after = (self(ids)[:, :-1] for ids in (tokens[:1], other))
            if not torch.allclose(before, after, rtol=1e-4, atol=1e-6):
                raise InputError(
                    "model.options.head=causal_lm must give a model that does not look ahead, but the last "
                    "token changes what it says before. Set model.options.config.is_decoder=true."
                )
        return self

    def _real(self, tokens: Tensor) -> Tensor:
        """Outputs, but for positions of filling."""
        try:
            outputs = self(tokens)
        except Exception as error:
            raise InputError(
                f"model.name=transformers must run on tokens of shape {tuple(tokens.shape)}, but "
                f"{type(self.model).__name__} fails by {type(error).__name__}: {error}. Check "
                "model.options.config, its largest number of positions for instance."
            ) from error
        return outputs[tokens != self.padding] if outputs.dim() == 3 else outputs


def _plain(real: Tensor, dtype: torch.dtype) -> Tensor:
    return real.long()


def _bidirectional(real: Tensor, dtype: torch.dtype) -> Tensor:
    # Finite, so that a text of filling alone still has attention that sums to 1; in bfloat16 too.
    return torch.zeros_like(real, dtype=dtype).masked_fill(~real, torch.finfo(torch.bfloat16).min)[
        :, None, None
    ]


def _causal(real: Tensor, dtype: torch.dtype) -> Tensor:
    places = real.shape[1]
    earlier = torch.ones(places, places, dtype=torch.bool, device=real.device).tril()
    return _bidirectional((real[:, None] & earlier).flatten(0, 1), dtype).view(-1, 1, places, places)


_MASKS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "plain": _plain,
    "bidirectional": _bidirectional,
    "causal": _causal,
}


def transformers_model(
    input_shape: tuple[int, ...], outputs: int, options: TransformersOptions, vocabulary: int | None
) -> TokenModel:
    """Return a model of transformers that maps tokens (n, T) int64 to logits; see `TokenModel`.

    Raises:
        InputError: transformers (or, for adapters, peft) is not installed; no such type, head or setting of
            its configuration; data that are no tokens or have another vocabulary; a rate of dropout above 0;
            or what the library refuses.
    """
    hf = library("transformers", "transformers", "model.name=transformers")
    validate.one_of(options.head, HEADS, "model.options.head")
    if vocabulary is None or len(input_shape) != 1:
        raise InputError(
            "model.name=transformers takes token ids (T,) of a vocabulary, got examples of shape "
            f"{input_shape} and vocabulary {vocabulary}. Use it with texts."
        )
    if options.head == _CAUSAL and outputs != vocabulary:
        raise InputError(
            f"model.options.head=causal_lm gives an output a token of the vocabulary, {vocabulary}, but "
            f"{outputs} are asked for. Use it to predict tokens, or head=sequence_classification."
        )
    config = _config(hf, options, outputs, vocabulary)
    auto = getattr(hf, HEADS[options.head])
    if options.path is None:
        model = references.called(auto.from_config, {"config": config}, {}, "model.options")
    else:
        model = _published(auto, options.path, config)
    if options.lora:
        _adapt(model, parse_options(options.lora, LoraOptions, "model.options.lora"), options.head)
    return TokenModel(model, options.padding).fitted(input_shape[0], vocabulary, options.head == _CAUSAL)


def _config(hf: ModuleType, options: TransformersOptions, outputs: int, vocabulary: int) -> Any:
    """The library's configuration: what it is by default, without dropout, and as the options say."""
    if (options.architecture is None) == (options.path is None):
        validate.conflicts(
            f"model.options.architecture is {options.architecture} and path is {options.path}.",
            "Give one of them: a model type to draw weights for, or a model to load.",
        )
    data = "the data decide it"
    decided = {"num_labels": data, "vocab_size": data, "pad_token_id": "model.options.padding says it"}
    check_free(options.config, decided, "model.options.config")
    make: Callable[..., Any]
    first: dict[str, Any]
    if options.path is not None:
        if Path(options.path).is_dir() and not Path(options.path).is_absolute():
            raise InputError(  # processes of a run work in other folders
                f"model.options.path must be an absolute folder, got {options.path!r}. Write it in full."
            )
        make, first = hf.AutoConfig.from_pretrained, {"pretrained_model_name_or_path": options.path}
    else:
        check_architecture(
            options.architecture, hf.CONFIG_MAPPING, "a model type", "transformers.CONFIG_MAPPING"
        )
        make, first = hf.AutoConfig.for_model, {"model_type": options.architecture}
    usual = references.called(make, first, {}, "model.options")
    for name, value in options.config.items():
        if not hasattr(usual, name):
            near = validate.did_you_mean(name, usual.to_dict())
            raise InputError(f"model.options.config: {type(usual).__name__} has no setting {name!r}. {near}")
        if _is_rate(name, value):
            validate.conflicts(
                f"model.options.config.{name} is {value}, but masks would need randomness keyed by example "
                "and step.",
                "Set it to 0, or leave it out.",
            )
    entries = usual.to_dict()
    settings: dict[str, Any] = {name: 0.0 for name, value in entries.items() if _is_rate(name, value)}
    if options.path is None:
        settings["vocab_size"] = vocabulary
        # Marks of the usual vocabulary that this one does not reach.
        settings |= {
            name: None
            for name, value in entries.items()
            if name.endswith("_token_id") and isinstance(value, int) and value >= vocabulary
        }
    elif usual.vocab_size < vocabulary or (options.head == _CAUSAL and usual.vocab_size != vocabulary):
        raise InputError(
            f"{options.path} knows {usual.vocab_size} tokens, but the data have a vocabulary of "
            f"{vocabulary}. Use data that were cut into tokens for this model, and declare its vocabulary."
        )
    settings["pad_token_id"] = options.padding if 0 <= options.padding < vocabulary else None
    if options.head != _CAUSAL:
        settings["num_labels"] = outputs
    with _silent():
        return references.called(
            make, {**first, "use_cache": False, **settings, **options.config}, {}, "model.options"
        )


def _is_rate(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the library's bar, and its warnings of a new head: a run builds its model several times."""
    said = library("transformers", "transformers", "model.name=transformers").utils.logging
    bar, level = said.is_progress_bar_enabled(), said.get_verbosity()
    said.disable_progress_bar()
    said.set_verbosity_error()
    try:
        yield
    finally:
        said.set_verbosity(level)
        if bar:
            said.enable_progress_bar()


def _published(auto: Any, path: str, config: Any) -> nn.Module:
    given = {
        "pretrained_model_name_or_path": path,
        "config": config,
        "dtype": torch.float32,
        "use_safetensors": True,  # no pickle
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    with _silent() if Path(path).is_dir() else contextlib.nullcontext():
        model, found = references.called(auto.from_pretrained, given, {}, "model.options")
    fresh = {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])}
    head = {name for name, _ in _head(model)}
    if fresh - head:
        raise InputError(
            f"{path} must hold all weights of {type(model).__name__} but its head; it lacks, or has in "
            f"another shape: {', '.join(sorted(fresh - head)[:5])}. Check model.options.config."
        )
    if fresh:
        _log.info("%s holds no such head; drawn anew: %s", path, ", ".join(sorted(fresh)))
    return model


def _head(model: Any) -> list[tuple[str, nn.Parameter]]:
    """What a model has above its body."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in body]


def _adapt(model: nn.Module, lora: LoraOptions, head: str) -> None:
    """Put adapters in, in place; they and a classifier are all that is trained."""
    peft = library("peft", "transformers", "model.options.lora")
    validate.positive(lora.r, "model.options.lora.r")
    validate.positive(lora.alpha, "model.options.lora.alpha")
    validate.in_range(lora.dropout, 0, 0, "model.options.lora.dropout", "Masks would need randomness keyed.")
    given: Mapping[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": lora.target_modules}
    classifier = _head(model) if head != _CAUSAL else []
    adapters = references.called(peft.LoraConfig, given, {}, "model.options.lora")
    inject = {"peft_config": adapters, "model": model}
    references.called(peft.inject_adapter_in_model, inject, {}, "model.options.lora")
    for _, parameter in classifier:
        parameter.requires_grad_(True)
