"""transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import CLASSES, Batch, Case, architecture, ids, numbers


def of_transformers() -> Iterator[Case]:
    """transformers'."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    vocabulary, length = 17, 6
    common = {
        "vocab_size": vocabulary, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 16, "num_labels": CLASSES, "pad_token_id": 0,
    }  # fmt: skip
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    llama = {**common, "num_key_value_heads": 1, "head_dim": 6}
    gpt = {"vocab_size": vocabulary, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16,
           "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0,
           "num_labels": CLASSES, "pad_token_id": 0}  # fmt: skip
    t5 = {"vocab_size": vocabulary, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_heads": 2,
          "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0}  # fmt: skip
    bart = {"vocab_size": vocabulary, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16, "max_position_embeddings": 16, "dropout": 0.0, "num_labels": CLASSES,
            "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
    pictures = {
        "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 8, "patch_size": 4, "num_labels": CLASSES, **no_dropout,
    }  # fmt: skip

    def text(examples: int, views: int) -> dict[str, Tensor]:
        lengths = torch.randint(2, length + 1, (examples, views, 1))
        mask = (torch.arange(length) < lengths).long()
        return {"input_ids": ids(length, vocabulary, 3)(examples, views) * mask, "attention_mask": mask}

    def whole_text(examples: int, views: int) -> dict[str, Tensor]:
        return {"input_ids": ids(length, vocabulary, 3)(examples, views)}

    def both(examples: int, views: int) -> dict[str, Tensor]:
        return {**text(examples, views), "decoder_input_ids": ids(length, vocabulary, 3)(examples, views)}

    def images(examples: int, views: int) -> dict[str, Tensor]:
        return {"pixel_values": numbers(3, 8, 8)(examples, views)}

    def logits(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets, reduction="none")

    def tokens(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits.transpose(1, 2), targets, reduction="none").mean(1)

    def words(examples: int) -> Tensor:
        return torch.randint(0, vocabulary, (examples, length))

    def classifier(model: str, config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            made = getattr(hf, config)(**settings, use_cache=False)
            # The grouped products of experts have no float64.
            more = {"experts_implementation": "eager"} if "num_local_experts" in settings else {}
            return getattr(hf, model)._from_config(made, attn_implementation="eager", **more)

        return make

    encoders: list[tuple[str, str, str, dict[str, Any], Callable[[int, int], Batch], tuple[str, ...]]] = [
        (
            "BERT",
            "BertForSequenceClassification",
            "BertConfig",
            {**common, **no_dropout},
            text,
            ("classifier.*",),
        ),
        (
            "RoBERTa",
            "RobertaForSequenceClassification",
            "RobertaConfig",
            {**common, **no_dropout},
            text,
            ("classifier.out_proj.*",),
        ),
        (
            "DistilBERT",
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            {
                "vocab_size": vocabulary,
                "dim": 12,
                "n_layers": 2,
                "n_heads": 2,
                "hidden_dim": 16,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "seq_classif_dropout": 0.0,
                "max_position_embeddings": 16,
                "num_labels": CLASSES,
            },
            text,
            ("classifier.*",),
        ),
        (
            "ALBERT, layers shared",
            "AlbertForSequenceClassification",
            "AlbertConfig",
            {**common, **no_dropout, "embedding_size": 8, "classifier_dropout_prob": 0.0},
            text,
            ("classifier.*",),
        ),
        (
            "ELECTRA",
            "ElectraForSequenceClassification",
            "ElectraConfig",
            {**common, **no_dropout, "embedding_size": 8},
            text,
            ("classifier.out_proj.*",),
        ),
        (
            "DeBERTa V2",
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            {
                **common,
                **no_dropout,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "pooler_dropout": 0.0,
                "pooler_hidden_size": 12,
            },
            text,
            ("classifier.*",),
        ),
        ("ViT", "ViTForImageClassification", "ViTConfig", pictures, images, ("classifier.*",)),
        (
            "Swin",
            "SwinForImageClassification",
            "SwinConfig",
            {
                "image_size": 8,
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [2, 2],
                "window_size": 2,
                "num_labels": CLASSES,
                "drop_path_rate": 0.0,
                **no_dropout,
            },
            images,
            ("classifier.*",),
        ),
        (
            "BART",
            "BartForSequenceClassification",
            "BartConfig",
            bart,
            _ended(text),
            ("classification_head.out_proj.*",),
        ),
        ("GPT-2 as a classifier", "GPT2ForSequenceClassification", "GPT2Config", gpt, text, ("score.*",)),
    ]
    for title, model, config, settings, inputs, zero in encoders:
        yield architecture(
            "transformers", title, classifier(model, config, settings), inputs, zero, loss=logits
        )
    decoders: list[tuple[str, str, str, dict[str, Any], Callable[[int, int], Batch], tuple[str, ...]]] = [
        ("GPT-2, tied head", "GPT2LMHeadModel", "GPT2Config", gpt, whole_text, ()),
        (
            "GPT-Neo",
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            {
                "vocab_size": vocabulary,
                "hidden_size": 12,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 16,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 4,
                "max_position_embeddings": 16,
                "resid_dropout": 0.0,
                "embed_dropout": 0.0,
                "attention_dropout": 0.0,
            },
            whole_text,
            (),
        ),
        (
            "OPT",
            "OPTForCausalLM",
            "OPTConfig",
            {
                "vocab_size": vocabulary,
                "hidden_size": 12,
                "num_hidden_layers": 2,
                "ffn_dim": 16,
                "num_attention_heads": 2,
                "max_position_embeddings": 16,
                "dropout": 0.0,
                "word_embed_proj_dim": 12,
            },
            text,
            (),
        ),
        ("Llama", "LlamaForCausalLM", "LlamaConfig", llama, text, ("lm_head.*",)),
        (
            "Mistral",
            "MistralForCausalLM",
            "MistralConfig",
            {**llama, "sliding_window": 3},
            whole_text,
            ("lm_head.*",),
        ),
        ("Qwen 2", "Qwen2ForCausalLM", "Qwen2Config", llama, text, ("lm_head.*",)),
        ("Gemma", "GemmaForCausalLM", "GemmaConfig", llama, whole_text, ()),
        (
            "Mixtral, experts",
            "MixtralForCausalLM",
            "MixtralConfig",
            {**llama, "num_local_experts": 3, "num_experts_per_tok": 2},
            text,
            ("lm_head.*",),
        ),
        (
            "Mamba",
            "MambaForCausalLM",
            "MambaConfig",
            {"vocab_size": vocabulary, "hidden_size": 12, "state_size": 4, "num_hidden_layers": 2},
            whole_text,
            (),
        ),
        (
            "BLOOM",
            "BloomForCausalLM",
            "BloomConfig",
            {
                "vocab_size": vocabulary,
                "hidden_size": 12,
                "n_layer": 2,
                "n_head": 2,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
            },
            text,
            (),
        ),
        ("T5", "T5ForConditionalGeneration", "T5Config", t5, both, ()),
    ]
    for title, model, config, settings, inputs, zero in decoders:
        yield architecture(
            "transformers",
            title,
            classifier(model, config, settings),
            inputs,
            zero,
            targets=words,
            loss=tokens,
        )


def _ended(text: Callable[[int, int], dict[str, Tensor]]) -> Callable[[int, int], dict[str, Tensor]]:
    """End every text with the token that says so, which the model reads at."""

    def make(examples: int, views: int) -> dict[str, Tensor]:
        batch = text(examples, views)
        last = batch["attention_mask"].sum(-1, keepdim=True) - 1
        batch["input_ids"] = batch["input_ids"].scatter(-1, last, 2)
        return batch

    return make
