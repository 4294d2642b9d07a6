"""The files of a CLIP tokenizer: byte pairs, special tokens, and the tokens that a model has learned in addition.

Read here and not by transformers: its fifth release ignores added_tokens.json, in which the fourth kept learned tokens,
and its tokenizer changes with every call that pads or truncates, which other threads see.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.text_files import decode_text, read_bytes, read_json_object

_VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_FILES = (*_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json")
_NO_LIMIT = 10**30  # what transformers says of a tokenizer that names no length
_FEWEST = 3  # both ends, and one token of a prompt
# CLIP's words (github.com/openai/CLIP, simple_tokenizer.py).
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


_SPECIAL = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"}
_JSON = ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its folder describes it; `backend`, a `tokenizers.Tokenizer`, neither pads nor truncates."""

    backend: Any
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    model_max_length: int


@dataclass(frozen=True)
class _Added:
    """A token that is found in a text before the byte pairs are, and its id where a file names one."""

    content: str
    id: int | None
    flags: Mapping[str, bool]
    special: bool


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer in a folder with vocab.json and merges.txt, or with tokenizer.json. Raises InputError naming the
    folder and what cannot be used."""
    try:
        return _read(folder)
    except InputError as error:
        raise error if str(folder) in str(error) else InputError(f"{folder}: {error}") from None
    except Exception as error:  # tokenizers raises many kinds, and the files may hold anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: the tokenizer cannot be read ({reason}); download it again") from None


def vocabulary_files(folder: Path) -> dict[str, Path]:
    """By name, the files there that say which text has which id."""
    return {name: folder / name for name in _VOCABULARY if (folder / name).is_file()}


def _read(folder: Path) -> TokenizerFiles:
    from tokenizers import processors

    whole, config, special_map, learned = (_object(folder / f"{name}.json") for name in _JSON)
    special = {**special_map, **config}
    named = {name: special.get(f"{name}_token") or default for name, default in _SPECIAL.items()}
    ends = {name: _content(token) for name, token in named.items()}
    backend = _byte_pairs(folder, whole, ends["unk"])
    with_ids = sorted(_with_ids(whole, config, learned), key=lambda added: added.id or 0)
    extra = [special.get(name) or () for name in ("additional_special_tokens", "extra_special_tokens")]
    more = (token for tokens in extra for token in (tokens.values() if isinstance(tokens, dict) else tokens))
    _add(backend, [*with_ids, *(_added(token, special=True) for token in (*named.values(), *more))])
    ids = {name: backend.token_to_id(content) for name, content in ends.items()}
    backend.post_processor = processors.RobertaProcessing(
        (ends["eos"], ids["eos"]), (ends["bos"], ids["bos"]), trim_offsets=False, add_prefix_space=False
    )
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise InputError(f"tokenizer_config.json: {side}={config[side]!r} is not supported, only 'right'")
    return TokenizerFiles(backend, ids["bos"], ids["eos"], ids["pad"], _max_length(config))


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    return read_json_object(path, "download it again") if path.is_file() else {}


def _byte_pairs(folder: Path, whole: Mapping[str, Any], unknown: str) -> Any:
    """CLIP's byte pairs, lower case."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [folder / name for name in ("vocab.json", "merges.txt")]
    if all(path.is_file() for path in pairs):
        vocabulary, merges = _object(pairs[0]), list(_merges(pairs[1]))
    elif whole:
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        pairs_of = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        merges = [(first, second) for first, second in pairs_of]
    else:
        raise InputError("no tokenizer here; it needs vocab.json and merges.txt")
    backend: Any = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=unknown))
    to_lower = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(to_lower)
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(path: Path) -> Iterator[tuple[str, str]]:
    """The pairs in merges.txt, one per line. Not read by `tokenizers`, which refuses paths that are not UTF-8."""
    for number, line in enumerate(decode_text(read_bytes(path), path).split("\n"), 1):
        if not (pair := line.rstrip("\r")) or pair.startswith("#version"):
            continue
        first, _, second = pair.partition(" ")
        if not first or not second or " " in second:
            raise InputError(f"{path}, line {number}: not a pair of tokens; download it again")
        yield first, second


def _content(token: object) -> str:
    """The text of a special token, which is written as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise InputError(f"{token!r} is not a token; fix tokenizer_config.json or special_tokens_map.json")
    return content


def _added(token: object, number: int | None = None, special: bool = False) -> _Added:
    described = token if isinstance(token, dict) else {}
    flags = {name: bool(described.get(name, False)) for name in _FLAGS}
    return _Added(_content(token), number, flags, bool(described.get("special", special)))


def _with_ids(whole: Mapping[str, Any], config: Mapping[str, Any], learned: Mapping[str, Any]) -> Iterator[_Added]:
    """Of tokenizer.json, of tokenizer_config.json (what transformers 4.34 and later write), and of added_tokens.json
    (what earlier releases wrote), whose tokens are found as they are spelled."""
    for token in whole.get("added_tokens") or ():
        yield _added(token, int(token["id"]))
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        yield _added(token, int(number))
    for content, number in learned.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"added_tokens.json: {content!r} has the id {number!r}, which is not a whole number")
        yield _added(content, number)


def _add(backend: Any, tokens: Sequence[_Added]) -> None:
    """Adds tokens in this order; of those with equal text the first counts. Raises InputError if a token would not get
    its own id, and so another token's embedding."""
    from tokenizers import AddedToken

    first: dict[str, _Added] = {}
    for added in tokens:
        first.setdefault(added.content, added)
    # Each call rebuilds all tokens that were added before.
    for special, batch in itertools.groupby(first.values(), lambda added: added.special):
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(added.content, special=special, **added.flags) for added in batch])
    for added in tokens:
        found = backend.token_to_id(added.content)
        if added.id not in (None, found):
            raise InputError(
                f"the token {added.content!r} has the id {added.id} in its file and would get {found}: ids of added "
                "tokens have to follow the vocabulary without a gap; fix added_tokens.json or tokenizer_config.json"
            )


def _max_length(config: Mapping[str, object]) -> int:
    length = config.get("model_max_length")
    length = _NO_LIMIT if length is None else length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= _FEWEST or length % 1:
        raise InputError(
            f"tokenizer_config.json: model_max_length={length!r} is not usable, it must be a whole number of at least "
            f"{_FEWEST}; fix it or leave it out"
        )
    return int(length)
