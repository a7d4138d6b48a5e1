"""Captions as tokens, by byte-pair encoding (Sennrich et al. 2016) learned from public captions alone.

A vocabulary that was learned from private captions would tell what they hold, so what it is learned from is
declared apart from them, and a tokenizer from a file is believed to be public.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import tokenizer_files
from fedsim.data.targets import END, IGNORED
from fedsim.validate import InputError

SPECIAL = ("<pad>", "<begin>", "<end>", "<unknown>")
"""The first tokens of a vocabulary that is learned here: PADDING, BEGIN, END, and what has no token."""
BLANK = "\u2581"
"""What stands for the blank before a word in a token."""
BYTE_BLANK = "\u0120"
"""The same in byte-level tokens, whose letters are bytes."""


def learned(captions: Iterable[str], vocabulary: int) -> Any:
    """Return a tokenizer of the package tokenizers, learned from public captions.

    Words are in lower case and in Unicode's form NFKC. The same captions give the same tokenizer.

    Args:
        captions: public ones.
        vocabulary: tokens up to which pairs are joined: the special ones and every letter of the captions
            have one each, however many they are; fewer than `vocabulary` where there are no more pairs.

    Raises:
        InputError: the package is not installed, or no caption has a word.
    """
    validate.in_range(vocabulary, len(SPECIAL) + 1, 2**20, "data.options.vocabulary")
    tk = _package()
    made = tk.Tokenizer(tk.models.BPE(unk_token=SPECIAL[3]))
    forms = [tk.normalizers.NFKC(), tk.normalizers.Lowercase(), tk.normalizers.Strip()]
    made.normalizer = tk.normalizers.Sequence(forms)
    made.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [tk.pre_tokenizers.WhitespaceSplit(), tk.pre_tokenizers.Metaspace(BLANK)]
    )
    trainer = tk.trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator(captions, trainer)
    if made.get_vocab_size() <= len(SPECIAL):
        raise InputError("public captions must have words to learn a vocabulary from, got none.")
    return tokenizer_files.plain(made, special=False)


def read(path: Path) -> Any:
    """Return the tokenizer of a tokenizer.json whose first tokens are padding, begin and end; what the file
    says of padding, truncation and random choices is not done (`tokenizer_files`).

    Raises:
        InputError: the package is not installed, no such file, other first tokens, or numbers with a gap.
    """
    made = tokenizer_files.read(path, _package(), special=False)
    first = [made.id_to_token(token) or "" for token in range(END + 1)]
    if "pad" not in first[0].lower() or any((token[:1], token[-1:]) not in MARKS for token in first):
        raise InputError(
            f"{path} must have padding, begin and end of a caption as its tokens 0, 1 and 2, in brackets, so "
            f"that no word is one of them; it has {first}. Number its tokens anew."
        )
    return made


MARKS = {("<", ">"), ("[", "]")}


def names(tokenizer: Any) -> tuple[str, ...]:
    """Return the tokens by number."""
    return tuple(tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size()))


def targets(tokenizer: Any, captions: Sequence[str], places: int) -> NDArray[np.int64]:
    """Return target tokens (N, places): a caption's own, its end, and IGNORED after it.

    A caption's tokens follow from it alone, whatever stands beside it (`tokenizer_files.plain`), and
    none of its words is padding, begin or end. One of `places` tokens or more is cut, and then has no end;
    one without a word is IGNORED alone.

    Args:
        tokenizer: of `learned`, `read` or the package; stays as it is.
        captions: N of them.
        places: tokens of each, its end among them.
    """
    out = np.full((len(captions), places), IGNORED, dtype=np.int64)
    made = tokenizer_files.plain(tokenizer, special=False)
    for row, found in enumerate(made.encode_batch(list(captions), add_special_tokens=False)):
        if ids := [token for token in found.ids if token > END]:
            whole = [*ids, END][:places]
            out[row, : len(whole)] = whole
    return out


def words(ids: Iterable[int], named: Sequence[str]) -> str:
    """Return the caption that tokens up to the end are; special tokens are left out.

    Args:
        ids: tokens, or IGNORED.
        named: the tokens by number (`names`).
    """
    said: list[str] = []
    for token in ids:
        if token == END:
            break
        if token > END:
            said.append(named[token])
    if any(BLANK in token for token in named):
        return "".join(said).replace(BLANK, " ").strip()
    if any(token.startswith(BYTE_BLANK) for token in named):
        letters = _bytes_of_letters()
        held = b"".join(letters.get(sign, sign.encode()) for sign in "".join(said))
        return held.decode("utf-8", "replace").strip()
    return " ".join(said).replace(" ##", "")


@functools.cache
def _bytes_of_letters() -> dict[str, bytes]:
    """The byte that each letter of byte-level tokens stands for (Radford et al. 2019): printable ones of
    Latin-1 for themselves, the others for letters from U+0100 on, in their order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    shown = {chr(byte): bytes([byte]) for byte in plain}
    return shown | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            f"captions need the package tokenizers: {error}. Run pip install 'fedsim[captions]'."
        ) from error
    return tokenizers
