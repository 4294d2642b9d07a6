"""The tokenizer of mini: byte-pair encoding, merged until every word of the scenes' captions is one token."""

import itertools
import re
from collections import Counter
from pathlib import Path

from experiments.mini.networks import TOKENS, VOCABULARY
from experiments.mini.scenes.captions import caption
from experiments.mini.scenes.photographs import CAPTIONS
from experiments.mini.scenes.scene import generator, make_scene
from ipadapter_jax.testing.random_weights import write_tokenizer


def write(folder: Path, captions: int = 20_000) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json, from the words of the first `captions` captions."""
    texts = [caption(make_scene("train", i), generator("train", i)) for i in range(captions)]
    words = Counter(re.findall(r"[a-z]+|,", " ".join([*texts, "photograph photo of", *CAPTIONS.values()])))
    merges = pairs_to_merge(words)
    if len(merges) > VOCABULARY - 514:
        raise SystemExit(f"{len(merges)} merges do not fit a vocabulary of {VOCABULARY}")
    write_tokenizer(folder, VOCABULARY, merges, TOKENS)


def pairs_to_merge(words: Counter[str]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding (arXiv 1508.07909) until each word is one token: the most frequent pair first,
    ties in alphabetical order."""
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found
