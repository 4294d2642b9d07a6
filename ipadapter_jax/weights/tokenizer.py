"""Prompts to token ids, with a warning for what does not fit."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.weights.tokenizer_files import TokenizerFiles, read_tokenizer

MAX_CHARACTERS = 1 << 15  # of a text that are read: hundreds of times what a text encoder sees

_MOST_LOST = 500  # characters of a truncated prompt that a warning shows


class TokenizedText(dict[str, list[int]]):
    """Ids of one text, as `["input_ids"]` or `.input_ids`, as transformers' tokenizers give them."""

    @property
    def input_ids(self) -> list[int]:
        return self["input_ids"]


class Tokenizer:
    """CLIP's byte-pair tokenizer.

    It is immutable, so that threads can share it: truncation and padding, which `tokenizers` would store in its own
    state, are done outside of it (`fitted`).
    """

    def __init__(self, files: TokenizerFiles):
        self._backend: Any = files.backend
        self.bos_token_id, self.eos_token_id = files.bos_token_id, files.eos_token_id
        self.pad_token_id, self.model_max_length = files.pad_token_id, files.model_max_length
        self._length = 1 + max(self._backend.get_vocab().values())

    @property
    def settings(self) -> tuple[str | int | None, ...]:
        """Everything that determines the ids."""
        return self._backend.to_str(), self.bos_token_id, self.eos_token_id, self.pad_token_id, self.model_max_length

    def __len__(self) -> int:
        """The number of embeddings that a text encoder needs: the highest id plus one."""
        return self._length

    def __call__(self, text: str) -> TokenizedText:
        """The ids of a whole text between both ends. Raises InputError for what is not text."""
        return TokenizedText(input_ids=self.encode(text))

    def encode(self, text: str) -> list[int]:
        """The ids of a text between both ends; of a text longer than MAX_CHARACTERS, those of its beginning, which are
        more than any text encoder takes. Raises InputError for what is not text."""
        try:
            return self._backend.encode(bounded(text)).ids
        except (TypeError, ValueError):  # not a string, or one with half a surrogate pair
            raise InputError(f"{text!r:.40} is not text: write it in UTF-8") from None

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        text = self._backend.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)
        return text.replace("</w>", " ").strip()

    def fitted(self, ids: Sequence[int], length: int) -> np.ndarray:
        """Ids of a text, truncated before its end token or padded: (length,) int32."""
        cut = [*ids[: length - 1], ids[-1]] if len(ids) > length else ids
        return np.asarray([*cut, *[self.pad_token_id] * (length - len(cut))], np.int32)


def bounded(text: str) -> str:
    """A text that costs no more than MAX_CHARACTERS to tokenize (10 MB took half a minute and gigabytes) and begins
    with the same tokens.

    Only long texts change: white space counts once, as tokenizers have it, and the rest ends between two words, so
    that every token before stays what it is. Where one word is longer than half of that, it is cut itself, thousands of
    characters behind the last token that a text encoder sees.
    """
    if not isinstance(text, str) or len(text) <= MAX_CHARACTERS:
        return text
    text = re.sub(r"[ \t\r\n]+", " ", text)
    end = text.rfind(" ", MAX_CHARACTERS // 2, MAX_CHARACTERS)
    return text[: MAX_CHARACTERS if end < 0 else end]


def load_tokenizer(folder: Path) -> Tokenizer:
    """CLIP's byte-pair tokenizer from a folder with vocab.json and merges.txt, or with tokenizer.json. Raises
    InputError naming the folder."""
    return Tokenizer(read_tokenizer(folder))


def check_vocabulary(what: str, tokenizer: Tokenizer, rows: int) -> None:
    """Compares a tokenizer with its text encoder, which has `rows` token embeddings.

    Raises InputError if some tokens have none, and warns if some embeddings have no token: the model learned tokens
    whose names the tokenizer lacks.
    """
    ids = len(tokenizer)
    if ids > rows:
        raise InputError(
            f"{what}: its tokenizer has {ids} tokens, its text encoder knows {rows}; take both from one model"
        )
    if ids < rows:
        warnings.warn(
            f"{what}: its text encoder knows {rows} tokens, its tokenizer {ids}; learned ones cannot be used: their "
            "names are missing in tokenizer/added_tokens.json",
            stacklevel=2,
        )


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> np.ndarray:
    """Prompts -> ids (P, length) int32, padded and truncated; warns with the words that a truncation loses."""
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            lost = repr(lost) if len(lost) <= _MOST_LOST else f"{lost[:_MOST_LOST]!r} and more"
            warnings.warn(f"the prompt is longer than {length} tokens; ignored: {lost}", stacklevel=3)
        rows.append(tokenizer.fitted(ids, length))
    return np.stack(rows)
