"""Tokenizers of a tokenizer.json (package tokenizers), so that a text's tokens follow from that text alone.

A file can ask for more than that: padding to the longest text of a call, whose tokens then depend on the
texts beside it; truncation, which cuts without a word; merges or pieces that are drawn at random. Training of
the tokenizer's first model wanted these. Here each is switched off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsim.validate import InputError

RANDOM = ("dropout", "alpha", "nbest_size")
"""Settings of a tokenizer's model that draw: dropped merges (Provilkov et al. 2020), sampled pieces (Kudo
2018)."""


def read(path: Path, package: Any, *, special: bool, expected: str = "a tokenizer.json") -> Any:
    """Return the tokenizer in a file.

    Args:
        path: of the file.
        package: tokenizers, imported.
        special: as of `plain`.
        expected: what the option may be.

    Raises:
        InputError: no such file, or tokens that are not numbered 0 .. n - 1.
    """
    try:
        made = plain(package.Tokenizer.from_file(str(path)), special=special)
    except Exception as error:  # the library's own errors are of no common type
        raise InputError(f"data.options.tokenizer must be {expected}, got {path}: {error}.") from error
    numbers = set(made.get_vocab(with_added_tokens=True).values())
    if numbers != set(range(made.get_vocab_size(with_added_tokens=True))):
        raise InputError(
            f"{path} must number its tokens 0 .. {len(numbers) - 1} without a gap, as many as the model has, "
            f"and has numbers up to {max(numbers)}. Number its tokens anew."
        )
    return made


def plain(tokenizer: Any, *, special: bool) -> Any:
    """Return a tokenizer without padding, truncation and random choices: the one that is given where it is
    like that, or else a copy. The one that is given stays as it is.

    Args:
        tokenizer: of the package tokenizers.
        special: whether the word <end> in a text is the token of that name, or a word like others.
    """
    drawn = any(getattr(tokenizer.model, name, None) for name in RANDOM)
    asked = tokenizer.padding is not None or tokenizer.truncation is not None or drawn
    if not asked and tokenizer.encode_special_tokens is not special:
        return tokenizer
    described = json.loads(tokenizer.to_str()) | {"padding": None, "truncation": None}
    described["model"] |= {name: None for name in RANDOM if name in described["model"]}
    made = type(tokenizer).from_str(json.dumps(described))
    made.encode_special_tokens = not special
    return made
