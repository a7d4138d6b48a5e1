"""Texts as tokens: to classify, or to go on with."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import validate
from fedsim.data import plain_text, rows, tokenizer_files
from fedsim.data.examples import ArrayDataset, Splits
from fedsim.data.sources import SOURCES, folders
from fedsim.data.sources.base import Source
from fedsim.data.targets import IGNORED, Targets
from fedsim.rules import SET, read_with
from fedsim.validate import InputError, PrivateInputError

PADDING = 0
BYTES = 257  # padding, and a token a byte


@SOURCES.register("text")
@dataclass(frozen=True)
class Text(Source):
    """Texts as tokens of a public tokenizer: with classes to predict, or to be continued token by token.

    A vocabulary learned from private texts would leak, so tokenizers are fixed: "bytes", a token a byte of
    UTF-8; "words", words in lower case by a hash into `vocabulary` tokens; or a tokenizer.json of the
    package tokenizers, made from public texts. Token 0 is padding. What a file says of padding, truncation
    and random choices is not done: a text's tokens follow from it alone, and `places` says how many.

    Attributes:
        train, test: files below data.root: .csv, .jsonl or .parquet, or .txt with one text a line; or a
            folder, with a text a file at CLASS/FILE, or at FILE where there are no classes.
        text: column of the text.
        target: column of the class, where files have columns.
        classes: the declared classes, words of the column or names of the folders; none: the task is to
            predict the next token.
        holder: column of the natural owner.
        tokenizer: "bytes", "words", or a tokenizer.json.
        vocabulary: of "words": number of tokens, padding included.
        places: tokens an example has: longer texts are cut, shorter ones padded.
    """

    train: str = "train.csv"
    test: str = "test.csv"
    text: str = "text"
    target: str = field(default="target", metadata=read_with(classes=SET))
    classes: list[Any] = field(default_factory=list)
    holder: str | None = None
    tokenizer: str = "words"
    vocabulary: int = field(default=4096, metadata=read_with(tokenizer=("words",)))
    places: int = 128

    def __post_init__(self) -> None:
        validate.in_range(self.vocabulary, 2, 2**31, "data.options.vocabulary")
        validate.in_range(self.places, 2, 2**20, "data.options.places")

    def assumed_public(self) -> tuple[str, ...]:
        """See `Source.assumed_public`."""
        own = self.tokenizer not in ("bytes", "words")
        return ("the texts that the tokenizer was made from",) if own else ()

    def load(self, root: Path) -> Splits:
        """See `Source.load`.

        Raises:
            InputError: files, columns or folders that are missing, classes that are not declared, or a
                tokenizer that cannot be read.
        """
        tokenize, size = self._tokenizer(root)
        parts = [
            self._split(root / name, tokenize, size, own)
            for name, own in ((self.train, True), (self.test, False))
        ]
        return Splits(*parts)

    def _split(self, path: Path, tokenize: Any, size: int, own: bool) -> ArrayDataset:
        texts, labels, owners = self._read(path, own)
        if not texts:
            raise InputError(f"{path} must hold at least one text, got none.")
        tokens = self._tokens(texts, tokenize)
        if self.classes:
            wanted, declared = rows.classes(labels, self.classes, f"{path}: {self.target}")
            return ArrayDataset("text", tokens, wanted, owners, declared, vocabulary=size)
        following = np.full_like(tokens, IGNORED)
        following[:, :-1] = np.where(tokens[:, 1:] == PADDING, IGNORED, tokens[:, 1:])
        return ArrayDataset("text", tokens, following, owners, Targets("tokens", size), vocabulary=size)

    def _tokens(self, texts: Sequence[str], tokenize: Any) -> NDArray[np.int64]:
        tokens = np.full((len(texts), self.places), PADDING, dtype=np.int64)
        for row, text in enumerate(texts):
            found = tokenize(text)[: self.places]
            tokens[row, : len(found)] = found
        return tokens

    def inputs(self, path: Path) -> tuple[list[str], NDArray[np.int64]]:
        """See `Source.inputs`: the lines of a .txt, the texts of a table's column, or the files of a folder.

        A tokenizer.json is looked for beside the path.
        """
        tokenize, _ = self._tokenizer(path.parent)
        if path.is_dir():
            files = _files(path)
            return [file.name for file in files], self._tokens([_content(file) for file in files], tokenize)
        if path.suffix == ".txt":
            texts = [line for line in _content(path).splitlines() if line.strip()]
        else:
            texts = self._said(rows.read(path, [self.text])[self.text], path)
        return [str(row) for row in range(len(texts))], self._tokens(texts, tokenize)

    def _said(self, cells: Sequence[Any], path: Path) -> list[str]:
        """Texts of a column; an empty cell is an empty one."""
        texts = ["" if cell is None else rows.spoken(cell) for cell in cells]
        if None in texts:
            expected = f"{path}: {self.text} must hold texts"
            got = cells[texts.index(None)]
            raise PrivateInputError(f"{expected}, got {got!r}. Make one text of it.", f"{expected}.")
        return [text for text in texts if text is not None]

    def _read(self, path: Path, own: bool) -> tuple[list[str], list[Any], NDArray[np.int64] | None]:
        """Return texts, their classes, and their owners where there are any."""
        if path.is_dir():
            among = [path / str(name) for name in self.classes] if self.classes else [path]
            files = [(file, folder.name) for folder in among for file in _files(folder)]
            return [_content(file) for file, _ in files], [name for _, name in files], None
        if path.suffix == ".txt":
            if self.classes:
                raise InputError(f"{path}: lines of text have no classes. Use a .csv, or a folder a class.")
            return [line for line in _content(path).splitlines() if line.strip()], [], None
        extra = [self.target] if self.classes else []
        owner = [self.holder] if self.holder is not None and own else []
        found = rows.read(path, [self.text, *extra, *owner])
        texts = self._said(found[self.text], path)
        owners = rows.numbered(found[owner[0]], f"{path}: {owner[0]}") if owner else None
        return texts, found[self.target] if extra else [], owners

    def _tokenizer(self, root: Path) -> tuple[Any, int]:
        """Return a function of a text to token ids, and the number of tokens."""
        if self.tokenizer == "bytes":
            return (lambda text: [byte + 1 for byte in text.encode("utf-8", "replace")]), BYTES
        if self.tokenizer == "words":
            buckets = self.vocabulary - 1
            return (
                lambda text: [1 + zlib.crc32(word.encode()) % buckets for word in _words(text)]
            ), self.vocabulary
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                f"data.options.tokenizer={self.tokenizer} needs the package tokenizers: {error}. Run pip "
                "install 'fedsim[transformers]', or use bytes or words."
            ) from error
        expected = "bytes, words, or a tokenizer.json below data.root"
        made = tokenizer_files.read(root / self.tokenizer, tokenizers, special=True, expected=expected)
        first = made.id_to_token(PADDING)
        if first is not None and "pad" not in first.lower():
            raise InputError(
                f"data.options.tokenizer must have its padding as token {PADDING}, and {self.tokenizer} has "
                f"{first!r} there: that word could not be told from padding. Number its tokens anew."
            )
        return (lambda text: made.encode(text).ids), made.get_vocab_size()


def _words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, and every other sign for itself."""
    words: list[str] = []
    word = ""
    for sign in text.lower():
        if sign.isalnum():
            word += sign
            continue
        if word:
            words.append(word)
            word = ""
        if not sign.isspace():
            words.append(sign)
    return [*words, word] if word else words


def _files(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise InputError(f"text: expected a folder of texts at {folder}, one a file, and there is none.")
    return folders.files(folder, "text")


def _content(path: Path) -> str:
    try:
        return plain_text.decoded(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} must be a readable text: {error}.") from error
