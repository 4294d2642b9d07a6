"""Records as the networks take them."""

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers import TORCH_MODEL
from PIL import Image

from ipadapter_jax.data.dataset import LiveSamples
from ipadapter_jax.data.types import Record
from ipadapter_jax.data.unused_files import UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.preprocess import clip_pixels, square_pixels
from ipadapter_jax.weights.tokenizer import load_tokenizer, tokenize

TOKENIZER = TORCH_MODEL / "tokenizer"


@dataclass
class Listed:
    """A source of given records."""

    records: list
    unused: UnusedFiles = field(default_factory=UnusedFiles)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def key(self, index):
        return self.records[index].key

    def identity(self):
        return {"kind": "listed", "records": len(self)}


def image(seed, width=90, height=70):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def live(*records, clip_size: int | None = 24):
    return LiveSamples(Listed(list(records)), TOKENIZER, 64, clip_size)


def test_a_sample():
    text = "a red house by the sea, " * 3
    sample = live(Record("a.png", png(image(0)), text))[0]
    assert sample.keys() == {"pixels", "clip_pixels", "input_ids"}
    np.testing.assert_array_equal(sample["pixels"], square_pixels(image(0), 64))
    np.testing.assert_array_equal(sample["clip_pixels"], clip_pixels(image(0), 24))
    np.testing.assert_array_equal(sample["input_ids"], tokenize(load_tokenizer(TOKENIZER), [text], 77)[0])
    assert {name: (array.dtype, array.shape) for name, array in sample.items()} == {
        "pixels": (np.uint8, (64, 64, 3)),
        "clip_pixels": (np.uint8, (24, 24, 3)),
        "input_ids": (np.int32, (77,)),
    }


@pytest.mark.filterwarnings("error")
def test_a_long_caption_loses_its_end_in_silence():
    sample = live(Record("a.png", png(image(0)), "word " * 500))[0]
    tokenizer = load_tokenizer(TOKENIZER)
    assert sample["input_ids"].shape == (77,)
    assert sample["input_ids"][[0, -1]].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_the_image_prompt_may_be_another_image():
    record = Record("a.png", png(image(0)), "", png(image(1)))
    sample = live(record)[0]
    np.testing.assert_array_equal(sample["pixels"], square_pixels(image(0), 64))
    np.testing.assert_array_equal(sample["clip_pixels"], clip_pixels(image(1), 24))
    without = live(record, clip_size=None)[0]
    assert without.keys() == {"pixels", "input_ids"}


@pytest.mark.parametrize(
    "record, words",
    [
        (Record("3.tar:7", b"", ""), "'3.tar:7' is empty"),
        (Record("3.tar:7", png(image(0))[:900], ""), "'3.tar:7' cannot be read"),
        (Record("3.tar:7", png(image(0)), "", b"<html>"), r"'3.tar:7 \(its image prompt\)' is a web page"),
        (Record("3.tar:7", png(image(0)), "half a pair \ud83d"), "'3.tar:7': its caption is not text"),
        (Record("3.tar:7", png(image(0)), None), "'3.tar:7': its caption is not text"),  # type: ignore
    ],
)
def test_unreadable_records_are_named(record, words):
    with pytest.raises(InputError, match=f"^{words}"):
        live(record)[0]


def test_without_a_tokenizer_nothing_is_read(tmp_path):
    with pytest.raises(InputError, match="no tokenizer here"):
        LiveSamples(Listed([]), tmp_path, 64, 24)


def test_threads_and_pickles_give_the_same():
    records = [Record(f"{i}.png", png(image(i)), f"image {'of ' * i}") for i in range(24)]
    samples = live(*records)
    alone = [samples[i] for i in range(24)]
    size = len(pickle.dumps(samples)) - len(pickle.dumps(samples.source))
    assert size < 1000  # no tokenizer
    with ThreadPoolExecutor(16) as pool:
        for copy in (samples, pickle.loads(pickle.dumps(samples))):
            for found, expected in zip(pool.map(copy.__getitem__, range(24)), alone, strict=True):
                for name, array in expected.items():
                    np.testing.assert_array_equal(found[name], array)


def test_identity_depends_on_the_data_and_the_settings(tmp_path):
    samples = live(Record("a.png", b"", ""))
    identity = samples.identity()
    assert json.loads(json.dumps(identity)) == identity and str(TOKENIZER.parent) not in json.dumps(identity)
    assert identity["source"] == {"kind": "listed", "records": 1} and identity["resolution"] == 64
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TOKENIZER / name).read_bytes())
    assert LiveSamples(samples.source, tmp_path, 64, 24).identity() == identity
    with (tmp_path / "merges.txt").open("a") as file:
        file.write("\n")
    assert LiveSamples(samples.source, tmp_path, 64, 24).identity() != identity
    assert live(Record("a.png", b"", ""), clip_size=None).identity() != identity


def test_an_account_counts_unused_files_and_truncated_captions():
    """75 tokens fit between both ends, and the 76th does not."""
    fits, long = " ".join(["!"] * 75), " ".join(["!"] * 76)
    records = [Record(f"{i}.png", b"", long if i in (3, 299) else fits) for i in range(300)]
    samples = live(*records)
    samples.source.unused.add("other files", "notes.md")
    assert samples.account() == (
        "300 records, 1 files not used: other files (1: notes.md); 1 of the first 256 captions are longer than 77 "
        "tokens and lose their ends, that of 3.png for one"
    )
    assert live(*records[:3]).account() == "3 records, 0 files not used"
    assert live(Record("a.png", b"", "\ud800")).account() == "1 records, 0 files not used"  # told when it is read
