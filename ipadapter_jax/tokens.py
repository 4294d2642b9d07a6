"""Prompts to token ids, with a warning for what does not fit."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipadapter_jax.errors import InputError


def load_tokenizer(folder: Path) -> Any:
    """CLIP's byte-pair tokenizer from a folder with vocab.json and merges.txt. Raises InputError naming the folder."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it announces that PyTorch is absent
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / f).is_file() for f in ("vocab.json", "merges.txt")
    ):
        raise InputError(f"{folder}: no tokenizer here; it needs vocab.json and merges.txt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how transformers 5.10 makes its own
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many kinds
        raise InputError(f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]})") from None


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Prompts -> ids (P, length) int32, padded and truncated; warns with the words that a truncation loses."""
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            warnings.warn(f"the prompt is longer than {length} tokens; ignored: {lost!r}", stacklevel=3)
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return np.asarray(encoded["input_ids"], np.int32)
