"""The tokenizer: its peer in transformers, threads, learned tokens, and what is refused."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import TORCH_MODEL, within
from memory import peak_growth
from transformers import CLIPTokenizer

from ipadapter_jax.data.dataset import LiveSamples
from ipadapter_jax.data.types import RecordSource
from ipadapter_jax.errors import InputError
from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.tokenizer import MAX_CHARACTERS, bounded, load_tokenizer, tokenize

RECORDED = TORCH_MODEL / "tokenizer"  # 707 tokens, the last two of them the ends
LEARNED = {"content": "<cat-toy>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def tokenizer_folder(parent: Path, **changes: dict | None) -> Path:
    """The recorded tokenizer whose JSON files are changed, added or, with None, taken away."""
    folder = parent / "tokenizer"
    shutil.copytree(RECORDED, folder)
    for name, change in changes.items():
        file = folder / f"{name}.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        if change is None:
            file.unlink()
        else:
            file.write_text(json.dumps({**before, **change}))
    return folder


def decoder(**flags: bool) -> dict:
    """added_tokens_decoder of tokenizer_config.json with one learned token behind both ends."""
    known = json.loads((RECORDED / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    return {"added_tokens_decoder": {**known, "707": {**LEARNED, "special": False, **flags}}}


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    letters = [*"abcdefghijklmnopqrstuvwxyzABCXYZ0123456789 ,.'!?-_<>|\t\n\u00a0éÉßñ漢字🙂\u0301ﬁ"]
    words = ["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<cat-toy>", "<Cat-Toy>", "</w>", " it's ", " we'LL "]
    found = ["", "  ", "\u2028x", "ÅÅ", *words]
    for _ in range(count):
        parts = [draw.choice(letters) for _ in range(draw.randint(1, 120))] + [draw.choice(words)]
        draw.shuffle(parts)
        found.append("".join(parts))
    return found


# --- equal to transformers -----------------------------------------------------------------------------------------

FOLDERS = {
    "as recorded": {},
    "alone": {"tokenizer_config": None, "special_tokens_map": None},
    "learned": {"tokenizer_config": decoder()},
    "learned, any case": {"tokenizer_config": decoder(normalized=True)},
    "learned, with the space before": {"tokenizer_config": decoder(lstrip=True)},
    "more special tokens": {"tokenizer_config": {"additional_special_tokens": ["<cat-toy>"]}},
    "pads with !": {"tokenizer_config": {"pad_token": "!"}},
    "pads with a token of its own": {"tokenizer_config": {"pad_token": "[PAD]"}},
}


@pytest.mark.parametrize("changes", [*FOLDERS.values(), "mini"], ids=[*FOLDERS, "mini"])
def test_ids_equal_those_of_transformers(tmp_path, changes):
    mini = bundled.FOLDER / "tokenizer"
    folder = mini if changes == "mini" else tokenizer_folder(tmp_path, **changes)
    ours, theirs = load_tokenizer(folder), CLIPTokenizer.from_pretrained(str(folder))
    for text in texts(150):
        ids = ours.encode(text)
        for length in (20, 77):
            wanted = theirs(text, padding="max_length", max_length=length, truncation=True)["input_ids"]
            assert ours.fitted(ids, length).tolist() == wanted, text
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert len(ours) == len(theirs)
    assert min(ours.model_max_length, 10**6) == min(theirs.model_max_length, 10**6)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours("a cat").input_ids == ours("a cat")["input_ids"] == theirs("a cat")["input_ids"]


def test_a_folder_with_tokenizer_json_alone(tmp_path):
    CLIPTokenizer.from_pretrained(str(tokenizer_folder(tmp_path))).backend_tokenizer.save(str(tmp_path / "all.json"))
    (tmp_path / "one").mkdir()
    (tmp_path / "all.json").rename(tmp_path / "one" / "tokenizer.json")
    ours, usual = load_tokenizer(tmp_path / "one"), load_tokenizer(RECORDED)
    assert all(ours.encode(text) == usual.encode(text) for text in texts(50))


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_many_threads_on_one_tokenizer_get_the_ids_of_one():
    """What is asked for differs in length, and every second caller wants no padding."""
    tokenizer = load_tokenizer(RECORDED)
    calls = [(text, length) for text in texts(60) for length in (8, 20, 77)]
    wanted = [tokenizer.fitted(tokenizer.encode(text), length) for text, length in calls]
    bare = [tokenizer.encode(text) for text, _ in calls]

    def ask(number: int):
        text, length = calls[number % len(calls)]
        if number % 2:
            return tokenizer(text).input_ids == bare[number % len(calls)]
        return np.array_equal(tokenize(tokenizer, [text], length)[0], wanted[number % len(calls)])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(8 * len(calls))))


def test_the_backend_never_pads_or_cuts():
    tokenizer = load_tokenizer(RECORDED)
    tokenize(tokenizer, ["a cat", "a dog that is here"], 20)
    assert tokenizer._backend.padding is None and tokenizer._backend.truncation is None


# --- learned tokens ------------------------------------------------------------------------------------------------


def test_learned_tokens_of_added_tokens_json(tmp_path):
    """What textual inversion saved with transformers 4; the fifth release reads past it."""
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, added_tokens={"<cat-toy>_1": 708, "<cat-toy>": 707}))
    a, end = (tokenizer.encode("a")[1], tokenizer.eos_token_id)
    assert tokenizer.encode("a <cat-toy> <cat-toy>_1 a") == [tokenizer.bos_token_id, a, 707, 708, a, end]
    assert 707 not in tokenizer.encode("a <Cat-Toy>")  # as it is spelled
    assert len(tokenizer) == 709
    assert tokenizer.decode([707]) == "<cat-toy>"


def many(count: int) -> list[str]:
    draw = random.Random(0)
    return [f"<{draw.choice('abAB')}{number}>" for number in range(count)]


def test_many_learned_tokens_take_no_longer_each(tmp_path):
    learned = {content: 707 + number for number, content in enumerate(many(4000))}
    folder = tokenizer_folder(tmp_path, added_tokens=learned)
    with within(3):  # measured: 0.03 s; 23 s where each token is added by itself
        tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 4707 and tokenizer.encode("".join(learned))[1:-1] == [*learned.values()]


def test_many_learned_tokens_equal_those_of_transformers(tmp_path):
    """Of several kinds, by turns, and two that are spelled alike."""
    draw, known = random.Random(1), decoder()["added_tokens_decoder"]
    contents = many(60)
    flags = ["lstrip", "rstrip", "single_word", "normalized"]
    for number, content in enumerate(contents, 707):
        kinds = {name: draw.random() < 0.3 for name in flags}
        known[str(number)] = {"content": content, **kinds, "special": draw.random() < 0.5}
    config = {"added_tokens_decoder": known, "additional_special_tokens": [contents[3], "<more>", "<more>"]}
    folder = tokenizer_folder(tmp_path, tokenizer_config=config)
    ours, theirs = load_tokenizer(folder), CLIPTokenizer.from_pretrained(str(folder))
    assert len(ours) == len(theirs) == 768
    for _ in range(200):
        text = "".join(draw.choice([*contents, " ", "a", "<more>"]) for _ in range(12))
        assert ours.encode(text) == theirs(text)["input_ids"], text


def test_learned_tokens_of_both_files_are_one(tmp_path):
    folder = tokenizer_folder(tmp_path, added_tokens={"<cat-toy>": 707}, tokenizer_config=decoder())
    assert load_tokenizer(folder).encode("<cat-toy>")[1:-1] == [707]


@pytest.mark.parametrize(
    ("learned", "words"),
    [
        ({"<cat-toy>": 709}, "'<cat-toy>' has the id 709 in its file and would get 707"),
        ({"<cat-toy>": 3}, "'<cat-toy>' has the id 3 in its file and would get 707"),
        ({"<a>": 707, "<b>": 707}, "'<b>' has the id 707 in its file and would get 708"),
        ({"<cat-toy>": "x"}, "'x', which is not a whole number"),
    ],
)
def test_learned_tokens_that_cannot_have_their_ids_are_refused(tmp_path, learned, words):
    with pytest.raises(InputError, match=words):
        load_tokenizer(tokenizer_folder(tmp_path, added_tokens=learned))


def base_folder(parent: Path, vocabulary: int, **changes: dict | None) -> Path:
    root = parent / "base"
    shutil.copytree(TORCH_MODEL, root)
    shutil.rmtree(root / "tokenizer")
    tokenizer_folder(root, **changes)
    config = root / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": vocabulary}))
    return root


def test_a_token_beyond_the_text_encoder_is_refused(tmp_path):
    base = open_base(base_folder(tmp_path, 707, added_tokens={"<cat-toy>": 707}))
    with pytest.raises(InputError, match="its tokenizer has 708 tokens, its text encoder knows 707"):
        base.check()


def test_rows_that_no_token_reaches_are_warned_of(tmp_path):
    base = open_base(base_folder(tmp_path, 709))
    with pytest.warns(UserWarning, match=r"knows 709 tokens, its tokenizer 707.*added_tokens\.json"):
        base.check_tokenizer()
    open_base(base_folder(tmp_path / "both", 708, added_tokens={"<cat-toy>": 707})).check_tokenizer()


class _Nothing(RecordSource):
    def __len__(self):
        return 0

    def key(self, index):
        raise IndexError(index)

    def __getitem__(self, index):
        raise IndexError(index)

    def identity(self):
        return {}


def test_learned_tokens_are_part_of_what_identifies_samples(tmp_path):
    plain = LiveSamples(_Nothing(), tokenizer_folder(tmp_path / "a"), 64, 32).identity()
    learned = LiveSamples(_Nothing(), tokenizer_folder(tmp_path / "b", added_tokens={"<c>": 707}), 64, 32).identity()
    assert sorted(plain["tokenizer"]) == ["merges.txt", "vocab.json"]
    assert sorted(learned["tokenizer"]) == ["added_tokens.json", "merges.txt", "vocab.json"]


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [-1, 0, 1, 2, "x", 2.5, True, [77], float("nan"), float("inf")])
def test_lengths_that_cannot_be_are_refused(tmp_path, length):
    with pytest.raises(InputError, match="model_max_length=.* is not usable") as caught:
        load_tokenizer(tokenizer_folder(tmp_path, tokenizer_config={"model_max_length": length}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [None, 10**400, 1e30, 77.0])
def test_lengths_that_can_be(tmp_path, length):
    assert load_tokenizer(tokenizer_folder(tmp_path, tokenizer_config={"model_max_length": length})).model_max_length


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vocab.json", "{", "vocab.json: not JSON"),
        ("vocab.json", "[1, 2]", "vocab.json does not hold a JSON object"),
        ("vocab.json", '{"a": -1}', "cannot be read"),
        ("merges.txt", "#version: 0.2\nzz zz\n", "cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json does not hold a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", '{"padding_side": "left"}', "padding_side='left' is not supported"),
        ("tokenizer_config.json", '{"bos_token": 3}', "3 is not a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "cannot be read"),
        ("added_tokens.json", "\x00", "added_tokens.json is UTF-16 without"),
        ("special_tokens_map.json", '{"pad_token": [1]}', "is not a token"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, words):
    folder = tokenizer_folder(tmp_path)
    if name == "special_tokens_map.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("text", ["half a pair \ud800", b"bytes", None, 3])
def test_what_is_not_text_is_refused(text):
    with pytest.raises(InputError, match="is not text"):
        load_tokenizer(RECORDED).encode(text)


# --- texts of any length -------------------------------------------------------------------------------------------

LONG = {
    "words": "a red fox in the snow, ",
    "one word": "a",
    "one word of letters": "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=50_000)),
    "without spaces": "赤い狐が雪の中で跳ねる。",
    "other spaces": "a\u00a0red\u2003fox\x1c",
    "punctuation": "?!.,;:-",
    "combining": "e\u0301\u0301",
    "emoji": "🦊👩‍👩‍👧",
    "the end": "<|endoftext|>",
    "digits": "0123456789",
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_text_begins_with_the_same_ids(kind) -> None:
    tokenizer = load_tokenizer(RECORDED)
    text = (LONG[kind] * 50_000)[:50_000]
    whole = tokenizer._backend.encode(text).ids
    assert len(bounded(text)) <= MAX_CHARACTERS < len(text) and len(whole) > 300
    ids = tokenizer.encode(text)
    assert ids[:300] == whole[:300] and ids[-1] == whole[-1]
    np.testing.assert_array_equal(tokenizer.fitted(ids, 77), tokenizer.fitted(whole, 77))


def test_a_long_text_of_few_words_keeps_them_all() -> None:
    tokenizer = load_tokenizer(RECORDED)
    text = "a red" + " \n\t" * 100_000 + "fox" + " " * 100_000
    assert tokenizer.encode(text) == tokenizer.encode("a red fox")
    short = "a red  fox" * 3000
    assert bounded(short) is short


def test_a_caption_of_megabytes_takes_no_more_than_a_long_one(tmp_path) -> None:
    setup = (
        "from pathlib import Path; from ipadapter_jax.weights.tokenizer import load_tokenizer, tokenize\n"
        "import warnings\n"
        "warnings.simplefilter('ignore'); tokenizer = load_tokenizer(Path(sys.argv[1])); tokenizer.encode('a')\n"
        "texts = ['a red fox ' * 1_000_000, 'a' * 10_000_000]"
    )
    assert peak_growth(setup, "tokenize(tokenizer, texts, 77)", RECORDED) < 400  # 1,700 and more before


def test_what_a_truncation_loses_is_not_repeated_at_length() -> None:
    with pytest.warns(UserWarning, match="longer than 77 tokens; ignored: 'a red fox.* and more$") as caught:
        tokenize(load_tokenizer(RECORDED), ["a red fox " * 100_000], 77)
    assert len(str(caught[0].message)) < 700
